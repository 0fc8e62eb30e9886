"""The wheel works far from the checkout: recipes and labels travel in it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, source]
    subprocess.run(command, check=True, timeout=300)
    (found,) = out.glob("*.whl")
    return found


def test_the_wheel_holds_every_recipe_and_label_table(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert f"medpretrain/configs/{path.relative_to(ROOT / 'configs')}" in inside
    for package in ("data_prep", "launchers", "medpretrain"):
        for path in (ROOT / package).rglob("*.py"):
            assert str(path.relative_to(ROOT)) in inside
    assert not [name for name in inside if name.startswith("tests")]


def test_recipes_and_labels_are_found_from_anywhere(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = """
from medpretrain.recipe_file import load_recipe, recipes_folder
from data_prep.labels import load_class_map
import medpretrain
print(medpretrain.__file__, recipes_folder(), load_recipe("amimv_medmnist").name, bool(load_class_map("mednist")))
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    package, recipes, name, labels = done.stdout.split()
    assert Path(package).is_relative_to(tmp_path / "site")
    assert Path(recipes).is_relative_to(tmp_path / "site")
    assert (name, labels) == ("amimv_medmnist", "True")
