"""A sample that does not decode is replaced alike by every rank and every run, and nothing else changes."""

from __future__ import annotations

import io
import json
import logging
import random
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.dataset import SHARDS, Dataset
from data_prep.errors import WorkFailed
from medpretrain.data import batches
from medpretrain.data.batches import Share, Stream, plain_batches
from medpretrain.data.mixture import Mixture
from medpretrain.data.order import InOrder
from medpretrain.data.pipeline import CropPipeline, DecodeError, undecodable
from medpretrain.data.replace import Replacements
from medpretrain.data.views import Blur, Jitter, View

CPU = torch.device("cpu")
LABELS = ["class", "modality"]
PLAIN = {"whole": View(size=32)}
AUGMENTED = {"crop": View(size=24, count=2, crop=(0.3, 1.0), flip=0.5, jitter=Jitter(contrast=0.4), blur=Blur())}


@pytest.fixture
def damaged(small_dataset, tmp_path):
    """A copy of the small dataset, and how to overwrite images of it where they lie."""
    folder = tmp_path / "damaged"
    shutil.copytree(small_dataset, folder)
    return Damaged(folder)


class Damaged:
    def __init__(self, folder):
        self.folder = folder
        self.dataset = Dataset.open(folder)
        self.train = self.dataset.rows("train")

    def place(self, row):
        """The shard's path, where the image begins in it, and its length."""
        shard, _ = self.dataset.sample_name(row)
        offset, length = (self.dataset.index.column(name)[row].as_py() for name in ("offset", "length"))
        return self.folder / SHARDS / shard, offset, length

    def overwrite(self, rows, how="random"):
        for row in rows:
            path, offset, length = self.place(row)
            image = self.dataset.read([row])[0]
            made = {
                "random": np.random.default_rng(row).bytes(length),
                "zeros": bytes(length),
                "half": bytes(image[: length // 2]).ljust(length, b"\0"),
                "other size": png(np.zeros((9, 9), np.uint8)).ljust(length, b"\0"),
            }[how]
            assert len(made) == length
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(made)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def stream(folder, views=PLAIN, **options):
    settings = {
        "split": "train",
        "seed": 3,
        "global_batch": 12,
        "channels": 1,
        "mean": [0.0],
        "std": [1.0],
        "threads": 1,
        "labels": LABELS,
        "replace_limit": 100,
        "device": CPU,
    }
    return Stream(Mixture.open([folder]), views, **settings | options)


def take(one, start, count):
    made = one.batches(start)
    taken = [next(made) for _ in range(count)]
    made.close()
    return taken


def said(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def replacement(dataset, labels, rows, bad, row):
    """By the rule, one row after another."""
    place = rows.tolist().index(row)
    for other in [*rows[place + 1 :], *rows[:place]]:
        if other not in bad and all(dataset.labels(name)[other] == dataset.labels(name)[row] for name in labels):
            return int(other)
    return None


def expected_rows(dataset, bad, sample, labels=LABELS):
    rows = dataset.rows("train")
    return [
        replacement(dataset, labels, rows, bad, row) if row in bad else row for row in rows[np.asarray(sample)].tolist()
    ]


def remembered(folder, bad, labels=LABELS, limit=100, listing=None):
    """Replacements of a decoder that refuses some rows."""
    dataset = Mixture.open([folder])
    refused = {image.tobytes() for image in dataset.read(np.array(sorted(bad), dtype=np.int64))}
    rows = dataset.rows("train")
    ids = np.stack([np.zeros_like(rows), *(dataset.labels(name)[rows] for name in labels)])

    def decoder(images, sizes):
        return {number: "bad" for number, image in enumerate(images) if image.tobytes() in refused}

    return Replacements(dataset, rows, ids, decoder, limit, listing), refused


@pytest.mark.parametrize("labels", [LABELS, []])
def test_what_is_seen_instead_does_not_depend_on_what_was_found_first(labels, small_dataset):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    dataset = Dataset.open(small_dataset)
    rows = dataset.rows("train")
    bad = set(draw.sample(rows.tolist(), len(rows) // 2))
    expected = expected_rows(dataset, bad, np.arange(len(rows)), labels)
    for _ in range(3):
        found, _ = remembered(small_dataset, bad, labels)
        for row in draw.sample(rows.tolist(), len(rows)):
            found.inspect(found.seen(np.array([row])), step=0)
        assert found.seen(rows).tolist() == expected
        assert len(found) == len(bad)


def test_where_the_replacement_goes_bad_later_the_next_takes_its_place(small_dataset):
    dataset = Dataset.open(small_dataset)
    rows = dataset.rows("train")
    first = int(rows[5])
    bad = {first}
    found, refused = remembered(small_dataset, bad)
    assert found.inspect(np.array([first]), 0)
    for _ in range(3):
        (stands_in,) = found.seen(np.array([first])).tolist()
        assert stands_in == replacement(dataset, LABELS, rows, bad, first)
        bad.add(stands_in)
        refused.add(dataset.read([stands_in])[0].tobytes())
        assert found.inspect(found.seen(np.array([first])), 0)


def test_without_another_image_of_its_labels_the_sample_is_named(small_dataset):
    dataset = Dataset.open(small_dataset)
    rows = dataset.rows("train")
    alike = rows[dataset.labels("class")[rows] == dataset.labels("class")[rows[0]]].tolist()
    found, _ = remembered(small_dataset, set(alike))
    shard, key = dataset.sample_name(alike[0])
    with pytest.raises(WorkFailed, match=rf"image {key} of .*{shard} does not decode .*no other image with its labels"):
        found.inspect(np.array(alike[:1]), 0)


def test_beyond_the_limit_shards_are_named_with_their_counts(small_dataset):
    dataset = Dataset.open(small_dataset)
    rows = dataset.rows("train")
    shards = dataset.shard_ids[rows]
    bad = [*rows[shards == shards[0]][:3].tolist(), int(rows[shards != shards[0]][0])]
    enough, _ = remembered(small_dataset, set(bad), limit=4)
    enough.inspect(rows, 0)
    assert len(enough) == 4
    too_few, _ = remembered(small_dataset, set(bad), limit=3)
    with pytest.raises(WorkFailed) as raised:
        too_few.inspect(rows, 0)
    for part in (
        "more images do not decode than faults.replaced_samples=3",
        f"{dataset.sample_name(bad[0])[0]} (3)",
        f"{dataset.sample_name(bad[3])[0]} (1)",
        f"'medpretrain prep verify {small_dataset}'",
    ):
        assert part in str(raised.value)


def test_each_is_listed_once_though_the_run_is_resumed_and_warned_of(small_dataset, tmp_path, caplog):
    dataset = Dataset.open(small_dataset)
    rows = dataset.rows("train")
    bad = set(rows[[4, 9]].tolist())
    for _ in range(2):
        found, _ = remembered(small_dataset, bad, listing=tmp_path / "run" / "replaced.jsonl")
        with caplog.at_level(logging.WARNING):
            found.inspect(rows, step=7)
    lines = said(tmp_path / "run" / "replaced.jsonl")
    assert [line["row"] for line in lines] == sorted(bad)
    for line in lines:
        shard, key = dataset.sample_name(line["row"])
        instead = replacement(dataset, LABELS, rows, bad, line["row"])
        assert line == {
            "row": line["row"],
            "replacement": instead,
            "step": 7,
            "dataset": 0,
            "shard": shard,
            "key": key,
            "error": "bad",
        }
    assert len(caplog.records) == 4
    assert dataset.sample_name(min(bad))[1] in caplog.text


@pytest.mark.parametrize("how", ["random", "zeros", "half", "other size"])
def test_the_replacement_is_seen_and_no_batch_is_lost_or_delivered_twice(how, damaged, small_dataset, tmp_path):
    bad = set(damaged.train[[3, 4, 5, 17, 40]].tolist())
    damaged.overwrite(bad, how)
    clean = take(stream(small_dataset), 0, 8)
    one = stream(damaged.folder, trace=tmp_path / "trace", replaced=tmp_path / "replaced")
    made = take(one, 0, 8)
    assert [batch.step for batch in made] == list(range(8))
    for batch, was, line in zip(made, clean, said(tmp_path / "trace")[:8], strict=True):
        rows = expected_rows(damaged.dataset, bad, batch.samples.numpy())
        assert line["sample"] == rows
        assert line.get("in_place_of", rows) == damaged.train[batch.samples.numpy()].tolist()
        images = plain_batches(
            damaged.dataset, np.array(rows), size=32, channels=1, mean=[0.0], std=[1.0], batch=12, device=CPU
        )
        assert torch.equal(batch.micro[0]["whole"][0], torch.cat(list(images)))
        assert torch.equal(batch.samples, was.samples)
        for name in LABELS:
            assert torch.equal(batch.labels[name], was.labels[name])
            assert batch.labels[name].tolist() == damaged.dataset.labels(name)[rows].tolist()
    assert one.replaced == len(bad) == len(said(tmp_path / "replaced"))


@pytest.mark.parametrize(("world", "micro_batches"), [(1, 3), (2, 1), (2, 2), (3, 2)])
def test_ranks_micro_batches_and_a_later_start_see_the_same(world, micro_batches, damaged):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    damaged.overwrite(random.Random(seed).sample(damaged.train.tolist(), 12))
    expected = take(stream(damaged.folder, AUGMENTED), 0, 6)[2:]
    parts = [
        take(stream(damaged.folder, AUGMENTED, share=Share(rank, world, micro_batches)), 2, 4) for rank in range(world)
    ]
    for turn, batch in enumerate(expected):
        for number, images in enumerate(batch.micro[0]["crop"]):
            shared = [micro["crop"][number] for part in parts for micro in part[turn].micro]
            assert torch.equal(torch.cat(shared), images)
        for part in parts:
            assert all(torch.equal(part[turn].labels[name], batch.labels[name]) for name in LABELS)


def test_augmentations_of_all_other_samples_stay_as_they_were(damaged, small_dataset):
    bad = set(damaged.train[[8, 30]].tolist())
    damaged.overwrite(bad)
    replaced = 0
    for batch, was in zip(
        take(stream(damaged.folder, AUGMENTED), 0, 5), take(stream(small_dataset, AUGMENTED), 0, 5), strict=True
    ):
        same = ~np.isin(damaged.train[batch.samples.numpy()], list(bad))
        replaced += (~same).sum()
        for images, before in zip(batch.micro[0]["crop"], was.micro[0]["crop"], strict=True):
            alike = [torch.equal(a, b) for a, b in zip(images, before, strict=True)]
            assert alike == same.tolist()
    assert replaced >= 2


def test_draws_are_those_of_the_sample_and_the_size_is_that_of_the_image_in_its_place(damaged, tmp_path):
    bad = set(damaged.train[[8, 30]].tolist())
    damaged.overwrite(bad)
    one = stream(damaged.folder, AUGMENTED, trace=tmp_path / "trace")
    take(one, 0, 5)
    replaced = 0
    for line in said(tmp_path / "trace")[:5]:
        places = one.order.step(line["step"], 12)
        rows = np.array(expected_rows(damaged.dataset, bad, places.sample))
        digests = [chosen.digest() for _, chosen in one.parameters(places, rows)]
        assert line["parameters"] == np.bitwise_xor.reduce(digests).tolist()
        before = damaged.train[places.sample]
        replaced += (one.dataset.sizes[before] != one.dataset.sizes[rows]).any(axis=1).sum()
    assert replaced


def test_a_shard_that_becomes_shorter_while_it_is_open_kills_nobody(damaged):
    shards = damaged.dataset.shard_ids[damaged.train]
    last = damaged.train[shards == shards[0]].tolist()[-3:]
    one, again = stream(damaged.folder), stream(damaged.folder)
    made = one.batches(0)
    next(made)
    path, offset, length = damaged.place(last[0])
    with path.open("r+b") as file:
        file.truncate(offset + length // 2)
    later = [next(made) for _ in range(10)]  # two epochs and more
    made.close()
    assert one.replaced == 3
    for batch, expected in zip(later[4:], take(again, 5, 6), strict=True):
        assert torch.equal(batch.micro[0]["whole"][0], expected.micro[0]["whole"][0])


def test_a_shard_put_right_by_another_file_is_read_again(damaged, small_dataset):
    first = damaged.train.tolist()[0]
    path, offset, _ = damaged.place(first)
    damaged.dataset.read([first])  # it is open now
    with path.open("r+b") as file:
        file.truncate(offset)
    with pytest.raises(OSError, match=r"ends \d+ bytes too early"):
        damaged.dataset.read([first])
    path.unlink()
    shutil.copy(small_dataset / SHARDS / path.name, path)
    assert np.array_equal(damaged.dataset.read([first])[0], Dataset.open(small_dataset).read([first])[0])


def test_a_missing_shard_stops_the_run_by_name(damaged):
    one = stream(damaged.folder)
    path, *_ = damaged.place(damaged.train[0])
    path.unlink()
    with pytest.raises(WorkFailed, match=rf"{path.name} cannot be opened any more: No such file"):
        take(one, 0, 8)
    assert one.replaced == 0


def test_by_default_a_stream_replaces_nothing(damaged):
    damaged.overwrite([damaged.train[7]])
    with pytest.raises(WorkFailed, match=r"more images do not decode than faults\.replaced_samples=0"):
        take(stream(damaged.folder, replace_limit=0), 0, 8)


def test_an_error_that_no_image_has_by_itself_is_raised(damaged, monkeypatch):
    damaged.overwrite([damaged.train[7]])
    monkeypatch.setattr(batches, "undecodable", lambda images, sizes, **_: {})
    with pytest.raises(DecodeError):
        take(stream(damaged.folder), 0, 8)


@pytest.mark.parametrize(
    "message",
    [
        "Some other text",
        "Error in GPU operator `nvidia.dali.fn.resize`,\n\nencountered:\n\nCan't decode",
        "Error in MIXED operator `nvidia.dali.fn.decoders.image`,\n\nencountered:\n\nCUDA runtime API error",
        "Error in MIXED operator `nvidia.dali.fn.decoders.image`,\n\nencountered:\n\nCan't allocate 99 bytes",
        "Error in CPU operator `nvidia.dali.fn.decoders.image`,\n\nencountered:\n\nout of memory",
    ],
)
def test_other_failures_are_not_taken_for_a_bad_image(message, monkeypatch):
    pipeline = CropPipeline(iter(()), sizes=[8], batch=1, channels=1, bit_depth=8, device=CPU, threads=1, ahead=1)

    class Failing:
        def run(self):
            raise RuntimeError(message)

    monkeypatch.setattr(pipeline, "_pipeline", Failing())
    with pytest.raises(RuntimeError) as raised:
        next(iter(pipeline))
    assert type(raised.value) is RuntimeError


def test_a_survey_sees_the_same_replacements(damaged):
    bad = set(damaged.train[[0, 1, 20]].tolist())
    damaged.overwrite(bad)
    count = len(damaged.train)
    surveyed = take(stream(damaged.folder, order=InOrder(count), global_batch=10), 0, -(-count // 10))
    images = torch.cat([batch.micro[0]["whole"][0] for batch in surveyed])[:count]
    rows = expected_rows(damaged.dataset, bad, np.arange(count))
    expected = plain_batches(
        damaged.dataset, np.array(rows), size=32, channels=1, mean=[0.0], std=[1.0], batch=10, device=CPU
    )
    assert torch.equal(images, torch.cat(list(expected)))


@pytest.mark.parametrize("how", ["random", "other size", "short"])
def test_an_evaluation_replaces_nothing_and_names_the_image(how, damaged):
    rows = damaged.dataset.rows("test")
    bad = int(rows[11])
    if how == "short":
        path, offset, _ = damaged.place(bad)
        with path.open("r+b") as file:
            file.truncate(offset + 1)
    else:
        damaged.overwrite([bad], how)
    images = plain_batches(damaged.dataset, rows, size=32, channels=1, mean=[0.0], std=[1.0], batch=4, device=CPU)
    shard, key = damaged.dataset.sample_name(bad)
    with pytest.raises(WorkFailed, match=rf"image {key} of .*{shard} does not decode .*'medpretrain prep verify .*'"):
        list(images)


def corrupt_crc(data):
    at = data.index(b"IDAT")
    (length,) = struct.unpack(">I", data[at - 4 : at])
    assert zlib.crc32(data[at : at + 4 + length]) == struct.unpack(">I", data[at + 4 + length : at + 8 + length])[0]
    return data[: at + 4 + length] + bytes(4) + data[at + 8 + length :]


@pytest.mark.parametrize(("kind", "bit_depth"), [("JPEG", 8), ("PNG", 8), ("PNG", 16), ("TIFF", 8), ("TIFF", 16)])
def test_what_is_cut_empty_or_of_another_size_does_not_decode(kind, bit_depth):
    pixels = np.random.default_rng(0).integers(0, 2**bit_depth, (40, 30)).astype(f"uint{bit_depth}")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    good = buffer.getvalue()
    cases = [
        (good, (40, 30)),
        (good, (30, 40)),
        (good[: len(good) // 2], (40, 30)),
        (b"", (40, 30)),
        (bytes(len(good)), (40, 30)),
        (good, (40, 30)),
    ]
    cases += [(corrupt_crc(good), (40, 30))] if kind == "PNG" else []
    images = [np.frombuffer(data, np.uint8) for data, _ in cases]
    sizes = np.array([size for _, size in cases], dtype=np.int32)
    found = undecodable(images, sizes, channels=1, bit_depth=bit_depth, device=CPU)
    assert sorted(found) == [number for number in range(len(cases)) if number not in (0, 5)]
    assert found[1] == "it has 30 x 40 pixels, and the index says 40 x 30"
    assert all("\n" not in why for why in found.values())
