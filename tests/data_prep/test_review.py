"""The contact sheet: it shows what it must, names nobody, and what is approved in it passes."""

from __future__ import annotations

import base64
import html
import io
import os
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from PIL import Image

from data_prep import review_sample
from data_prep.dataset import read_info
from data_prep.dicom.gate import LIFTED
from data_prep.dicom.pseudonyms import write_key
from data_prep.dicom.source import Dicom
from data_prep.errors import UserError
from data_prep.images import prepare as prepare_images
from data_prep.options import Options, Running
from data_prep.pictures import Retina
from data_prep.prepare import Summary, prepare
from data_prep.quarantine import REASONS
from data_prep.review import as_jpeg, review
from tests.data_prep.dicom.planted import leaked, plant

Draw = Callable[..., bytes]
DECLINED = ["burned in", "SC", "OP undeclared", "US without regions", "SR", "private"]
KINDS = ["CT", "MR", "enhanced MR", "US", "OP", *DECLINED]


def run_dicom(source: Path, out: Path | str, key: Path, reviewed: Path | None = None, **running: Any) -> Summary:
    summary = prepare(Dicom(source, key, reviewed=reviewed), out, Options(), Running(**running))
    assert isinstance(summary, Summary)
    return summary


@pytest.fixture
def key(tmp_path: Path) -> Path:
    write_key(tmp_path / "key")
    return tmp_path / "key"


@pytest.fixture
def export(tmp_path: Path) -> tuple[Path, list[bytes]]:
    """A PACS export with secrets everywhere, file names too, of which most files are set aside."""
    secrets: list[bytes] = []
    for seed, kind in enumerate(KINDS):
        planted = plant(seed, kind, "ISO_IR 192")
        secrets += planted.sentinels
        path = tmp_path / "export" / planted.name
        path.parent.mkdir(parents=True)
        path.write_bytes(planted.data)
    (tmp_path / "export" / "ZQNODICOM.txt").write_bytes(b"hello")
    return tmp_path / "export", [*secrets, b"ZQNODICOM"]


def text_of(page: Path) -> str:
    """The page without its pictures."""
    return re.sub(r"base64,[^\"]*", "", page.read_text())


def pictures_of(text: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(found))) for found in re.findall(r'base64,([^"]+)"', text)]


def ticks_of(page: Path) -> list[str]:
    return re.findall(r'class="tick" data-instance="([^"]*)"', page.read_text())


def section_of(page: Path, reason: str) -> str:
    return re.search(rf'<section id="{reason}">.*?</section>', page.read_text(), re.S)[0]  # type: ignore[index]


def test_every_reason_is_there_and_no_name_path_or_identifier(
    export: tuple[Path, list[bytes]], tmp_path: Path, key: Path
) -> None:
    source, secrets = export
    run_dicom(source, tmp_path / "out", key)
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    found = review(tmp_path / "out")
    assert before == {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert found.path == tmp_path / "out.private" / "review.html"
    assert stat.S_IMODE(found.path.stat().st_mode) == 0o600
    text = text_of(found.path)
    assert leaked([*secrets, str(tmp_path).encode(), b"export"], text, html.unescape(text)) == []
    info, sha256 = read_info(tmp_path / "out")
    assert set(info.reasons) >= {"burned_in", "secondary_capture", "not_an_image_object", "private_object", "not_dicom"}
    for reason, count in info.reasons.items():
        section = section_of(found.path, reason)
        assert f"<small>{count}</small>" in section
        assert html.escape(REASONS[reason]) in section
        assert ("tick" in section) == (reason in LIFTED)
    assert sha256 in text
    assert "113102" in text
    assert text.count("http") == text.count("http-equiv")  # nothing is fetched
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", found.path.read_text())
    assert all(not picture.info.get("comment") for picture in pictures_of(found.path.read_text()))


def test_what_is_ticked_passes_with_the_saved_file(export: tuple[Path, list[bytes]], tmp_path: Path, key: Path) -> None:
    run_dicom(export[0], tmp_path / "out", key)
    found = review(tmp_path / "out")
    ticks = ticks_of(found.path)
    quarantine = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    liftable = {row["instance"]: row["reason"] for row in quarantine if row["reason"] in LIFTED}
    assert sorted(ticks) == sorted(liftable)
    assert found.liftable == len(ticks) == 4
    approved = [name for name in ticks if liftable[name] != "burned_in"]
    saved = tmp_path / "reviewed.csv"
    saved.write_text("instance\n" + "\n".join(approved) + "\n")  # as the page's script writes it
    run_dicom(export[0], tmp_path / "out", key, reviewed=saved, overwrite=True)
    kept = set(pq.read_table(tmp_path / "out" / "index.parquet").column("instance").to_pylist())
    assert set(approved) <= kept
    assert set(ticks) - kept == set(ticks_of(review(tmp_path / "out").path)) == set(ticks) - set(approved)


def test_of_several_files_of_one_instance_the_one_that_would_be_taken_can_be_ticked(tmp_path: Path, key: Path) -> None:
    captured = pydicom.dcmread(io.BytesIO(plant(1, "SC").data))
    nameless = pydicom.dcmread(io.BytesIO(plant(2, "SC").data))
    del nameless.SOPInstanceUID
    (tmp_path / "in").mkdir()
    for name, file in (("a", captured), ("b", captured), ("c", nameless)):
        file.save_as(tmp_path / "in" / f"{name}.dcm", enforce_file_format=False)
    (tmp_path / "in" / "d.dcm").write_bytes(plant(3, "CT").data)
    run_dicom(tmp_path / "in", tmp_path / "out", key)
    page = review(tmp_path / "out").path
    assert len(ticks_of(page)) == 1
    figures = section_of(page, "secondary_capture").split("<figure>")[1:]
    assert ["tick" in figure for figure in figures] == [True, False, False]
    assert "another file of the instance of no. 0" in figures[1]
    assert "has no instance pseudonym" in figures[2]


def test_the_link_table_names_what_the_plan_set_aside_once_and_for_all(
    export: tuple[Path, list[bytes]], tmp_path: Path, key: Path
) -> None:
    def tables() -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
        links = pq.read_table(tmp_path / "out.private" / "sources.parquet").to_pylist()
        quarantine = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
        return links, {row["number"]: row for row in quarantine}

    run_dicom(export[0], tmp_path / "out", key)
    links, quarantine = tables()
    assert len(links) == len(KINDS) + 1
    for link in links:
        assert (export[0] / link["path"]).is_file()
        assert (link["key"] is None) == (link["number"] in quarantine)
        if link["number"] in quarantine:
            assert (link["reason"], link["pseudonym"]) == (
                quarantine[link["number"]]["message"],
                quarantine[link["number"]]["patient"],
            )
    for seed, kind in ((50, "CT"), (51, "SC"), (52, "MR")):
        (export[0] / f"{seed}.dcm").write_bytes(plant(seed, kind).data)
        run_dicom(export[0], tmp_path / "out", key, append=True) if seed != 51 else None
    links, quarantine = tables()
    assert len({link["number"] for link in links}) == len(links) == len(KINDS) + 4
    assert read_info(tmp_path / "out")[0].sources == len(links)
    assert len(quarantine) == read_info(tmp_path / "out")[0].quarantined
    assert review(tmp_path / "out").liftable == 5


def test_the_same_arguments_give_the_same_page_and_another_seed_another(tree: Path, tmp_path: Path) -> None:
    prepare_images(tree, tmp_path / "out", patient_pattern=r"(\d+)_")
    pages = [review(tmp_path / "out", None, tmp_path / f"{n}.html", 5, seed).path for n, seed in enumerate((0, 0, 1))]
    first, again, other = (page.read_text() for page in pages)
    assert first == again
    assert first != other
    assert len(pictures_of(first)) == 5


def test_rare_kinds_are_shown_and_no_series_fills_the_page(tmp_path: Path, key: Path) -> None:
    volume = pydicom.dcmread(io.BytesIO(plant(1, "CT").data))
    (tmp_path / "in").mkdir()
    for number in range(40):
        volume.SOPInstanceUID = f"1.2.3.{number}"
        volume.SeriesInstanceUID = "1.2.9" if number < 30 else f"1.2.9.{number}"
        if number == 39:
            del volume.WindowCenter, volume.WindowWidth
        volume.save_as(tmp_path / "in" / f"{number:02}.dcm", enforce_file_format=False)
    (tmp_path / "in" / "rare.dcm").write_bytes(plant(2, "MR").data)
    run_dicom(tmp_path / "in", tmp_path / "out", key)
    text = text_of(review(tmp_path / "out", images=8).path)
    records = [html.unescape(found) for found in re.findall(r"<pre>(.*?)</pre>", text, re.S)]
    series = Counter(re.search(r'"series": "(\w+)"', record)[1] for record in records)  # type: ignore[index]
    assert len(records) == 8
    assert max(series.values()) <= 3
    assert "modality MR, anatomy brain" in text
    assert "window percentile:1/99" in text


def test_a_url_gives_the_same_pictures_and_only_some_shards_are_fetched(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_images(tree, tmp_path / "out", shard_size=2, key_file=None)
    url = f"memory://{tmp_path.name}"
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "out"), f"/{tmp_path.name}", recursive=True)
    monkeypatch.setattr(review_sample, "MOST_SHARDS", 5)
    with pytest.raises(UserError, match="--private"):
        review(url)
    found = review(url, tmp_path / "out.private", tmp_path / "page.html")
    text = text_of(found.path)
    assert found.kept == 2 * int(re.search(r"from (\d) of 12 shards", text)[1]) <= 10  # type: ignore[index]
    local = review(tmp_path / "out").path.read_text()
    page = found.path.read_text()
    assert set(re.findall(r'base64,([^"]+)"', page)) < set(re.findall(r'base64,([^"]+)"', local))


def test_the_page_never_goes_into_the_dataset(tree: Path, tmp_path: Path) -> None:
    prepare_images(tree, tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    private = tmp_path / "out.private"
    for page in (tmp_path / "out" / "a.html", tmp_path / "link" / "shards" / "a.html"):
        with pytest.raises(UserError, match="must not leave"):
            review(tmp_path / "out", private, page)
    assert not list((tmp_path / "out").rglob("*.html"))


def test_another_dataset_s_link_table_is_refused(tree: Path, tmp_path: Path) -> None:
    prepare_images(tree, tmp_path / "out")
    (tree / "cat" / "100_left.jpg").unlink(missing_ok=True)
    next(tree.rglob("*.png")).unlink()
    prepare_images(tree, tmp_path / "other")
    with pytest.raises(UserError, match="is not the link table"):
        review(tmp_path / "out", tmp_path / "other.private")


def test_sources_that_are_gone_or_changed_or_arrays_have_no_picture(tmp_path: Path, key: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    names = [b"a-gone.dcm", b"b-changed.dcm", b"c-M\xfcller.dcm"]
    for seed, name in enumerate(names):
        Path(os.fsdecode(os.path.join(os.fsencode(source), name))).write_bytes(plant(seed, "SC").data)
    with zipfile.ZipFile(source / "d.zip", "w") as archive:
        archive.writestr("inside.dcm", plant(7, "SC").data)
    (source / "e.dcm").write_bytes(plant(8, "CT").data)
    run_dicom(source, tmp_path / "out", key)
    assert review(tmp_path / "out").liftable == 4
    (source / "a-gone.dcm").unlink()
    os.utime(source / "b-changed.dcm", (2**33, 2**33))
    page = review(tmp_path / "out").path
    section = section_of(page, "secondary_capture")
    assert len(ticks_of(page)) == section.count("<figure>") == 2
    assert re.search(r"1 without a picture: the source is not there.*?table: 0<", section, re.S)
    assert re.search(r"1 without a picture: the source was changed since.*?table: 1<", section, re.S)


def test_npz_says_that_there_is_no_picture(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8)).astype(np.uint8)
    images[1] = images[0]
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=np.arange(6) % 2)
    prepare_images(tmp_path / "a.npz", tmp_path / "out", drop_duplicates="exact")
    page = review(tmp_path / "out").path
    assert "1 without a picture: it is an array" in section_of(page, "duplicate")
    assert len(pictures_of(page.read_text())) == 5


def test_a_photograph_that_was_set_aside_is_shown_without_its_comment(tmp_path: Path, draw: Draw) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "ZQNAME_1.jpg").write_bytes(draw(1, "JPEG", size=(90, 80), comment=b"ZQCOMMENT"))
    disc = Image.new("RGB", (256, 256))
    values = np.random.default_rng(0).integers(60, 200, (64, 64, 3)).astype(np.uint8)
    inside = np.hypot(*(np.indices((256, 256)) - 127.5)) < 120
    photograph = Image.fromarray(values).resize((256, 256), Image.Resampling.BICUBIC)
    disc.paste(photograph, mask=Image.fromarray(inside))
    disc.save(tmp_path / "in" / "ZQNAME_2.png")
    prepare(Retina(tmp_path / "in"), tmp_path / "out", Options(), Running())
    found = review(tmp_path / "out")
    assert (found.kept, found.set_aside, found.liftable) == (1, 1, 0)
    pictures = re.findall(r'base64,([^"]+)"', found.path.read_text())
    assert leaked([b"ZQNAME", b"ZQCOMMENT"], text_of(found.path), *map(base64.b64decode, pictures)) == []


def test_sixteen_bits_are_shown_by_percentiles() -> None:
    ramp = np.linspace(20_000, 20_400, 10_000).astype(np.uint16).reshape(100, 100)
    ramp[0, 0] = 65_535
    shown = np.asarray(Image.open(io.BytesIO(as_jpeg(Image.fromarray(ramp), 512))))
    assert shown.dtype == np.uint8
    assert int(shown[50, 50]) == pytest.approx(128, abs=6)
    assert shown[-1, -1] > 245
    assert Image.open(io.BytesIO(as_jpeg(Image.fromarray(ramp), 20))).size == (20, 20)


def test_words_of_a_dataset_are_no_markup(tmp_path: Path, draw: Draw) -> None:
    for number, name in enumerate(("<script>alert(1)</script>".replace("/", "\N{DIVISION SLASH}"), 'x" onload="y')):
        folder = tmp_path / "in" / name
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(draw(number))
    prepare_images(tmp_path / "in", tmp_path / "out")
    text = text_of(review(tmp_path / "out").path)
    assert "&lt;script&gt;alert(1)" in text
    assert "<script>alert" not in text
    assert 'x" onload' not in text
