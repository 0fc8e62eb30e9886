"""Every file of an export is named once, in a fixed order, and read or set aside by name."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from data_prep.dicom.header import silenced
from data_prep.dicom.scan import ScanRejected, scan
from data_prep.dicom.walk import opened, read, shown, walk
from data_prep.errors import UserError
from data_prep.quarantine import Rejected


def archive(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def reason(root: Path, name: bytes) -> str:
    with pytest.raises(Rejected) as caught:
        read(root, name)
    return caught.value.code


def test_every_file_is_named_once_in_the_order_of_its_bytes(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/IM1", "b/IM10.dcm", "b/.hidden", "a.x", "z", ".DS_Store"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / os.fsdecode(b"b/M\xfcller")).write_bytes(b"odd")
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "b")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    names = list(walk(tmp_path))
    inner = [b"IM1", b"IM10.dcm", b"M\xfcller"]
    expected = [
        b"a.x",
        *(b"b/" + name for name in inner),
        *(b"link/" + name for name in inner),
        b"nowhere",
        b"self",
        b"z",
    ]
    assert names == expected
    assert read(tmp_path, b"b/M\xfcller") == b"odd"
    assert shown(b"b/M\xfcller") == "b/M\\xfcller"
    assert reason(tmp_path, b"nowhere") == "missing"
    assert reason(tmp_path, b"self") == "unreadable"


def test_members_of_archives_are_named_and_read_whatever_the_extension(tmp_path):
    inner = archive({"x": b"1"})
    members = {"study/IM2": b"two", "IM1": b"one", "d/": b"", "__MACOSX/IM1": b"", "d/.x": b"", "nested.dat": inner}
    (tmp_path / "export.001").write_bytes(archive(members))
    (tmp_path / "PK").write_bytes(b"PK\3\4 but no archive")
    names = list(walk(tmp_path))
    assert names == [b"PK", b"export.001\0IM1", b"export.001\0nested.dat", b"export.001\0study/IM2"]
    assert read(tmp_path, names[3]) == b"two"
    assert shown(names[3]) == "export.001!/study/IM2"
    assert reason(tmp_path, names[2]) == "archive_nested"
    assert reason(tmp_path, names[0]) == "archive_unreadable"
    assert list(walk(tmp_path / "export.001")) == names[1:]
    assert read(tmp_path / "export.001", names[1]) == b"one"


def test_damaged_encrypted_and_oversized_members_are_set_aside_by_name(tmp_path, monkeypatch):
    data = bytearray(archive({"a": b"A" * 4, "b": b"B" * 4, "c": b"C" * 40}))
    data[data.index(b"a", 30) + 1] ^= 0xFF  # the first byte of a's data
    central = data.index(b"PK\1\2", data.index(b"PK\1\2") + 1)
    data[central + 8] |= 1  # b is encrypted
    (tmp_path / "x.zip").write_bytes(data)
    monkeypatch.setattr("data_prep.dicom.walk.MAX_BYTES", 39)
    assert list(walk(tmp_path)) == [b"x.zip\0a", b"x.zip\0b", b"x.zip\0c"]
    assert reason(tmp_path, b"x.zip\0a") == "corrupt"
    assert reason(tmp_path, b"x.zip\0b") == "archive_encrypted"
    assert reason(tmp_path, b"x.zip\0c") == "file_too_large"


def test_a_damaged_archive_only_sets_files_aside(tmp_path, rng):
    """Flipped and cut bytes: only Rejected may come out."""
    whole = archive({f"study/IM{number}": bytes([number]) * 300 for number in range(4)})
    read_again = 0
    for trial in range(200):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 3, 20))):
            data[rng.randrange(4, len(data))] = rng.randrange(256)
        path = tmp_path / f"{trial}.zip"
        path.write_bytes(data[: rng.randrange(4, len(data))] if rng.random() < 0.2 else data)
        for name in walk(path):
            try:
                read_again += len(read(path, name)) == 300
            except Rejected as reason:
                assert reason.message  # noqa: PT017
    assert read_again > 50


def test_a_dicom_file_whose_preamble_says_zip_is_dicom(tmp_path, make, encode):
    data = b"PK\3\4" + encode(make())[4:] + archive({"x": b"1"})
    (tmp_path / "both").write_bytes(data)
    assert list(walk(tmp_path)) == [b"both"]
    assert read(tmp_path, b"both") == data


def directory(encode, *files: list[str]) -> bytes:
    records = []
    for parts in files:
        record = Dataset()
        record.DirectoryRecordType = "IMAGE"
        with silenced():
            record.ReferencedFileID = parts
        records.append(record)
    dataset = Dataset()
    dataset.DirectoryRecordSequence = records
    return encode(dataset)


def test_what_a_dicomdir_lists_and_the_disk_lacks_is_missing_by_name(tmp_path, make, encode):
    (tmp_path / "dicom").mkdir()
    (tmp_path / "dicom" / "im1").write_bytes(encode(make()))
    listed = (["DICOM", "IM1"], ["DICOM", "IM2"], ["..", "..", "ETC", "PASSWD"])
    (tmp_path / "DICOMDIR").write_bytes(directory(encode, *listed))
    assert list(walk(tmp_path)) == [b"DICOMDIR", b"DICOM/IM2", b"dicom/im1"]
    assert reason(tmp_path, b"DICOM/IM2") == "missing"
    root = tmp_path / "DICOMDIR"
    assert list(walk(root)) == [b"dicom/im1", b"DICOM/IM2"]
    assert read(root, b"dicom/im1") == encode(make())
    root.write_bytes(b"damaged")
    assert list(walk(tmp_path)) == [b"DICOMDIR", b"dicom/im1"]


def test_a_single_file_is_an_export_and_nothing_is_none(tmp_path, make, encode, pseudonyms, strict):
    (tmp_path / "IM1").write_bytes(encode(make()))
    (name,) = walk(tmp_path / "IM1")
    with opened(tmp_path / "IM1", name) as file:
        assert scan(file, name, pseudonyms, strict).name == b"IM1"
    with pytest.raises(UserError, match="does not exist"):
        list(walk(tmp_path / "none"))


def test_a_header_is_read_out_of_an_archive(tmp_path, make, encode, pseudonyms, strict):
    big = make(PatientComments="x" * 200_000, SeriesInstanceUID="1.2.9")  # past the first read
    (tmp_path / "x.zip").write_bytes(archive({"big": encode(big), "page.html": b"<html>"}))
    with opened(tmp_path, b"x.zip\0big") as file:
        assert scan(file, b"", pseudonyms, strict).identity.series == pseudonyms.series("1.2.9")
    with opened(tmp_path, b"x.zip\0page.html") as file, pytest.raises(ScanRejected) as caught:
        scan(file, b"", pseudonyms, strict)
    assert caught.value.code == "not_dicom"


def test_a_folder_that_cannot_be_read_stops_the_walk(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path: bytes):
        if path.endswith(b"closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="or a folder in it, cannot be read: Permission denied"):
        list(walk(tmp_path))
