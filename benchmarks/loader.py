"""Images a second of the stream against torchvision v2 in a DataLoader, same views, same cores, in one run.

    python benchmarks/loader.py [--images 512] [--repeats 5] [--out benchmarks/results]

Two 224-pixel views of 256-pixel JPEGs: crop, flip, colour jitter, blur, normalisation; the parameters of SimCLR. The
contestants take turns; each turn starts afresh, warms up, then is timed over the same number of images. Then the
stream's own time is taken apart by leaving augmentations out.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from data_prep.images import prepare
from data_prep.synthetic import IMAGES, make_demo_images
from medpretrain.data.batches import Stream
from medpretrain.data.mixture import Mixture
from medpretrain.data.views import Blur, Jitter, View

BATCH, SIZE = 64, 224
MEAN, STD = (0.4, 0.3, 0.2), (0.25, 0.2, 0.15)
CROP = View(size=SIZE, count=2, crop=(0.2, 1.0), flip=0.5)
JITTER = Jitter(p=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
BLUR = Blur(p=0.5, sigma=(0.1, 2.0), kernel=23)
FULL = CROP.model_copy(update={"jitter": JITTER, "blur": BLUR})
STAGES = {
    "crop, resize, flip": CROP,
    "... and jitter": CROP.model_copy(update={"jitter": JITTER}),
    "... and blur": FULL,
}
MAKE = "ours", "torchvision v2", "torchvision v2 on PIL"


class Jpegs(Dataset):
    """The peer: JPEG files from memory, two views each."""

    def __init__(self, files: list[bytes], *, pil: bool) -> None:
        self._files, self._pil = files, pil
        self._views = v2.Compose(
            [
                v2.RandomResizedCrop(SIZE, scale=(0.2, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], p=0.5),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        data = self._files[index]
        if self._pil:
            image = Image.open(io.BytesIO(data)).convert("RGB")
        else:
            image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        return self._views(image), self._views(image)


def source(folder: Path, images: int) -> Path:
    """Colour JPEGs of 256 pixels."""
    make_demo_images(folder / "made", per_class=-(-images // 2), size=256, seed=0)
    paths = sorted((folder / "made" / IMAGES).glob("retina*/*.jpg"))[:images]
    (folder / "images" / "retina").mkdir(parents=True)
    for number, path in enumerate(paths):
        Image.open(path).convert("RGB").save(folder / "images" / "retina" / f"{number:06}.jpg", quality=92)
    return folder / "images"


def ours(shards: Mixture, view: View, threads: int) -> Iterator[object]:
    torch.set_num_threads(threads)
    stream = Stream(
        shards,
        {"crop": view},
        split="train",
        seed=0,
        global_batch=BATCH,
        channels=3,
        mean=MEAN,
        std=STD,
        device=torch.device("cpu"),
        threads=threads,
    )
    return stream.batches(0)


def peer(files: list[bytes], threads: int, *, pil: bool) -> Iterator[object]:
    loader = DataLoader(
        Jpegs(files, pil=pil), BATCH, shuffle=True, num_workers=threads, drop_last=True, persistent_workers=True
    )
    while True:
        yield from loader


def images_per_s(start: Callable[[], Iterator[object]], batches: int, warmup: int = 6) -> float:
    made = start()
    for _ in islice(made, warmup):  # fills the queues: what was prepared in advance is not counted
        pass
    began = time.perf_counter()
    for _ in islice(made, batches):
        pass
    seconds = time.perf_counter() - began
    made.close()  # type: ignore[attr-defined]
    return batches * BATCH / seconds


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--images", type=int, default=512)
    arguments.add_argument("--batches", type=int, default=16)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = arguments.parse_args()
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as temporary:
        images = source(Path(temporary), options.images)
        prepare(images, Path(temporary) / "shards", split={"train": 1.0}, workers=threads)
        shards = Mixture.open([Path(temporary) / "shards"])
        files = [path.read_bytes() for path in sorted(images.rglob("*.jpg"))]
        contestants: dict[str, Callable[[], Iterator[object]]] = {
            "ours": lambda: ours(shards, FULL, threads),
            "torchvision v2": lambda: peer(files, threads, pil=False),
            "torchvision v2 on PIL": lambda: peer(files, threads, pil=True),
        }
        contestants |= {f"stage: {name}": partial(ours, shards, view, threads) for name, view in STAGES.items()}
        found: dict[str, list[float]] = {name: [] for name in contestants}
        for turn in range(options.repeats):
            for name, start in contestants.items():
                rate = images_per_s(start, options.batches)
                found[name].append(round(rate, 1))
                print(f"turn {turn + 1}: {name}: {rate:.1f} images/s", flush=True)
        rates = {name: statistics.median(values) for name, values in found.items()}
        feeds = parameters_alone(shards)
    write(options.out, rates, found, feeds, threads, float(np.mean([len(file) for file in files])))


def parameters_alone(shards: Mixture) -> float:
    """Images a second of order, parameters and bytes, without DALI."""
    stream = Stream(
        shards, {"crop": FULL}, split="train", seed=0, global_batch=BATCH, channels=3, mean=MEAN, std=STD,
        device=torch.device("cpu"), threads=1,
    )  # fmt: skip
    rows = shards.rows("train")
    began = time.perf_counter()
    for step in range(200):
        places = stream.order.step(step, BATCH)
        stream.parameters(places, rows[places.sample])
        shards.read(rows[places.sample])
    return 200 * BATCH / (time.perf_counter() - began)


def write(
    folder: Path, rates: dict[str, float], found: dict[str, list[float]], feeds: float, threads: int, file_bytes: float
) -> None:
    listed = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in listed if line.startswith("model name")), "?")
    machine = f"{cpu}, {threads} cores, torch {torch.__version__}, Python {platform.python_version()}"
    per_image = {name: 1000 / rate for name, rate in rates.items()}
    stages = [f"stage: {name}" for name in STAGES]
    lines = [
        "# Loader: two 224-pixel views of 256-pixel JPEGs",
        "",
        f"`python benchmarks/loader.py`, medians of {len(found['ours'])} interleaved turns; {machine}; "
        f"JPEGs of {file_bytes / 1024:.0f} KiB on average.",
        "",
        "| contestant | images/s | times torchvision v2 |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {rates[name]:.0f} | {rates[name] / rates['torchvision v2']:.2f} |" for name in MAKE),
        "",
        "Where the stream's time goes (wall time an image, both cores busy):",
        "",
        "| part | ms an image |",
        "| --- | ---: |",
        f"| order, parameters, bytes (one thread, in the background) | {1000 / feeds:.2f} |",
        f"| decode, crop, resize, flip, to float, normalise | {per_image[stages[0]]:.2f} |",
        f"| jitter (one affine map) | {per_image[stages[1]] - per_image[stages[0]]:+.2f} |",
        f"| blur (two matrix products, half of the views) | {per_image[stages[2]] - per_image[stages[1]]:+.2f} |",
        "",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "loader.md").write_text("\n".join(lines))
    data = {"machine": machine, "images_per_s": found, "median": rates, "parameters_alone_images_per_s": feeds}
    (folder / "loader.json").write_text(json.dumps(data, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
