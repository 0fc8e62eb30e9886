"""What preparing costs: packing, the decode check, workers, re-encoding and DICOM, each against its peers in one run.

    python benchmarks/prepare.py --dicom FOLDER [--deid-python PYTHON] [--sections ABCDEF] [--repeats 5] [--quick]

FOLDER holds the slices of one MR volume; they are copied under new UIDs. PYTHON is that of an environment with `deid`
(`python -m venv E && E/bin/pip install deid`); without it that peer is left out. Every contestant runs in a process of
its own on one core (both for the two of section C), in turns, from files in the page cache, and syncs what it writes.
Inputs are made once in benchmarks/inputs. Figures are medians; a ratio is the median of the ratios turn by turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prepare_inputs import COMPRESSED, cached, dicoms, jpegs, pngs

HERE = Path(__file__).parent
RUNNER = HERE / "prepare_contestants.py"
COMMAND = [sys.executable, "-m", "medpretrain.cli", "prep"]
LIBRARIES = ("webdataset", "nvidia-dali-cuda130", "pillow", "simplejpeg", "pydicom", "numpy", "pyarrow")
# One thread a library, so that CPU time compares.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# Compiled modules are kept here, whatever the machine does with them otherwise: compiling is not what is timed.
BYTECODE = HERE / "inputs" / "bytecode"


@dataclass(frozen=True)
class Contestant:
    """One way to do a section's work: a name in the tables, and what is run. `{out}` in it is an empty folder.

    `images` None: it times itself and says how many it did; else the whole process is timed from outside.
    """

    name: str
    command: list[str]
    images: int | None = None
    cores: int = 1


@dataclass(frozen=True)
class Claim:
    """Cost of `left` over that of `right`, in CPU or wall seconds an image, and what it should be."""

    left: str
    right: str
    at_least: float | None = None
    at_most: float | None = None
    by: str = "cpu"

    def met(self, ratio: float) -> bool:
        return (self.at_least is None or ratio >= self.at_least) and (self.at_most is None or ratio <= self.at_most)

    @property
    def target(self) -> str:
        return f"at least {self.at_least:g}" if self.at_least is not None else f"at most {self.at_most:g}"


@dataclass
class Section:
    title: str
    source: Path
    contestants: list[Contestant]
    claims: list[Claim]
    runs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def inside(name: str, label: str, source: Path) -> Contestant:
    """A contestant of prepare_contestants.py."""
    return Contestant(label, [sys.executable, str(RUNNER), name, str(source), "{out}"])


def whole(label: str, source: Path, images: int, *options: str, kind: str = "images", cores: int = 1) -> Contestant:
    """The command as a user gives it."""
    return Contestant(
        label, [*COMMAND, kind, str(source / "images"), "{out}/dataset", *options], images=images, cores=cores
    )


def packing(source: Path, images: int) -> Section:
    ours, webdataset, tar = "ShardWriter with SHA-256 and .idx", "webdataset, then wds2idx", "GNU tar, no .idx"
    return Section(
        f"A. Packing {images} JPEGs as they are",
        source,
        [
            inside("writer", ours, source),
            inside("webdataset_and_index", webdataset, source),
            inside("tar", tar, source),
            inside("trusted", "prep --trust-images, duplicates off, without start", source),
            whole("prep --trust-images, duplicates off", source, images, "--trust-images", "--duplicates", "off"),
            inside("trusted_duplicates", "prep --trust-images, without start", source),
            whole("prep --trust-images", source, images, "--trust-images"),
        ],
        [Claim(webdataset, ours, at_least=4), Claim(tar, ours, at_least=0.4)],
    )


def checking(source: Path, images: int) -> Section:
    pillow, strict = "decode alone, Pillow", "decode alone, simplejpeg strict"
    ours, bare = "prep", "prep, without start"
    return Section(
        f"B. The decode check on {images} JPEGs",
        source,
        [
            whole(ours, source, images),
            inside("checked", bare, source),
            inside("pillow_decode", pillow, source),
            inside("simplejpeg_decode", strict, source),
        ],
        [Claim(one, other, at_most=1.15) for one in (ours, bare) for other in (pillow, strict)],
    )


def workers(source: Path, images: int) -> Section:
    one, two = "prep --workers 1", "prep --workers 2"
    return Section(
        f"C. Two processes, {images} JPEGs with the decode check",
        source,
        [whole(one, source, images, "--workers", "1", cores=2), whole(two, source, images, "--workers", "2", cores=2)],
        [Claim(one, two, at_least=1.7, by="wall")],
    )


def shrinking(source: Path, images: int, what: str, loop: str) -> Section:
    ours, alone = "prep --resize 256, without start", "decode, resize and encode alone"
    return Section(
        f"D. From 512 to 256 pixels: {images} {what}",
        source,
        [inside("resized", ours, source), inside(loop, alone, source)],
        [Claim(ours, alone, at_most=1.1)],
    )


def headers(source: Path, images: int, deid: str | None) -> Section:
    ours, twice, peer = "header, pseudonyms, gate, anatomy", "... and again when packed, with the record", "deid"
    contestants = [inside("headers", ours, source), inside("headers_twice", twice, source)]
    claims = []
    if deid is not None:
        contestants.append(Contestant(peer, [deid, str(HERE / "deid_peer.py"), str(source / "images")]))
        claims = [Claim(peer, ours, at_least=10), Claim(peer, twice, at_least=10)]
    return Section(f"E. De-identifying the headers of {images} MR files", source, contestants, claims)


def from_dicom(source: Path, images: int, what: str) -> Section:
    ours, bare, plain = "prep dicom", "prep dicom, without start", "pydicom and Pillow loop"
    fast = f"{plain}, PNG level 1"
    return Section(
        f"F. From {images} DICOM files, {what}, to 8-bit PNG",
        source,
        [
            whole(ours, source, images, "--key-file", str(source / "key"), kind="dicom"),
            inside("dicom", bare, source),
            inside("plain_dicom", plain, source),
            inside("plain_dicom_fast_png", fast, source),
        ],
        [Claim(plain, bare, at_least=1), Claim(plain, ours, at_least=1), Claim(fast, bare, at_least=1)],
    )


def start_up() -> Section:
    starts = {
        "python alone": "pass",
        "import data_prep.images": "import data_prep.images",
        "import data_prep.dicom.source": "import data_prep.dicom.source",
        "import pandas (pyarrow does, where it is installed)": "import pandas",
    }
    contestants = [Contestant(name, [sys.executable, "-c", code], images=1) for name, code in starts.items()]
    contestants.append(Contestant("medpretrain prep images --help", [*COMMAND, "images", "--help"], images=1))
    return Section("Start of a process", HERE, contestants, [])


def run(contestant: Contestant, scratch: Path) -> dict[str, Any]:
    """Wall and CPU seconds and images of one turn."""
    cores = sorted(os.sched_getaffinity(0))
    own = {"PYTHONPATH": str(HERE.parent), "PYTHONPYCACHEPREFIX": str(BYTECODE), "PYTHONDONTWRITEBYTECODE": ""}
    with tempfile.TemporaryDirectory(dir=scratch) as out, tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        process = subprocess.Popen(
            [part.replace("{out}", out) for part in contestant.command],
            stdout=said,
            env={**os.environ, **ONE_THREAD, **own},
            preexec_fn=lambda: os.sched_setaffinity(0, cores[-contestant.cores :]),
        )
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, contestant.command
        if contestant.images is not None:
            return {"images": contestant.images, "wall": seconds, "cpu": used.ru_utime + used.ru_stime}
        said.seek(0)
        return dict(json.loads(said.read().splitlines()[-1]))


def take_turns(section: Section, repeats: int, scratch: Path) -> None:
    print(section.title, flush=True)
    for path in section.source.rglob("*"):
        if section.source != HERE and path.is_file():
            path.read_bytes()
    section.runs = {contestant.name: [] for contestant in section.contestants}
    for turn in range(repeats):
        shift = turn % len(section.contestants)
        for contestant in section.contestants[shift:] + section.contestants[:shift]:
            found = run(contestant, scratch)
            section.runs[contestant.name].append(found)
            print(f"  {contestant.name}: {found['cpu']:.2f} s CPU, {found['wall']:.2f} s wall", flush=True)


def cost(found: dict[str, Any], by: str) -> float:
    return float(found[by] / found["images"])


def ratios(section: Section, claim: Claim) -> list[float]:
    pairs = zip(section.runs[claim.left], section.runs[claim.right], strict=True)
    return [cost(left, claim.by) / cost(right, claim.by) for left, right in pairs]


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def tables(section: Section) -> list[str]:
    lines = [f"## {section.title}", ""]
    lines += [
        "| contestant | images/s of CPU | images/s of wall time | CPU ms an image |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, runs in section.runs.items():
        costs = {by: [cost(found, by) for found in runs] for by in ("cpu", "wall")}
        rates = [f"{1 / statistics.median(costs[by]):.{0 if min(costs[by]) < 0.1 else 1}f}" for by in costs]
        lines.append(f"| {name} | {' | '.join(rates)} | {spread([1000 * value for value in costs['cpu']], 3)} |")
    if section.claims:
        lines += ["", "| cost of | over that of | ratio | target |", "| --- | --- | ---: | --- |"]
    for claim in section.claims:
        found = ratios(section, claim)
        met = "met" if claim.met(statistics.median(found)) else "missed"
        by = "" if claim.by == "cpu" else " (wall)"
        lines.append(f"| {claim.left} | {claim.right} | {spread(found, 2)}{by} | {claim.target}: {met} |")
    return [*lines, ""]


def parts_table(runs: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Where the time of the decode check goes, steps alone:",
        "",
        "| step | CPU us an image |",
        "| --- | ---: |",
    ]
    for name in runs[0]["seconds"]:
        lines.append(f"| {name} | {spread([1e6 * found['seconds'][name] / found['images'] for found in runs], 1)} |")
    return [*lines, ""]


def machine() -> str:
    listed = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in listed if line.startswith("model name")), "?")
    tar = subprocess.run(["tar", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, {libraries}, {tar}"


def chosen(options: argparse.Namespace) -> list[Callable[[], Section]]:
    """The sections, each with its inputs made when it is called."""
    quick = options.quick
    packed, shrunk, mr, compressed, few = (200, 40, 64, 32, 32) if quick else (8000, 1000, 960, 320, 64)

    def source(kind: str, count: int, make: Callable[..., None], *more: Any) -> Path:
        return cached(HERE / "inputs" / f"{kind}-{count}", lambda folder: make(folder, count, *more))

    def dicom_source(kind: str, count: int, *syntax: Any) -> Path:
        return source(kind, count, dicoms, options.dicom, *syntax)

    def encoded(name: str, syntax: Any) -> Section:
        return from_dicom(dicom_source(name, compressed, syntax), compressed, name)

    makers = {
        "A": [lambda: packing(source("jpeg", packed, jpegs), packed)],
        "B": [lambda: checking(source("jpeg", packed, jpegs), packed)],
        "C": [lambda: workers(source("jpeg", packed, jpegs), packed)],
        "D": [
            lambda: shrinking(source("jpeg", shrunk, jpegs), shrunk, "JPEGs", "resize_jpeg"),
            lambda: shrinking(source("png16", shrunk, pngs), shrunk, "16-bit PNGs", "resize_png16"),
        ],
        "E": [lambda: headers(dicom_source("mr", few), few, options.deid_python)],
        "F": [
            lambda: from_dicom(dicom_source("mr", mr), mr, "uncompressed"),
            *(partial(encoded, name, syntax) for name, syntax in COMPRESSED.items()),
        ],
    }
    without = "" if options.dicom else "EF"
    return [make for letter in options.sections if letter not in without for make in makers[letter]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dicom", type=Path)
    parser.add_argument("--deid-python")
    parser.add_argument("--sections", default="ABCDEF")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few images, to see that it runs")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(dir=cached(HERE / "inputs" / "scratch", lambda folder: None)) as scratch:
        starts = start_up()
        for contestant in starts.contestants:
            run(contestant, Path(scratch))  # leaves compiled modules behind
        take_turns(starts, options.repeats, Path(scratch))
        sections = [starts]
        lines = tables(starts)
        for make in chosen(options):
            section = make()
            take_turns(section, options.repeats, Path(scratch))
            sections.append(section)
            lines += tables(section)
            if section.title.startswith("B"):
                runs = [run(inside("parts", "", section.source), Path(scratch)) for _ in range(options.repeats)]
                section.runs["parts"] = runs
                lines += parts_table(runs)
    load.append(os.getloadavg()[0])
    about = machine()
    head = [
        "# Preparation",
        "",
        f"`python benchmarks/prepare.py{' --quick' if options.quick else ''}`, medians (and extremes) of "
        f"{options.repeats} turns; {about}. Load of the machine {load[0]:.1f} before, {load[1]:.1f} after. "
        "CPU is user and system time; every contestant reads the same files from the page cache and syncs what it "
        "writes. 'Without start' leaves out starting Python and importing.",
        "",
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "prepare.md").write_text("\n".join(head + lines))
    data = {"machine": about, "load": load, "sections": {section.title: section.runs for section in sections}}
    (options.out / "prepare.json").write_text(json.dumps(data, indent=1) + "\n")
    print("\n".join(head + lines))


if __name__ == "__main__":
    main()
