"""The code of docs/downstream.md, as it stands there, on a small export and small images made up here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

DOCUMENT = Path(__file__).parents[2] / "docs" / "downstream.md"
_SECTION = re.compile(r"^## (\S+)\n.*?```python\n(.*?)```", re.MULTILINE | re.DOTALL)


def blocks() -> dict[str, str]:
    """The code by its heading."""
    return dict(_SECTION.findall(DOCUMENT.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes: stripes that lie, and stripes that stand. Turned on their side they would change places."""
    folder = tmp_path_factory.mktemp("downstream")
    draw = np.random.default_rng(0)
    for part, count in (("train", 16), ("test", 8)):
        for name in ("lying", "standing"):
            (folder / "images" / part / name).mkdir(parents=True)
            for number in range(count):
                wave = 100 * np.sin(np.arange(48) / 2 + draw.uniform(0, 6)) + 128
                pixels = np.broadcast_to(wave[:, None], (48, 40)) if name == "lying" else wave[None, :40].repeat(48, 0)
                noisy = (pixels + draw.normal(0, 20, pixels.shape)).clip(0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(folder / "images" / part / name / f"{number}.png")
    (folder / "exports").mkdir()
    return folder


def test_the_document_has_the_three() -> None:
    assert list(blocks()) == ["timm", "torchvision", "MONAI"]


@pytest.mark.parametrize("name", ["timm", "torchvision", "MONAI"])
def test_it_is_under_thirty_lines(name: str) -> None:
    assert len(blocks()[name].strip().splitlines()) < 30


@pytest.mark.parametrize(
    ("name", "kind"), [("timm", "vit"), ("torchvision", "3x3 grey"), ("MONAI", "3x3 grey")], ids=lambda value: value
)
def test_it_learns(name: str, kind: str, images: Path, bundles: Any) -> None:
    link = images / "exports" / "retina"
    link.unlink(missing_ok=True)
    link.symlink_to(bundles[0] / kind)
    prelude = (
        "import sys\nsys.modules['medpretrain'] = sys.modules['data_prep'] = None\nimport torch; torch.manual_seed(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", prelude + blocks()[name]],
        cwd=images,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", done.stdout)]
    (score,) = re.findall(r"(?:accuracy|AUROC) ([\d.]+)", done.stdout)
    assert len(losses) == 5
    assert losses[-1] < 0.7 * losses[0], done.stdout
    assert float(score) > 0.8, done.stdout
