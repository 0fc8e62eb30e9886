"""A prepared dataset: the same bytes however it was made, readable by others, and there whole or not at all."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from nvidia.dali import fn, pipeline_def
from PIL import Image, PngImagePlugin

from data_prep.dataset import Dataset, read_info
from data_prep.errors import UserError
from data_prep.images import prepare
from data_prep.verify import verify

Draw = Callable[..., bytes]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_any_number_of_workers_and_any_place_gives_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    options = {"patient_pattern": r"(\d+)_", "split": {"train": 0.6, "val": 0.4}, "shard_size": 4, "seed": 1}
    prepare(tree, tmp_path / "one", workers=1, **options)  # type: ignore[arg-type]
    moved = tree.rename(tmp_path / "elsewhere")
    for file in moved.rglob("*.*"):
        os.utime(file, (0, 0))
    prepare(moved, tmp_path / "deep" / "two", workers=2, **options)  # type: ignore[arg-type]
    assert contents(tmp_path / "one") == contents(tmp_path / "deep" / "two")
    assert not verify(tmp_path / "one")
    seeded = {**options, "seed": 2}
    prepare(moved, tmp_path / "other", **seeded)  # type: ignore[arg-type]
    assert contents(tmp_path / "one") != contents(tmp_path / "other")


def test_every_image_arrives_with_its_label_patient_and_split(tree: Path, tmp_path: Path) -> None:
    summary = prepare(tree, tmp_path / "out", patient_pattern=r"(\d+)_", split={"train": 0.6, "val": 0.4}, seed=1)
    dataset = Dataset.open(tmp_path / "out")
    links = pq.read_table(summary.private / "sources.parquet").to_pylist()
    by_key = {row["key"]: row for row in links}
    homes: dict[str, set[str]] = {}
    names = dataset.label_names("class")
    images = dataset.read(np.arange(len(dataset)))
    assert len(dataset) == 24
    for row, found in enumerate(dataset.index.to_pylist()):
        link = by_key[found["key"]]
        original = Image.open(tree / link["path"])
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(images[row].tobytes()))), np.asarray(original))
        assert (dataset.sizes[row].tolist(), names[dataset.labels("class")[row]]) == (
            [original.height, original.width],
            link["path"].split("/")[0],
        )
        assert link["path"].split("/")[1].split("_")[0] == link["patient"]
        assert link["pseudonym"] == found["patient"]
        homes.setdefault(found["patient"], set()).add(found["split"])
    assert len(homes) == 10
    assert all(len(splits) == 1 for splits in homes.values())
    assert (summary.private.stat().st_mode & 0o777) == 0o700


def test_reader_answers_and_errors(tree: Path, tmp_path: Path) -> None:
    prepare(tree, tmp_path / "out", split={"train": 0.5, "val": 0.5}, shard_size=5)
    dataset = Dataset.open(tmp_path / "out")
    rows = np.concatenate([dataset.rows("train"), dataset.rows("val")])
    assert sorted(rows.tolist()) == dataset.rows().tolist() == list(range(24))
    assert rows.dtype == np.int64
    with pytest.raises(UserError, match=r"split 'vla'; it has train \(\d+ images\), val"):
        dataset.rows("vla")
    with pytest.raises(UserError, match="no label 'clas'; did you mean 'class'"):
        dataset.labels("clas")
    assert dataset.labels("class").dtype == np.int32
    assert dataset.bit_depth == 8
    assert dataset.channels == 3
    shards = [shard.name for shard in dataset.info.shards]
    assert shards == sorted(shards)
    assert [shards[i] for i in dataset.shard_ids] == dataset.index.column("shard").to_pylist()
    view = dataset.read(np.array([3]))[0]
    assert view.dtype == np.uint8
    assert not view.flags.owndata
    again = pickle.loads(pickle.dumps(dataset))
    assert again.sha256 == dataset.sha256
    assert np.array_equal(again.read([3])[0], view)


def test_webdataset_and_dali_read_it_unchanged(tree: Path, tmp_path: Path) -> None:
    prepare(tree, tmp_path / "out", shard_size=10)
    dataset = Dataset.open(tmp_path / "out")
    shards = [str(tmp_path / "out" / "shards" / shard.name) for shard in dataset.info.shards]
    images = [image.tobytes() for image in dataset.read(dataset.rows())]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample.get("jpg") or sample.get("png") for sample in samples] == images
    assert [sample["__key__"] for sample in samples] == dataset.index.column("key").to_pylist()
    assert all(b'"labels":{"class":' in sample["json"] for sample in samples)

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def pipeline() -> object:
        indexes = [shard.replace(".tar", ".idx") for shard in shards]
        image, record = fn.readers.webdataset(
            paths=shards,
            index_paths=indexes,
            ext=["jpg;png", "json"],
            missing_component_behavior="error",
            name="reader",
        )
        return image, record

    reader = pipeline()
    reader.build()
    assert reader.epoch_size("reader") == len(dataset)
    assert [bytes(reader.run()[0].at(0)) for _ in range(len(dataset))] == images


def test_no_identifier_leaves(tmp_path: Path, draw: Draw) -> None:
    root = tmp_path / "SENTINELroot"
    lines = ["path,patient,finding"]
    for number in range(12):
        name, patient = f"SENTINELfile{number}", f"SENTINELmrn{number % 5}"
        folder = root / "SENTINELdir"
        folder.mkdir(parents=True, exist_ok=True)
        tags = Image.Exif()
        tags[0x010E] = f"SENTINELexif{number}"
        tags[0x0112] = 6 if number % 3 == 0 else 1
        info = PngImagePlugin.PngInfo()
        info.add_text("Name", f"SENTINELtext{number}")
        if number % 4 == 0:
            data, ending = draw(number, "PNG", pnginfo=info, exif=tags), "png"
        elif number % 4 == 1:
            data, ending = draw(number, "TIFF", description=f"SENTINELtiff{number}"), "tif"
        else:
            comment = f"SENTINELcom{number}"
            xmp = f"<x>SENTINELxmp{number}</x>".encode()
            data, ending = draw(number, "JPEG", exif=tags, comment=comment, xmp=xmp), "jpg"
        if number == 11:
            data = data[:-50]  # quarantined, and its reason must not tell the name either
        assert b"SENTINEL" in data
        (folder / f"{name}.{ending}").write_bytes(data)
        lines.append(f"SENTINELdir/{name}.{ending},{patient},{'ill' if number % 2 else 'well'}")
    (root / "list.csv").write_text("\n".join(lines))
    labels = tmp_path / "SENTINELlabels.yaml"
    labels.write_text('"*": {modality: MR}')
    for resize in (None, 16):
        out = tmp_path / f"out{resize}"
        summary = prepare(root / "list.csv", out, resize=resize, labels=str(labels), seed=987654321)
        assert summary.info.reasons == {"truncated": 1}
        for name, data in contents(out).items():
            assert b"SENTINEL" not in data, name
            assert b"987654321" not in data, name  # with the seed, guessed ids could be tried
            assert "SENTINEL" not in name
        for name in ("index.parquet", "quarantine.parquet"):
            table = pq.read_table(out / name)
            assert "SENTINEL" not in str(table.to_pylist()) + str(table.schema.metadata)
        for image in Dataset.open(out).read(np.arange(11)):
            opened = Image.open(io.BytesIO(image.tobytes()))
            assert not opened.getexif()
            assert not set(opened.info) - {"jfif", "jfif_version", "jfif_unit", "jfif_density", "dpi"}
        assert "SENTINELmrn0" in str(pq.read_table(summary.private / "sources.parquet").to_pylist())


def test_bad_files_are_quarantined_and_the_rest_goes_on(tree: Path, tmp_path: Path, draw: Draw) -> None:
    good = draw(99, "JPEG")
    bad = {"cut.jpg": good[:-9], "text.jpg": b"hello", "none.png": b"", "thumbs.db": bytes(100)}
    for name, data in bad.items():
        (tree / "cat" / name).write_bytes(data)
    (tree / "cat" / "gone.jpg").symlink_to(tree / "nowhere.jpg")
    summary = prepare(tree, tmp_path / "out")
    assert summary.info.reasons == {"truncated": 1, "not_an_image": 2, "empty": 1, "unreadable": 1}
    assert summary.info.samples == 24
    quarantine = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert [row["number"] for row in quarantine] == sorted(row["number"] for row in quarantine)
    links = {row["number"]: row for row in pq.read_table(summary.private / "sources.parquet").to_pylist()}
    assert {links[row["number"]]["path"] for row in quarantine} == {f"cat/{name}" for name in (*bad, "gone.jpg")}
    assert not verify(tmp_path / "out")


def test_nothing_usable_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.txt").write_text("no image")
    with pytest.raises(UserError, match=r"none of the 1 images can be used \(not_an_image 1\)"):
        prepare(tmp_path / "src", tmp_path / "out")
    assert os.listdir(tmp_path) == ["src"]


def test_mixed_bit_depths_are_refused_before_anything_appears(tree: Path, tmp_path: Path, draw: Draw) -> None:
    (tree / "cat" / "deep.png").write_bytes(draw(1, "PNG", mode="I;16"))
    with pytest.raises(UserError, match=r"8 bits .* and of 16 bits .* are mixed"):
        prepare(tree, tmp_path / "out", shard_size=3)
    assert os.listdir(tmp_path) == ["tree"]


def test_16_bit_images_stay_exact(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 2**16, (5, 12, 9)).astype(np.uint16)
    np.savez(tmp_path / "x.npz", train_images=images, train_labels=np.arange(5) % 2)
    summary = prepare(tmp_path / "x.npz", tmp_path / "out", workers=2, shard_size=3)
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.bit_depth == 16
    links = {row["key"]: row for row in pq.read_table(summary.private / "sources.parquet").to_pylist()}
    for key, image in zip(dataset.index.column("key").to_pylist(), dataset.read(dataset.rows()), strict=True):
        decoded = np.asarray(Image.open(io.BytesIO(image.tobytes())))
        assert np.array_equal(decoded, images[links[key]["number"]])
    assert dataset.info.statistics is not None
    assert dataset.info.statistics.mean == pytest.approx([images.mean() / 65535], abs=1e-6)
    assert dataset.info.statistics.std == pytest.approx([images.std() / 65535], abs=1e-6)


def test_mean_and_std_count_gray_images_in_every_channel(tmp_path: Path, draw: Draw) -> None:
    root = tmp_path / "src"
    root.mkdir()
    for number in range(6):
        (root / f"{number}.png").write_bytes(draw(number, "PNG", mode="RGB" if number % 2 else "L"))
    info = prepare(root, tmp_path / "out").info
    stack = np.stack([np.asarray(Image.open(root / f"{number}.png").convert("RGB")) for number in range(6)]) / 255
    assert info.statistics is not None
    assert info.statistics.mean == pytest.approx(stack.mean(axis=(0, 1, 2)).tolist(), abs=1e-6)
    assert info.statistics.std == pytest.approx(stack.std(axis=(0, 1, 2)).tolist(), abs=1e-6)


@pytest.mark.parametrize("option", ["workers", "shard_size", "resize"])
def test_a_number_below_one_is_refused(tree: Path, tmp_path: Path, option: str) -> None:
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} must be at least 1, not 0"):
        prepare(tree, tmp_path / "out", **{option: 0})  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == ["tree"]


def test_only_our_own_output_is_replaced_and_only_when_asked(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="will not be overwritten"):
        prepare(tree, out, overwrite=True)
    assert contents(out) == {"thesis.txt": b"years of work"}
    (out / "thesis.txt").unlink()
    prepare(tree, out)  # an empty folder is nobody's
    before = contents(out)
    with pytest.raises(UserError, match="--overwrite replaces it"):
        prepare(tree, out, seed=5)
    assert contents(out) == before
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"also holds notes\.txt"):
        prepare(tree, out, seed=5, overwrite=True)
    (out / "notes.txt").unlink()
    prepare(tree, out, seed=5, overwrite=True)
    assert contents(out) != before
    assert sorted(os.listdir(tmp_path)) == ["out", "out.private", "tree"]
    with pytest.raises(UserError, match="lie inside each other"):
        prepare(tree, tree / "out")


def test_an_index_that_does_not_match_its_shards_is_named_on_opening(tree: Path, tmp_path: Path) -> None:
    prepare(tree, tmp_path / "a", shard_size=8)
    shard = tmp_path / "a" / "shards" / "train-00001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"index does not match its shards: shards/train-00001\.tar has"):
        Dataset.open(tmp_path / "a")
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00001\.tar is missing"):
        Dataset.open(tmp_path / "a")
    shard.write_bytes(data)
    prepare(tree, tmp_path / "b", shard_size=8, seed=3)
    (tmp_path / "a" / "index.parquet").write_bytes((tmp_path / "b" / "index.parquet").read_bytes())
    with pytest.raises(UserError, match=r"index\.parquet was changed"):
        Dataset.open(tmp_path / "a")
    with pytest.raises(UserError, match="is no prepared dataset"):
        read_info(tree)


def test_trusted_images_give_the_same_shards(tree: Path, tmp_path: Path) -> None:
    prepare(tree, tmp_path / "a")
    prepare(tree, tmp_path / "b", trust_images=True)
    first, second = contents(tmp_path / "a"), contents(tmp_path / "b")
    # Fingerprints, which stand in the index, are of the pixels in one and of the files in the other.
    assert {name for name in first if first[name] != second[name]} == {"dataset.json", "index.parquet"}


def test_real_fundus_mednist_and_breastmnist(real_data: Path, tmp_path: Path) -> None:
    files = (
        sorted((real_data / "fundus").glob("*/*.jpg"))[::40] + sorted((real_data / "mednist").glob("*/*.jpeg"))[::200]
    )
    for file in files:
        place = tmp_path / file.relative_to(real_data)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(file)
    pattern = r"(\d+)_(?:left|right)"
    split = {"train": 0.6, "val": 0.4}
    fundus = prepare(tmp_path / "fundus", tmp_path / "f", labels="fundus", patient_pattern=pattern, split=split)
    assert fundus.info.patients.images_without == 0
    mednist = prepare(tmp_path / "mednist", tmp_path / "m", labels="mednist", resize=32)
    dataset = Dataset.open(mednist.out)
    assert (dataset.labels("modality") >= 0).all()
    assert (dataset.sizes == 32).all()
    breast = prepare(real_data / "breastmnist" / "breastmnist.npz", tmp_path / "b", labels="breastmnist")
    assert breast.info.splits == {"test": 156, "train": 546, "val": 78}
    assert not verify(fundus.out)
    assert not verify(mednist.out)
    (found,) = verify(breast.out)  # as published
    assert "images in two splits: 1, such as" in found.message
