"""What a run over an export keeps together, orders, adds to, approves and names."""

from __future__ import annotations

import csv
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep.dicom.source import Dicom
from data_prep.errors import UserError
from data_prep.options import Options, Running
from data_prep.prepare import Summary, prepare
from data_prep.records import Records
from data_prep.staging import Staging
from data_prep.verify import verify
from tests.data_prep.dicom.exports import pixels, pseudonym, samples

KEY = random.Random(3).randbytes(32)
MR = "1.2.840.10008.5.1.4.1.1.4"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
Slice = Callable[..., None]


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_bytes(KEY)
    path.chmod(0o600)
    return path


@pytest.fixture
def put(tmp_path: Path, make: Any, encode: Any) -> Slice:
    """Write an MR slice whose pixels tell its instance: `put("name", "1.2.3", PatientID="7", ...)`."""

    def write(name: str, uid: str, frames: int = 1, **attributes: object) -> None:
        path = tmp_path / "export" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        values = picture(uid, frames)
        said = {
            "SOPClassUID": MR, "Modality": "MR", "SOPInstanceUID": uid, "Rows": 16, "Columns": 20,
            "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 8, "BitsStored": 8,
            "HighBit": 7, "PixelRepresentation": 0, "WindowCenter": 128, "WindowWidth": 256,
            "NumberOfFrames": frames if frames > 1 else None, "PixelData": values.tobytes(), **attributes,
        }  # fmt: skip
        path.write_bytes(encode(make(**said)))

    return write


def picture(uid: str, frames: int = 1) -> np.ndarray:
    draw = np.random.default_rng(int(uid.replace(".", "")))
    return draw.integers(0, 256, (frames, 16, 20)).astype(np.uint8)


def run(key: Path, out: str = "out", options: Options | None = None, source: str = "export", **how: Any) -> Summary:
    running = {name: how.pop(name) for name in ("workers", "append", "overwrite") if name in how}
    kind = Dicom(key.parent / source, key, **how)
    summary = prepare(kind, key.parent / out, options or Options(), Running(**running))
    assert isinstance(summary, Summary)
    return summary


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "audit.jsonl"
    }


def by_uid(out: Path, uids: dict[str, int]) -> dict[tuple[str, int], tuple[str, dict[str, Any], str]]:
    """(instance UID, frame) -> (key, record, shard); the pixels are compared on the way."""
    names = {pseudonym(KEY, "i", uid): uid for uid in uids}
    found = {}
    for name, (image, record, shard) in samples(out).items():
        uid, frame = names[record["instance"]], record.get("frame", 0)
        np.testing.assert_array_equal(pixels(image), picture(uid, uids[uid])[frame])
        found[uid, frame] = (name, record, shard)
    return found


def test_frames_of_a_file_stay_together_and_in_order_wherever_it_lies(key: Path, put: Slice) -> None:
    uids = {"1.1": 1, "1.2": 5, "1.3": 1, "1.4": 12, "1.5": 3, "1.6": 1}
    for number, (uid, frames) in enumerate(uids.items()):
        put(("IM1", "deep/er/2.dcm", "no extension", "x.zip", "zip/a.dcm", "zip/b")[number], uid, frames)
    export = key.parent / "export"
    with zipfile.ZipFile(export / "all.zip", "w") as archive:
        for path in (export / "zip").iterdir():
            archive.write(path, f"in/{path.name}")
    shutil.rmtree(export / "zip")
    summary = run(key, options=Options(shard_size=4))
    found = by_uid(key.parent / "out", uids)
    assert set(found) == {(uid, frame) for uid, frames in uids.items() for frame in range(frames)}
    assert summary.info.sources == 6
    order = list(samples(key.parent / "out"))
    for uid, frames in uids.items():
        keys, _, shards = zip(*(found[uid, frame] for frame in range(frames)), strict=True)
        position = keys[0].partition("-")[0]
        assert len(position) == 9
        assert list(keys) == ([position] if frames == 1 else [f"{position}-{i:05d}" for i in range(frames)])
        assert len(set(shards)) == 1
        start = order.index(keys[0])
        assert order[start : start + frames] == list(keys)
    index = pq.read_table(key.parent / "out" / "index.parquet").to_pylist()
    assert [row["key"] for row in index] == order
    assert max(int(name.partition("-")[0]) for name in order) == 5  # a place in the plan is a file


def test_a_file_of_which_a_frame_is_dropped_stays_linked(key: Path, put: Slice) -> None:
    values = picture("1.2.3", 3)
    put("film", "1.2.3", frames=4, PixelData=np.concatenate([values, values[:1]]).tobytes())
    put("slice", "1.2.4", PixelData=values[1].tobytes())
    summary = run(key, options=Options(drop_duplicates="exact"))
    assert summary.info.samples == 3
    assert summary.info.duplicates.dropped == 2
    assert not verify(summary.out)
    links = {row["path"]: row for row in pq.read_table(summary.private / "sources.parquet").to_pylist()}
    kept = {key[:9] for key in pq.read_table(Path(summary.out) / "index.parquet")["key"].to_pylist()}
    assert links["film"]["key"] in kept
    assert links["film"]["reason"] is None
    assert links["slice"]["key"] is None or links["slice"]["key"] in kept


def test_nothing_of_one_patient_is_in_two_splits(key: Path, put: Slice, rng: random.Random) -> None:
    """Whether a file lacks the issuer, the patient, or bears another number than the rest of its study."""
    uids, person = {}, {}
    for patient in range(30):
        for number in range(rng.randrange(2, 6)):
            uid = f"1.{patient + 1}.{number + 1}"
            study = f"2.{patient + 1}.{number % 2}"
            given: dict[str, object] = {"PatientID": f"N{patient}", "IssuerOfPatientID": "A"}
            if patient % 6 == 5:  # never known: their studies are all that is known
                given = {"PatientID": None}
            elif number > 1 and rng.random() < 0.6:  # of a study whose other files say more
                given = rng.choice(({"PatientID": None}, {"PatientID": f"N{patient}"}, {"PatientID": f"OLD{patient}"}))
            put(f"{rng.random()}", uid, StudyInstanceUID=study, **given)
            uids[uid], person[uid] = 1, (patient if patient % 6 != 5 else study)
    run(key, options=Options({"train": 0.4, "val": 0.3, "test": 0.3}, seed=rng.randrange(1000)))
    homes: dict[object, set[str]] = {}
    for (uid, _), (_, record, _) in by_uid(key.parent / "out", uids).items():
        homes.setdefault(person[uid], set()).add(record["split"])
        assert (record["patient"] is None) == (record["patient"] not in pseudonyms_of(30))
    assert len(homes) > 30
    assert all(len(splits) == 1 for splits in homes.values())
    assert set.union(*homes.values()) == {"train", "val", "test"}


def pseudonyms_of(count: int) -> set[str | None]:
    names = [f"{start}{number}" for number in range(count) for start in ("N", "OLD")]
    return {pseudonym(KEY, "p", name, issuer) for name in names for issuer in ("", "A")}


def test_a_split_stays_when_the_issuer_comes_later(key: Path, put: Slice) -> None:
    for number in range(12):
        put(f"a/{number}", f"1.{number + 1}", PatientID=f"N{number}")
    options = Options({"train": 0.5, "test": 0.5}, seed=4)
    run(key, options=options)
    for number in range(12):
        put(f"b/{number}", f"2.{number + 1}", PatientID=f"N{number}", IssuerOfPatientID="A")
    run(key, options=options, append=True)
    found = by_uid(key.parent / "out", {f"{a}.{b + 1}": 1 for a in (1, 2) for b in range(12)})
    for number in range(12):
        first, second = (found[f"{a}.{number + 1}", 0][1] for a in (1, 2))
        assert first["split"] == second["split"]
        assert first["patient"] != second["patient"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def test_workers_a_kill_and_other_file_names_change_no_byte(
    key: Path, put: Slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        put(f"{number % 3}/IM{number}", f"1.{number + 1}", frames=1 + number % 3, PatientID=f"N{number % 7}")
    put("capture", "3.1", SOPClassUID=SECONDARY_CAPTURE)
    options = Options({"train": 0.6, "test": 0.4}, shard_size=3, seed=1)
    run(key, "one", options)
    run(key, "two", options, workers=2)
    whole = contents(key.parent / "one")
    assert contents(key.parent / "two") == whole
    assert contents(key.parent / "two.private") == contents(key.parent / "one.private")

    save, left = Records.save, 3

    def die(self: Records, result: Any) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise Killed
        save(self, result)

    def as_the_kernel(self: Staging) -> None:
        while self._locks:
            os.close(self._locks.pop())

    with monkeypatch.context() as patch:
        patch.setattr(Records, "save", die)
        patch.setattr(Staging, "_release", as_the_kernel)
        with pytest.raises(Killed):
            run(key, "three", options)
    assert not (key.parent / "three").exists()
    with pytest.raises(UserError, match=r"another plan is there .bits was 8 and is now 16"):
        run(key, "three", options, bits=16)
    run(key, "three", options)
    assert contents(key.parent / "three") == whole
    assert contents(key.parent / "three.private") == contents(key.parent / "one.private")

    export, again = key.parent / "export", key.parent / "again"
    (again / "x").mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in export.rglob("*") if path.is_file())):
        shutil.copy(path, again / "x" / f"{97 * number % 101:04d}.dcm")
    run(key, "four", options, source="again")
    changed = {name for name, data in contents(key.parent / "four").items() if whole[name] != data}
    assert changed == {"quarantine.parquet", "dataset.json"}  # it says which number was refused


def test_an_added_export_becomes_new_shards_and_known_instances_do_not_come_twice(key: Path, put: Slice) -> None:
    uids = {f"1.{number + 1}": 1 for number in range(6)}
    for uid in uids:
        put(f"a/{uid}", uid, PatientID="N1")
    put("a/twin", "1.1", PatientID="N1")
    first = run(key, options=Options(shard_size=3))
    assert first.info.reasons == {"duplicate_instance": 1}
    before = contents(key.parent / "out")
    with pytest.raises(UserError, match=r"none of .* can be used"):
        run(key, options=Options(shard_size=3), append=True)
    put("b/known under another name", "1.3", PatientID="N1")
    for uid in ("2.1", "2.2"):
        put(f"b/{uid}", uid, PatientID="N2")
        uids[uid] = 1
    summary = run(key, options=Options(shard_size=3), append=True)
    after = contents(key.parent / "out")
    assert set(by_uid(key.parent / "out", uids)) == {(uid, 0) for uid in uids}
    assert summary.info.reasons["duplicate_instance"] >= 2
    assert all(after[name] == data for name, data in before.items() if name.startswith("shards/"))
    assert len([name for name in after if name.endswith(".tar")]) == 3
    refused = pq.read_table(key.parent / "out" / "quarantine.parquet").to_pylist()
    assert {row["instance"] for row in refused} <= {pseudonym(KEY, "i", uid) for uid in ("1.1", "1.3")}


def test_a_review_lets_in_what_it_names_and_nothing_else(key: Path, put: Slice) -> None:
    put("good", "1.1")
    put("seen", "1.2", SOPClassUID=SECONDARY_CAPTURE)
    put("not seen", "1.3", SOPClassUID=SECONDARY_CAPTURE)
    put("burned", "1.4", BurnedInAnnotation="YES")
    assert run(key).info.reasons == {"secondary_capture": 2, "burned_in": 1}
    refused = pq.read_table(key.parent / "out" / "quarantine.parquet").to_pylist()
    names = [row["instance"] for row in refused]
    assert sorted(names) == sorted(str(pseudonym(KEY, "i", f"1.{n}")) for n in (2, 3, 4))
    reviewed = key.parent / "approved.csv"
    with reviewed.open("w", newline="") as file:
        csv.writer(file).writerows([["instance", "note"], [pseudonym(KEY, "i", "1.2"), "clean"]])
    summary = run(key, overwrite=True, reviewed=reviewed)
    assert summary.info.reasons == {"secondary_capture": 1, "burned_in": 1}
    assert {uid for uid, _ in by_uid(key.parent / "out", {"1.1": 1, "1.2": 1})} == {"1.1", "1.2"}


def test_a_table_of_anatomies_decides_where_the_header_is_silent(key: Path, put: Slice) -> None:
    put("1", "1.1", BodyPartExamined="UP EXT")
    put("2", "1.2", BodyPartExamined="KNEE")
    put("3", "1.3", SeriesInstanceUID="4.1")
    put("4", "1.4", BodyPartExamined="LOW EXT")
    table = key.parent / "anatomy.yaml"
    table.write_text(f"body_part: {{UP EXT: shoulder}}\nseries: {{{pseudonym(KEY, 'e', '4.1')}: brain}}\n")
    run(key, anatomy=table)
    found = by_uid(key.parent / "out", {f"1.{number}": 1 for number in (1, 2, 3, 4)})
    said = [found[f"1.{number}", 0][1] for number in (1, 2, 3, 4)]
    assert [record["labels"]["anatomy"] for record in said] == ["shoulder", "knee", "brain", None]
    assert [record["labels"]["anatomy_source"] for record in said] == ["table", "BodyPartExamined", "table", None]
    assert [record["labels"]["modality"] for record in said] == ["MR"] * 4


def test_age_and_sex_leave_only_where_the_profile_says_so(key: Path, put: Slice) -> None:
    for number, age in enumerate(("034Y", "089Y", "090Y", "104Y", "104")):
        put(str(number), f"1.{number + 1}", PatientAge=age, PatientSex="F" if number else "X")
    for profile, ages, sexes in (
        ("strict", [None] * 5, {None}),
        ("strict_demographics", ["30-39", "80-89", "90+", "90+", None], {None, "F"}),
    ):
        run(key, profile=profile, overwrite=True)
        found = by_uid(key.parent / "out", {f"1.{number + 1}": 1 for number in range(5)})
        said = [found[f"1.{number + 1}", 0][1]["about"] for number in range(5)]
        assert [about.get("PatientAge") for about in said] == ages
        assert {about.get("PatientSex") for about in said} == sexes
