"""What several rooms' tests need."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SPLIT = {"train": 0.7, "test": 0.3}
LABELS = """\
chest: {modality: CT, anatomy: lung}
head: {modality: MR, anatomy: brain}
hand: {modality: CR, anatomy: hand}
"""


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> None:
    """Features are kept in a folder of the tests' own, not the user's."""
    os.environ["MEDPRETRAIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory) -> Path:
    """Shards of 66 small gray images: three classes with modality and anatomy, train and test, several shards."""
    from data_prep.images import prepare

    folder = tmp_path_factory.mktemp("small")
    draw = np.random.default_rng(0)
    for number, name in enumerate(("chest", "head", "hand")):
        (folder / "images" / name).mkdir(parents=True)
        for image in range(22):
            pixels = draw.integers(0, 60, (40, 36 + image)) + 70 * number
            pixels[8:24, 6 + image : 20 + image // 2] += 50
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / name / f"p{image}_{number}.png")
    (folder / "labels.yaml").write_text(LABELS)
    prepare(
        folder / "images",
        folder / "shards",
        labels=str(folder / "labels.yaml"),
        split=SPLIT,
        shard_size=10,
    )
    return folder / "shards"


@pytest.fixture(scope="session")
def colour_dataset(tmp_path_factory) -> Path:
    """Shards of 30 small colour images of two classes, `hand` as in `small_dataset` and `foot`; no other label."""
    from data_prep.images import prepare

    folder = tmp_path_factory.mktemp("colour")
    draw = np.random.default_rng(1)
    for number, name in enumerate(("hand", "foot")):
        (folder / "images" / name).mkdir(parents=True)
        for image in range(15):
            pixels = draw.integers(0, 50, (44, 30 + image, 3)) + 90 * number + np.array([60, 30, 0])
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / name / f"q{image}_{number}.png")
    prepare(folder / "images", folder / "shards", split=SPLIT, shard_size=8)
    return folder / "shards"


@pytest.fixture(scope="session")
def exactness():
    """The harness of benchmarks/exactness.py."""
    import exactness

    return exactness


@pytest.fixture(scope="session")
def run_ranks(exactness):
    """run_ranks(arguments, world): `python *arguments` as each rank of a gloo group; all must end with 0."""
    return exactness.run_ranks


@pytest.fixture
def medpretrain(monkeypatch, capsys):
    """medpretrain(*words) -> (exit code, stdout, stderr)."""

    from medpretrain import cli

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["medpretrain", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        text = capsys.readouterr()
        return ended.value.code or 0, text.out, text.err

    return call
