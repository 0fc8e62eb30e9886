"""What benchmarks/prepare.py times, each in a process of its own: `python prepare_contestants.py NAME INPUT OUT`.

A contestant is a generator: it imports and sets up, yields, works while the clock runs, and yields how many images it
did. Prints images, wall and CPU (user and system, with child processes) seconds as JSON.
"""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Contestant = Callable[[Path, Path], Iterator[Any]]
SHARD = 2000


def listed(source: Path, ending: str = "jpg") -> list[Path]:
    return sorted((source / "images").rglob(f"*.{ending}"))


def to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


# Packing files as they are


def writer(source: Path, out: Path) -> Iterator[Any]:
    from prepare_inputs import record

    from data_prep.shard import ShardWriter

    files = listed(source)
    yield
    for number, part in _parts(files):
        with ShardWriter(out / f"train-{number:05}.tar") as shard:
            for path in part:
                about = json.dumps(record(int(path.stem)), separators=(",", ":")).encode()
                with open(path, "rb", buffering=0) as file:
                    shard.add(path.stem, "jpg", file.read(), about)
            shard.close()
    yield len(files)


def _parts(files: list[Path]) -> Iterator[tuple[int, list[Path]]]:
    return enumerate(files[start : start + SHARD] for start in range(0, len(files), SHARD))


def webdataset_and_index(source: Path, out: Path) -> Iterator[Any]:
    import webdataset
    from prepare_inputs import record
    from wds2idx import IndexCreator

    files = listed(source)
    yield
    for number, part in _parts(files):
        tar = out / f"train-{number:05}.tar"
        with webdataset.TarWriter(str(tar)) as shard:
            for path in part:
                with open(path, "rb", buffering=0) as file:
                    shard.write({"__key__": path.stem, "jpg": file.read(), "json": record(int(path.stem))})
        to_disk(tar)
        with IndexCreator(str(tar), str(tar.with_suffix(".idx")), verbose=False) as index:
            index.create_index()
        to_disk(tar.with_suffix(".idx"))
    yield len(files)


def tar(source: Path, out: Path) -> Iterator[Any]:
    names = sorted(path.stem for path in (source / "tar").glob("*.jpg"))
    lists = []
    for number in range(0, len(names), SHARD):
        path = out / f"{number}.list"
        path.write_text("".join(f"{name}.jpg\n{name}.json\n" for name in names[number : number + SHARD]))
        lists.append(path)
    yield
    for path in lists:
        made = path.with_suffix(".tar")
        subprocess.run(["tar", "--format=ustar", "-cf", made, "-C", source / "tar", "-T", path], check=True)
        to_disk(made)
    yield len(names)


# The road of `prep`, without the start of its process


def _images(**more: Any) -> Contestant:
    def run(source: Path, out: Path) -> Iterator[Any]:
        import pyarrow as pa

        from data_prep.images import prepare

        pa.array([0])  # imports pandas, where it is installed
        yield
        summary = prepare(source / "images", out / "dataset", **more)
        assert not summary.info.quarantined, summary.info.reasons
        yield summary.info.samples

    return run


def dicom(source: Path, out: Path) -> Iterator[Any]:
    import pyarrow as pa

    from data_prep.dicom.source import Dicom
    from data_prep.options import Options, Running
    from data_prep.prepare import Summary, prepare

    pa.array([0])
    yield
    summary = prepare(Dicom(source / "images", source / "key"), out / "dataset", Options(), Running())
    assert isinstance(summary, Summary)
    assert not summary.info.quarantined, summary.info.reasons
    yield summary.info.samples


# The work alone


def pillow_decode(source: Path, out: Path) -> Iterator[Any]:
    from PIL import Image

    files = listed(source)
    Image.open(files[0]).load()
    yield
    for path in files:
        Image.open(io.BytesIO(path.read_bytes())).load()
    yield len(files)


def simplejpeg_decode(source: Path, out: Path) -> Iterator[Any]:
    import simplejpeg

    files = listed(source)
    yield
    for path in files:
        simplejpeg.decode_jpeg(path.read_bytes(), "RGB", strict=True)
    yield len(files)


def resize_jpeg(source: Path, out: Path) -> Iterator[Any]:
    """As `prep --resize 256`: from at least twice the size, Lanczos, quality 95, 4:4:4."""
    from PIL import Image

    files = listed(source)
    Image.open(files[0]).load()
    yield
    for path in files:
        image = Image.open(io.BytesIO(path.read_bytes()))
        image.draft(None, (512, 512))
        image = image.resize((256, 256), Image.Resampling.LANCZOS)
        image.save(io.BytesIO(), "JPEG", quality=95, subsampling=0)
    yield len(files)


def resize_png16(source: Path, out: Path) -> Iterator[Any]:
    """As `prep --resize 256` on 16-bit gray: Lanczos in float32, PNG of level 1."""
    import numpy as np
    from PIL import Image

    files = listed(source, "png")
    Image.open(files[0]).load()
    yield
    for path in files:
        image = Image.open(io.BytesIO(path.read_bytes()))
        exact = Image.fromarray(np.asarray(image).astype(np.float32))
        values = np.asarray(exact.resize((256, 256), Image.Resampling.LANCZOS))
        small = Image.fromarray(np.clip(np.rint(values), 0, 0xFFFF).astype(np.uint16))
        small.save(io.BytesIO(), "PNG", compress_level=1)
    yield len(files)


# DICOM


def _headers(record: bool) -> Contestant:
    """Header, pseudonyms, gate and anatomy; with `record` also the second reading, in full, when a file is packed."""

    def run(source: Path, out: Path) -> Iterator[Any]:
        from data_prep.dicom.anatomy import locate
        from data_prep.dicom.gate import gate
        from data_prep.dicom.header import read_whole
        from data_prep.dicom.profile import load_profile
        from data_prep.dicom.pseudonyms import Pseudonyms, load_key
        from data_prep.dicom.record import describe
        from data_prep.dicom.scan import identify, scan
        from data_prep.dicom.walk import opened, read

        files = listed(source, "dcm")
        profile, pseudonyms = load_profile("strict"), Pseudonyms(load_key(source / "key"))
        names = [os.fsencode(path.name) for path in files]
        folder = source / "images"
        with opened(folder, names[0]) as file:
            scan(file, names[0], pseudonyms, profile)
        repeats = 10  # much faster than its peer: else it would be over before it can be timed
        yield
        for name in names * repeats:
            with opened(folder, name) as file:
                scan(file, name, pseudonyms, profile)
            if record:
                dataset = read_whole(read(folder, name))
                identity = identify(dataset, pseudonyms)
                gate(dataset, profile, False)
                locate(dataset, None, identity.series)
                json.dumps(describe(dataset, profile))
        yield len(names) * repeats

    return run


def _plain_dicom(level: int | None) -> Contestant:
    """What is written by hand: dcmread, modality and VOI LUT, scaled to 8 bits, a PNG file each, all of them synced."""

    def run(source: Path, out: Path) -> Iterator[Any]:
        import numpy as np
        import pydicom
        from PIL import Image
        from pydicom.pixels import apply_modality_lut, apply_voi_lut

        def one(path: Path, target: Path) -> None:
            dataset = pydicom.dcmread(path)
            values = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset).astype(np.float32)
            low, high = values.min(), values.max()
            shown = ((values - low) * (255 / max(high - low, 1e-9))).round().astype(np.uint8)
            more = {} if level is None else {"compress_level": level}
            Image.fromarray(shown).save(target, **more)

        files = listed(source, "dcm")
        one(files[0], out / "first.png")
        yield
        for path in files:
            one(path, out / f"{path.stem}.png")
        for path in files:
            to_disk(out / f"{path.stem}.png")
        yield len(files)

    return run


def parts(source: Path, out: Path) -> Iterator[Any]:
    """CPU seconds of each step of `prep` with the decode check, image by image."""
    import numpy as np
    import simplejpeg

    from data_prep.fingerprint import fingerprint
    from data_prep.images import read_file
    from data_prep.metadata import strip_jpeg
    from data_prep.samples import Sample, _thinned
    from data_prep.shard import ShardWriter
    from data_prep.work import Picture, Tally, _Records

    root = source / "images"
    files = [os.fsencode(path.relative_to(root)) for path in listed(source)[:SHARD]]
    records, tally, labels = _Records("train", {"class": ["class0"]}), Tally(), np.zeros(1, np.int32)
    shard = ShardWriter(out / "train-00000.tar")
    seconds: dict[str, float] = {}
    clock = time.process_time

    def since(began: float, name: str) -> float:
        now = clock()
        seconds[name] = seconds.get(name, 0.0) + now - began
        return clock()

    yield
    for number, name in enumerate(files):
        began = clock()
        data = read_file(root, name)
        began = since(began, "read")
        found = strip_jpeg(data)
        began = since(began, "strip")
        values = simplejpeg.decode_jpeg(found.data, "RGB", strict=True)
        began = since(began, "decode")
        mark = fingerprint(values)
        began = since(began, "fingerprint")
        tally.add(_thinned(values))
        began = since(began, "mean and deviation")
        sample = Sample(found.extension, found.data, found.width, found.height, 8, found.channels, None, mark)
        line = records.dump(Picture(sample), None, labels)
        began = since(began, "record")
        shard.add(f"{number:09d}", "jpg", found.data, line)
        since(began, "shard, SHA-256 and .idx")
    began = clock()
    shard.close()
    since(began, "shard, SHA-256 and .idx")
    yield {"images": len(files), "seconds": seconds}


CONTESTANTS: dict[str, Contestant] = {
    "writer": writer,
    "webdataset_and_index": webdataset_and_index,
    "tar": tar,
    "trusted": _images(trust_images=True, duplicates="off"),
    "trusted_duplicates": _images(trust_images=True),
    "checked": _images(),
    "resized": _images(resize=256),
    "pillow_decode": pillow_decode,
    "simplejpeg_decode": simplejpeg_decode,
    "resize_jpeg": resize_jpeg,
    "resize_png16": resize_png16,
    "headers": _headers(record=False),
    "headers_twice": _headers(record=True),
    "dicom": dicom,
    "plain_dicom": _plain_dicom(None),
    "plain_dicom_fast_png": _plain_dicom(1),
    "parts": parts,
}


def main(name: str, source: str, out: str) -> None:
    steps = CONTESTANTS[name](Path(source), Path(out))
    next(steps)
    wall, cpu = time.perf_counter(), _cpu()
    found = next(steps)
    wall, cpu = time.perf_counter() - wall, _cpu() - cpu
    said = found if isinstance(found, dict) else {"images": found}
    print(json.dumps({**said, "wall": wall, "cpu": cpu}))


def _cpu() -> float:
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    main(*sys.argv[1:])
