"""What the evaluation's tests measure."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.dataset import Dataset


def make_dataset(folder: Path, *, unlabelled: int = 0, key: int = 0, lacking: str = "") -> Path:
    """40 patients with 1 to 3 gray images of 16 pixels, each patient of class `dark` or `light`; 24/8/8 of them.

    Args:
        unlabelled: images of the test split that have no label `grade`.
        key: another draws other pixels.
        lacking: a class that the test split has none of.
    """
    from data_prep.images import prepare

    draw = np.random.default_rng(key)
    (folder / "images").mkdir(parents=True)
    lines = ["path,patient,split,grade"]
    left = unlabelled
    for patient in range(40):
        split = "train" if patient < 24 else "val" if patient < 32 else "test"
        grade = ("dark", "light")[patient % 2]
        if split == "test" and grade == lacking:
            grade = "light" if lacking == "dark" else "dark"
        for image in range(1 + patient % 3):
            pixels = draw.integers(0, 90, (16, 16)) + (60 if grade == "light" else 0)
            pixels[: 4 + patient % 5] += 40
            name = f"{key}-{patient}-{image}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / name)
            written = grade
            if split == "test" and left:
                left, written = left - 1, ""
            lines.append(f"images/{name},{key}-{patient},{split},{written}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    (folder / "key").write_text(hashlib.sha256(b"the same for all").hexdigest())
    (folder / "key").chmod(0o600)
    prepare(folder / "manifest.csv", folder / "shards", key_file=folder / "key")
    return folder / "shards"


@pytest.fixture(scope="session")
def graded(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset.open(make_dataset(tmp_path_factory.mktemp("graded")))
