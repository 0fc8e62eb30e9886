"""Feature extraction against a plain timm and DataLoader loop, and kNN against one matrix product, in one run.

    python benchmarks/features.py --case SHARDS:NETWORK:SIZE ... [--images 512] [--repeats 5] [--train 100000]
        [--test 10000] [--skip-knn] [--out benchmarks/results]

Images are those of prepared shards, the networks untrained. The contestants take turns, on the same cores; the plain
loop decodes the same bytes with Pillow, resizes and normalises with torchvision, and is run without worker processes
and with one a core. Beside it: decoding alone (the same reader, no network) and the network alone (on ready batches).

For kNN, test features are compared with training features of 512 numbers: the product is that of unit vectors in
float32, into a buffer that is used again. "clustered" features stand in the order of their 100 classes.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from data_prep.dataset import Dataset
from medpretrain.data.batches import plain_batches
from medpretrain.evaluation.features import extract, features
from medpretrain.evaluation.knn import knn_scores
from medpretrain.evaluation.source import Source, open_source
from medpretrain.training.process import Process

CORES = len(os.sched_getaffinity(0))
CPU = torch.device("cpu")
ALONE = Process(rank=0, world=1, local_rank=0, local_world=1, device=CPU)
PEERS = ("plain loop, no worker", f"plain loop, {CORES} workers")
WIDTH, BATCH, CHUNK, CLASSES = 512, 64, 512, 100


class Images(torch.utils.data.Dataset):
    """The peer's images: bytes of the shards, decoded by Pillow."""

    def __init__(self, dataset: Dataset, rows: np.ndarray, source: Source) -> None:
        self._dataset, self._rows = dataset, rows
        prep = source.preprocessing
        self._mode = "L" if prep.channels == 1 else "RGB"
        self._prepare = v2.Compose(
            [
                v2.Resize((prep.size, prep.size), antialias=True),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(prep.mean, prep.std),
            ]
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Tensor:
        (data,) = self._dataset.read(self._rows[number : number + 1])
        return self._prepare(Image.open(io.BytesIO(data.tobytes())).convert(self._mode))


def plain_loop(dataset: Dataset, rows: np.ndarray, source: Source, workers: int) -> np.ndarray:
    loader = DataLoader(Images(dataset, rows, source), BATCH, num_workers=workers)
    with torch.inference_mode():
        return torch.cat([source.backbone(images) for images in loader]).numpy()


def decoding(dataset: Dataset, rows: np.ndarray, source: Source) -> None:
    prep = source.preprocessing
    for _ in plain_batches(
        dataset, rows, size=prep.size, channels=prep.channels, mean=prep.mean, std=prep.std, batch=BATCH, device=CPU,
        threads=CORES,
    ):  # fmt: skip
        pass


def network_alone(dataset: Dataset, rows: np.ndarray, source: Source) -> None:
    """The same loop as ours over the same batches, of zeros."""

    def ready(_dataset: Dataset, some: np.ndarray, *, size: int, channels: int, batch: int, **_: Any) -> Any:
        images = torch.zeros(batch, channels, size, size)
        for first in range(0, len(some), batch):
            yield images[: len(some) - first]

    extract(source.network(), dataset, rows, source.preprocessing, device=CPU, batches=ready)


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def take_turns(contestants: dict[str, Callable[[], object]], repeats: int, per: int) -> dict[str, list[float]]:
    """Milliseconds for one of `per` things, each turn; before the first, a round that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name, run in contestants.items():
            took = 1000 * seconds(run) / per
            if turn:
                found[name].append(took)
                print(f"  turn {turn}: {name}: {took:.4f} ms, load {os.getloadavg()[0]:.1f}", flush=True)
    return found


def of_features(case: str, images: int, repeats: int) -> dict[str, Any]:
    shards, network, size = case.rsplit(":", 2)
    dataset = Dataset.open(shards)
    rows = np.resize(dataset.rows("train"), images)
    source = open_source(f"random:{network}", dataset=dataset, size=int(size))
    torch.set_num_threads(CORES)
    contestants: dict[str, Callable[[], Any]] = {
        "ours": partial(features, source, dataset, rows, process=ALONE, cache=None),
        PEERS[0]: partial(plain_loop, dataset, rows, source, 0),
        PEERS[1]: partial(plain_loop, dataset, rows, source, CORES),
        "decoding alone": partial(decoding, dataset, rows, source),
        "network alone": partial(network_alone, dataset, rows, source),
    }
    ours, theirs = contestants["ours"](), contestants[PEERS[0]]()
    # Pillow rounds between its two passes and DALI elsewhere, so a pixel may differ by one in 255.
    cosine = functional.cosine_similarity(torch.from_numpy(ours), torch.from_numpy(theirs)).min().item()
    name = f"{Path(shards).name}, {network}, {size} px, {source.preprocessing.channels} channels"
    print(f"{name}: least cosine between ours and the plain loop's {cosine:.6f}", flush=True)
    times = take_turns(contestants, repeats, images)
    median = {who: statistics.median(values) for who, values in times.items()}
    decode, alone = median["decoding alone"], median["network alone"]
    return {
        "case": name,
        "images": images,
        "ms_an_image": times,
        "median": median,
        "least_cosine_to_the_plain_loop": cosine,
        "to_the_faster_plain_loop": median["ours"] / min(median[peer] for peer in PEERS),
        "to_the_slower_alone": median["ours"] / max(decode, alone),
        "to_the_sum_of_both_alone": median["ours"] / (decode + alone),
    }


def of_knn(count: int, tests: int, repeats: int) -> list[dict[str, Any]]:
    torch.set_num_threads(CORES)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) * CLASSES // count
    centres = torch.randn(CLASSES, WIDTH, generator=generator)
    found = []
    for kind in ("isotropic", "clustered"):
        train = torch.randn(count, WIDTH, generator=generator)
        test = torch.randn(tests, WIDTH, generator=generator)
        if kind == "clustered":
            train += centres[labels]
            test += centres[torch.randint(CLASSES, (tests,), generator=generator)]
        unit_train, unit_test = functional.normalize(train, dim=1), functional.normalize(test, dim=1)
        buffer = torch.empty(min(CHUNK, tests), count)

        def product(unit_test: Tensor, unit_train: Tensor, buffer: Tensor, k: int = 0) -> None:
            for chunk in unit_test.split(CHUNK):
                similarity = torch.mm(chunk, unit_train.T, out=buffer[: len(chunk)])
                if k:
                    similarity.topk(k, dim=1)

        contestants: dict[str, Callable[[], Any]] = {
            "matrix product": partial(product, unit_test, unit_train, buffer),
            "kNN, k = 200": partial(knn_scores, train, labels, test, CLASSES, k=200),
            "kNN, k = 20": partial(knn_scores, train, labels, test, CLASSES, k=20),
            "product and torch.topk, k = 200": partial(product, unit_test, unit_train, buffer, 200),
        }
        times = take_turns(contestants, repeats, tests)
        median = {who: statistics.median(values) for who, values in times.items()}
        ratios = {who: value / median["matrix product"] for who, value in median.items()}
        found.append({"features": kind, "ms_a_test_image": times, "median": median, "to_the_product": ratios})
    return found


def markdown(data: dict[str, Any]) -> str:
    lines = ["# Features and kNN", "", f"`{data['command']}`; medians of interleaved turns; {data['machine']}."]
    lines += [f"Load average {data['load'][0]:.1f} before and {data['load'][1]:.1f} after, of {CORES} cores.", ""]
    if data["features"]:
        lines += [
            "## Features: ms an image",
            "",
            "| | ours | plain loop (faster) | decoding alone | network alone | ours / plain loop | ours / slower alone "
            "| ours / sum of both |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in data["features"]:
            median = row["median"]
            lines.append(
                f"| {row['case']} | {median['ours']:.2f} | {min(median[peer] for peer in PEERS):.2f} "
                f"| {median['decoding alone']:.2f} | {median['network alone']:.2f} "
                f"| {row['to_the_faster_plain_loop']:.2f} | {row['to_the_slower_alone']:.2f} "
                f"| {row['to_the_sum_of_both_alone']:.2f} |"
            )
        lines += [
            "",
            "Decoding and network, each alone, have all the cores. Where both run on the CPU they share them, so no "
            "loop takes less than the sum of both, unless one of them leaves cores idle; the slower of the two alone "
            "is the bound where the network runs on a GPU, or where decoding is a small part.",
            "",
        ]
    if data["knn"]:
        lines += [
            f"## kNN: {data['train']:,} x {WIDTH} training and {data['test']:,} test features, ms a test image",
            "",
            "| features | | ms | times the product |",
            "| --- | --- | ---: | ---: |",
        ]
        for row in data["knn"]:
            for who, value in row["median"].items():
                lines.append(f"| {row['features']} | {who} | {value:.3f} | {row['to_the_product'][who]:.2f} |")
        lines += [
            "",
            "kNN is all of `knn_scores`: the float32 product, what could be among the k nearest found and compared "
            "again in float64, the votes.",
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", default=[], metavar="SHARDS:NETWORK:SIZE")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--train", type=int, default=100_000)
    parser.add_argument("--test", type=int, default=10_000)
    parser.add_argument("--skip-knn", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    listed = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in listed if line.startswith("model name")), "?")
    cases = " ".join(f"--case {Path(case.rsplit(':', 2)[0]).name}:{case.split(':', 1)[1]}" for case in options.case)
    before = os.getloadavg()[0]
    data: dict[str, Any] = {
        "command": f"python benchmarks/features.py {cases} --images {options.images} --repeats {options.repeats} "
        f"--train {options.train} --test {options.test}",
        "machine": f"{cpu}, {CORES} cores, torch {torch.__version__}, timm {timm.__version__}, "
        f"Python {platform.python_version()}",
        "train": options.train,
        "test": options.test,
        "features": [of_features(case, options.images, options.repeats) for case in options.case],
        "knn": [] if options.skip_knn else of_knn(options.train, options.test, options.repeats),
    }
    data["load"] = [before, os.getloadavg()[0]]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "features.json").write_text(json.dumps(data, indent=1) + "\n")
    (options.out / "features.md").write_text(markdown(data))
    print(markdown(data))


if __name__ == "__main__":
    main()
