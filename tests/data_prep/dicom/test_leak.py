"""From an export to a dataset, through the command itself: no secret of it is anywhere but in the export.

LEAK_EXAMPLES says how many exports are made up (30); each has one to four files with some 300 secrets each.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, event, example, given, settings
from hypothesis import strategies as st

from data_prep.dicom import source as source_module
from data_prep.dicom.source import Dicom
from data_prep.errors import UserError
from data_prep.options import Options, Running
from data_prep.prepare import Summary, prepare
from data_prep.records import Records
from data_prep.staging import Staging
from tests.data_prep.dicom.exports import Export, exports, found, heaps, overheard, pictures, pixels, pseudonym, samples
from tests.data_prep.dicom.planted import CHARACTER_SETS, KINDS, SYNTAXES, plant

EXAMPLES = int(os.environ.get("LEAK_EXAMPLES", 30))
ROOT = Path(__file__).resolve().parents[3]
KEY = random.Random(1).randbytes(32)
PNG_8 = {"bits": 8, "image_format": "png", "resize": None, "window": "stored"}
SHAPES = (
    PNG_8,
    PNG_8 | {"profile": "strict_demographics"},
    PNG_8 | {"bits": 16},
    PNG_8 | {"image_format": "jpg"},
    PNG_8 | {"resize": 20, "window": "percentile"},
    PNG_8 | {"window": "fixed"},
)
# Every kind, character set and way to lie on disk at least once, whatever is drawn.
MIXED = [plant(70 + n, kind, list(CHARACTER_SETS)[n % 6], SYNTAXES[n % 4], n % 3 == 0) for n, kind in enumerate(KINDS)]


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


@contextlib.contextmanager
def trouble(which: str) -> Iterator[None]:
    """Let a run end in the middle: an error of a library that quotes the file, or a kill after the first shard."""
    with pytest.MonkeyPatch.context() as patch:
        if which == "quoting error":

            def quote(dataset: Any, *_: object) -> None:
                raise LookupError(f"bad value {dataset.get('PatientName')!r} {dataset}")

            patch.setattr(source_module, "describe", quote)
        elif which == "kill":

            def die(self: Records, result: object) -> None:
                raise Killed

            def as_the_kernel(self: Staging) -> None:
                while self._locks:
                    os.close(self._locks.pop())

            patch.setattr(Records, "save", die)
            patch.setattr(Staging, "_release", as_the_kernel)
        yield


@given(exports(), st.sampled_from(SHAPES), st.sampled_from(["none", "none", "quoting error", "kill"]))
@example(Export(tuple(MIXED), "folder"), PNG_8, "none")
@example(Export(tuple(MIXED), "archives"), SHAPES[1], "kill")
@example(Export(tuple(MIXED), "DICOMDIR"), PNG_8, "quoting error")
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    print_blob=True,
)
def test_no_secret_of_an_export_is_in_what_comes_of_it(export: Export, shape: dict[str, Any], end: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        key = folder / "key"
        key.write_bytes(KEY)
        key.chmod(0o600)
        kind = Dicom(export.write(folder), key, **shape)
        options = Options({"train": 0.6, "test": 0.4} if len(export.files) > 8 else None, shard_size=2)
        wanted = expected(export, shape["bits"])
        event(f"{end}, {'images' if wanted else 'none usable'}")

        said: list[bytes] = []
        if end != "none":
            with overheard() as said, trouble(end):
                try:
                    prepare(kind, folder / "out", options, Running())
                except (Killed, Exception) as error:
                    problem = "".join(traceback.format_exception(error))
                    assert not wanted or not isinstance(error, UserError)  # noqa: PT017
                else:
                    assert not wanted
                    problem = ""
            assert not found(export.needles(), [*said, problem.encode()])
            assert not (folder / "out").exists()
            state = folder / ".out.partial"
            assert not found(export.needles(private=True), heaps(state))
        with overheard() as said:
            try:
                summary = prepare(kind, folder / "out", options, Running())
            except UserError as error:
                assert not wanted
                said.append("".join(traceback.format_exception(error)).encode())
                summary = None
        assert not found(export.needles(), said)
        assert isinstance(summary, Summary) == bool(wanted)
        if not isinstance(summary, Summary):
            assert not (folder / "out").exists()
            return
        private = folder / "out.private"
        assert not found(export.needles(), [*heaps(folder / "out"), (private / "audit.jsonl").read_bytes()])
        assert not found(export.needles(), [line.encode() for line in summary.warnings])
        assert not found(export.needles(private=True), heaps(private))
        assert not (folder / ".out.partial").exists()
        check(export, wanted, folder / "out", shape)


def expected(export: Export, bits: int) -> dict[tuple[str, int | None], tuple[Any, ...]]:
    """(instance, frame) -> (patient, study, series, pixels) of all that should be in the dataset."""
    found: dict[tuple[str, int | None], tuple[Any, ...]] = {}
    for file in export.files:
        images = pictures(file.kind) if file.accepted and file.data[128:132] == b"DICM" else []
        if bits == 16 and images and images[0].ndim == 3:
            continue
        patient, issuer, study, series, instance = file.identity
        for number, image in enumerate(images):
            place = (str(pseudonym(KEY, "i", instance)), number if len(images) > 1 else None)
            whose = pseudonym(KEY, "p", patient, issuer), pseudonym(KEY, "s", study), pseudonym(KEY, "e", series)
            found[place] = (*whose, image)
    return found


def check(export: Export, wanted: dict[tuple[str, int | None], tuple[Any, ...]], out: Path, shape: dict) -> None:
    """The dataset holds each image that should be there, with its right pixels and pseudonyms, and no other."""
    records = samples(out)
    assert {(record["instance"], record.get("frame")) for _, record, _ in records.values()} == set(wanted)
    for image, record, _ in records.values():
        *whose, right = wanted[record["instance"], record.get("frame")]
        assert [record["patient"], record["study"], record["series"]] == whose
        if shape["image_format"] == "png":
            shown = pixels(image)
            if shape in (PNG_8, SHAPES[1]):
                np.testing.assert_array_equal(shown, right)
    index = pq.read_table(out / "index.parquet").to_pylist()
    assert [row["key"] for row in index] == list(records)
    assert {row["instance"] for row in index} == {instance for instance, _ in wanted}
    refused = set(pq.read_table(out / "quarantine.parquet").column("instance").to_pylist())
    every = {pseudonym(KEY, "i", file.identity[4]) for file in export.files}
    assert refused - {None} == every - {instance for instance, _ in wanted}


_QUOTING = """
import sys
from data_prep.dicom import source
from medpretrain import cli

def quote(dataset, *_):
    raise LookupError(f"bad value {dataset.PatientName} {dataset}")

if __name__ == "__main__":
    source.describe = quote
    cli.main()
"""


@pytest.mark.parametrize(("broken", "workers"), [(False, 2), (True, 1)])
def test_no_secret_is_in_what_the_command_prints(tmp_path: Path, broken: bool, workers: int) -> None:
    export = Export(tuple(MIXED), "folder")
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "key").chmod(0o600)
    (tmp_path / "run.py").write_text(_QUOTING)
    command = [sys.executable, *([str(tmp_path / "run.py")] if broken else ["-m", "medpretrain.cli"])]
    out = tmp_path / "out"
    command += ["prep", "dicom", str(export.write(tmp_path)), str(out), "--key-file", str(tmp_path / "key")]
    command += ["--workers", str(workers), "--shard-size", "3", "--seed", "5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path, check=False)
    assert (done.returncode == 0) != broken, done.stderr.decode()
    assert not found(export.needles(), [done.stdout, done.stderr])
    if broken:
        assert b"LookupError on a DICOM file; its text is left out" in done.stderr
        assert not out.exists()
    else:
        assert not found(export.needles(), [*heaps(out), (tmp_path / "out.private" / "audit.jsonl").read_bytes()])
        check(export, expected(export, 8), out, PNG_8)


def test_the_search_finds_what_is_there() -> None:
    """Otherwise all of the above would pass for the wrong reason."""
    export = Export((plant(8, "CT", "ISO_IR 192"), plant(9, "MR", "\\ISO 2022 IR 87")), "folder")
    needles = export.needles()
    for file in export.files:
        token = next(secret for secret in file.sentinels if secret.startswith(b"ZQ"))
        text = token.decode()
        for written in (
            token.lower(),
            token[::-1],
            token.hex().encode(),
            b"x" + base64.b64encode(b"ab" + token + b"c"),
            text.encode("utf-16-le"),
            hashlib.md5(file.identity[0].encode()).hexdigest().encode(),
            hashlib.sha256(file.identity[4].encode()).hexdigest().encode(),
        ):
            assert found(needles, [b"some " + written + b" text"]), written
        assert len(found(needles, [file.data])) > 100
        assert found(needles, [file.name.encode()])
        assert not found(export.needles(private=True), [file.name.encode()])
    assert not found(needles, [b"nothing 12345678 of it", os.urandom(100_000)])
