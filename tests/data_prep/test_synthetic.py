from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from data_prep.errors import UserError
from data_prep.synthetic import DEMO_LABELS, IMAGES, LABELS, PATIENT_PATTERN, make_demo_images


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    make_demo_images(out, per_class=13, size=64, seed=3)
    return out


def pictures(out: Path) -> list[Path]:
    return sorted((out / IMAGES).glob("*/*"))


def test_every_class_has_its_number_of_images_of_the_size(demo: Path) -> None:
    assert sorted(folder.name for folder in (demo / IMAGES).iterdir()) == sorted(DEMO_LABELS)
    for name, (modality, _) in DEMO_LABELS.items():
        files = list((demo / IMAGES / name).iterdir())
        assert len(files) == 13
        for file in files:
            with Image.open(file) as image:
                assert image.size == (64, 64)
                assert image.mode == ("RGB" if modality == "OP" else "L")


def test_a_patient_has_several_images_in_one_class(demo: Path) -> None:
    classes, images = defaultdict(set), defaultdict(int)
    for path in pictures(demo):
        patient, k = path.stem.split("_")
        assert k.isdigit()
        found = re.search(PATIENT_PATTERN, path.as_posix())
        assert found
        assert found[1] == patient
        classes[patient].add(path.parent.name)
        images[patient] += 1
    assert all(len(found) == 1 for found in classes.values())
    assert max(images.values()) > 1
    for name in DEMO_LABELS:
        assert sum(found == {name} for found in classes.values()) >= 4, "too few patients to split"


def test_labels_yaml_names_modality_and_anatomy(demo: Path) -> None:
    said = YAML(typ="safe").load((demo / LABELS).read_text())
    assert said == {name: {"modality": m, "anatomy": a} for name, (m, a) in DEMO_LABELS.items()}
    assert {m for m, _ in DEMO_LABELS.values()} == {"CT", "MR", "US", "OP"}
    anatomies = {"abd", "lung", "brain", "knee", "spine", "thyroid", "breast", "eye"}
    assert {a for _, a in DEMO_LABELS.values()} == anatomies


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for folder, seed in (("a", 5), ("b", 5), ("c", 6)):
        make_demo_images(tmp_path / folder, per_class=2, size=32, seed=seed)
    a, b, c = ([path.read_bytes() for path in pictures(tmp_path / folder)] for folder in "abc")
    assert a == b
    assert len(set(a) & set(c)) == 0


def test_no_two_images_are_equal_and_none_is_empty(demo: Path) -> None:
    arrays = [np.asarray(Image.open(path), dtype=np.float64) for path in pictures(demo)]
    assert len({array.tobytes() for array in arrays}) == len(arrays)
    assert min(array.std() for array in arrays) > 15
    assert all(array.max() > 120 for array in arrays)


def test_left_and_right_eyes_have_the_optic_disc_on_opposite_sides(demo: Path) -> None:
    sides = defaultdict(list)
    for path in (demo / IMAGES / "retina_normal").iterdir():
        green = np.asarray(Image.open(path), dtype=np.float64)[..., 1]
        smooth = np.asarray(Image.fromarray(green.astype(np.uint8)).resize((12, 12), Image.Resampling.BOX))
        column = int(np.unravel_index(smooth.argmax(), smooth.shape)[1])
        sides[int(path.stem.split("_")[1]) % 2].append(column)
    assert np.mean(sides[0]) < 4.5
    assert np.mean(sides[1]) > 6.5


def test_more_images_of_a_class_leave_the_first_patients_as_they_were(demo: Path, tmp_path: Path) -> None:
    make_demo_images(tmp_path / "few", per_class=4, size=64, seed=3)
    name = next(iter(DEMO_LABELS))
    for path in (tmp_path / "few" / IMAGES / name).iterdir():
        assert path.read_bytes() == (demo / IMAGES / name / path.name).read_bytes()


@pytest.mark.parametrize("wrong", [{"per_class": 0}, {"size": 16}, {"seed": -1}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be >= 1"):
        make_demo_images(tmp_path / "out", **{"per_class": 1, "size": 32, "seed": 0, **wrong})
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_bytes(b"x")
    for out in (tmp_path, tmp_path / "mine.png"):
        with pytest.raises(UserError, match="not an empty folder"):
            make_demo_images(out, per_class=1, seed=0)


def test_drawing_needs_no_torch() -> None:
    script = "import sys, data_prep.synthetic; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
