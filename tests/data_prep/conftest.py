"""Small pictures and folders for the tests of data_prep."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Draw = Callable[..., bytes]


@pytest.fixture
def draw() -> Draw:
    """Encode a smooth random picture: `draw(seed, "JPEG", mode="RGB", size=(width, height), **save_options)`."""

    def encode(
        seed: int, kind: str = "PNG", mode: str = "L", size: tuple[int, int] = (40, 30), **options: object
    ) -> bytes:
        random_numbers = np.random.default_rng(seed)
        width, height = size
        if mode == "I;16":
            image = Image.fromarray(random_numbers.integers(0, 2**16, (height, width)).astype(np.uint16))
        else:
            coarse = random_numbers.integers(0, 256, (6, 8, 3)).astype(np.uint8)
            image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture
def tree(tmp_path: Path, draw: Draw) -> Path:
    """Two classes, JPEG and PNG, 10 patients with two to three images each: `cat/12_left.jpg`."""
    root = tmp_path / "tree"
    for number in range(24):
        folder = root / ("cat" if number % 3 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{100 + number % 10}_{'left' if number < 10 else 'right' if number < 20 else 'again'}"
        if number % 4:
            (folder / f"{name}.jpg").write_bytes(draw(number, "JPEG", mode="RGB" if number % 2 else "L"))
        else:
            (folder / f"{name}.png").write_bytes(draw(number, "PNG"))
    return root


@pytest.fixture
def rng() -> random.Random:
    """Random numbers whose seed is printed, so that a failure can be repeated with TEST_SEED."""
    seed = int(os.environ.get("TEST_SEED", random.SystemRandom().randrange(2**32)))
    print(f"TEST_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def real_data() -> Path:
    """The folder of public test images: MEDPRETRAIN_TEST_DATA, or ../shared/data beside the repository."""
    default = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("MEDPRETRAIN_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip("no real images here: set MEDPRETRAIN_TEST_DATA to the folder of public test data")
    return folder
