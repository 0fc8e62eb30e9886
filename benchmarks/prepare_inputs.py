"""What benchmarks/prepare.py reads: made-up pictures, and copies of DICOM files under new UIDs. Made once and kept."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom import uid

from data_prep.dicom.pseudonyms import write_key

SIDE = 512
CLASSES = 4
FINE = 0.105  # of the noise that makes a JPEG of 512 pixels 51 KB
COMPRESSED = {"jpeg2000": uid.JPEG2000Lossless, "jpegls": uid.JPEGLSLossless, "rle": uid.RLELossless}


def record(number: int) -> dict[str, object]:
    """What every contestant writes beside an image."""
    labels = {"class": f"class{number % CLASSES}"}
    size = {"width": SIDE, "height": SIDE, "bit_depth": 8, "channels": 3}
    return {"split": "train", **size, "patient": None, "labels": labels}


def jpegs(folder: Path, count: int) -> None:
    """Colour JPEGs in one folder a class, and a folder of files for tar: the same JPEGs, each with its record."""
    (folder / "tar").mkdir()
    for number in range(count):
        rng = np.random.default_rng(number)
        smooth = _enlarged(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        fine = _enlarged(rng.integers(0, 256, (SIDE // 4, SIDE // 4), dtype=np.uint8))
        values = np.clip(smooth + FINE * (fine[..., None] - 128), 0, 255).astype(np.uint8)
        path = folder / "images" / f"class{number % CLASSES}" / f"{number:09d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path, quality=90)
        os.link(path, folder / "tar" / path.name)
        (folder / "tar" / f"{number:09d}.json").write_bytes(json.dumps(record(number), separators=(",", ":")).encode())


def pngs(folder: Path, count: int) -> None:
    """Gray PNGs of 16 bits."""
    (folder / "images").mkdir()
    for number in range(count):
        rng = np.random.default_rng(number)
        smooth = _enlarged(rng.integers(0, 256, (12, 12), dtype=np.uint8)) * 200
        values = np.clip(smooth + rng.normal(2000, 20, smooth.shape), 0, 65535).astype(np.uint16)
        Image.fromarray(values).save(folder / "images" / f"{number:09d}.png", compress_level=1)


def _enlarged(values: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(values).resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)


def dicoms(folder: Path, count: int, slices: Path, syntax: uid.UID | None = None) -> None:
    """Copies of the slices with their own instance UIDs, in `syntax` or as they are."""
    files = sorted(slices.glob("*.dcm"))
    assert files, f"no .dcm in {slices}"
    write_key(folder / "key")
    (folder / "images").mkdir()
    for first, path in enumerate(files):
        dataset = pydicom.dcmread(path)
        if syntax is not None:
            dataset.compress(syntax)
        for number in range(first, count, len(files)):
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.826.0.1.3680043.10.{number}"
            dataset.save_as(folder / "images" / f"{number:06d}.dcm")


def cached(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, made by `make` unless it is there."""
    if not folder.exists():
        print(f"making {folder.name}", flush=True)
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        make(part)
        part.rename(folder)
    return folder
