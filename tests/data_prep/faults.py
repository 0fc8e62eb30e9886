"""Faults of a dataset: by accident, by hand, and by a careful forger. Each changes it, and says how."""

from __future__ import annotations

import io
import itertools
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from data_prep.dataset import index_schema
from data_prep.shard import members
from tests.data_prep.forger import Row, put_together, read_json, read_rows, rehash, take_apart, write_json, write_rows


def any_file(dataset: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(file for file in dataset.rglob("*") if file.is_file()))


def two_shards(dataset: Path, rng: random.Random) -> tuple[Path, Path]:
    one, two = rng.sample(sorted((dataset / "shards").glob("*.tar")), 2)
    return one, two


def flip(dataset: Path, rng: random.Random) -> str:
    file = any_file(dataset, rng)
    data = bytearray(file.read_bytes())
    place = rng.randrange(len(data))
    data[place] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return f"{file.name} at {place}"


def cut(dataset: Path, rng: random.Random) -> str:
    file = any_file(dataset, rng)
    os.truncate(file, rng.randrange(file.stat().st_size))
    return file.name


def grow(dataset: Path, rng: random.Random) -> str:
    file = any_file(dataset, rng)
    with file.open("ab") as handle:
        handle.write(rng.randbytes(rng.choice((1, 512, 1024))) if rng.random() < 0.5 else bytes(1024))
    return file.name


def lose(dataset: Path, rng: random.Random) -> str:
    file = any_file(dataset, rng)
    file.unlink()
    return file.name


def exchange(dataset: Path, rng: random.Random) -> str:
    one, two = two_shards(dataset, rng)
    for a, b in ((one, two), (one.with_suffix(".idx"), two.with_suffix(".idx"))):
        first, second = a.read_bytes(), b.read_bytes()
        a.write_bytes(second)
        b.write_bytes(first)
    return f"{one.name} {two.name}"


def exchange_rehashed(dataset: Path, rng: random.Random) -> str:
    said = exchange(dataset, rng)
    content = read_json(dataset)
    for shard in content["shards"]:
        shard["samples"] = sum(1 for _ in members(dataset / "shards" / shard["name"])) // 2
    write_json(dataset, content)
    rehash(dataset)
    return said


def extra(dataset: Path, rng: random.Random) -> str:
    shard = rng.choice(sorted((dataset / "shards").glob("*.tar")))
    new = shard.with_name(f"{shard.name[:-9]}{rng.randrange(90, 99_999):05d}.tar")
    shutil.copy(shard, new)
    if rng.random() < 0.5:
        shutil.copy(shard.with_suffix(".idx"), new.with_suffix(".idx"))
    return new.name


def extra_rehashed(dataset: Path, rng: random.Random) -> str:
    shard = rng.choice(read_json(dataset)["shards"])
    new = f"{shard['name'][:-9]}99999.tar"
    for ending in (".tar", ".idx"):
        old = (dataset / "shards" / shard["name"]).with_suffix(ending)
        shutil.copy(old, (dataset / "shards" / new).with_suffix(ending))
    content = read_json(dataset)
    content["shards"] = sorted([*content["shards"], {**shard, "name": new}], key=lambda entry: str(entry["name"]))
    write_json(dataset, content)
    return new


def other(row: Row, column: str, rows: list[Row], rng: random.Random) -> Any:
    """A value of a column that is not the row's."""
    value = row[column]
    if column == "key":
        return rng.choice([f"{int(value[:9]) + 1000:09d}", value + "0", "x" + value[1:]])
    if column == "offset":
        return value + rng.choice((-512, -1, 1, 512))
    if column == "length":
        return value + rng.choice((-1, 1))
    if column == "digest":
        return bytes([value[0] ^ 1 << rng.randrange(8), *value[1:]])
    if column == "phash":
        return value ^ 1 << rng.randrange(64)
    if column.startswith("label."):
        return rng.choice([id for id in (-1, 0, 1, 99, -2) if id != value])
    if column == "frame":
        return 0 if value is None else rng.choice((None, value + 1))
    if isinstance(value, int):
        return value + rng.choice((1, 7)) if column != "channels" else 4 - value
    choices = {row[column] for row in rows} - {value}
    return rng.choice(sorted(choices - {None}) + ([None] if column in ("patient", "study", "series") else []))


def edit_column(column: str, forge: bool) -> Callable[[Path, random.Random], str]:
    def edit(dataset: Path, rng: random.Random) -> str:
        rows = read_rows(dataset)
        row = rng.choice(rows)
        was, row[column] = row[column], other(row, column, rows, rng)
        write_rows(dataset, rows)
        if forge:
            rehash(dataset)
        return f"{column} {was} {row[column]}"

    return edit


def order_rows(dataset: Path, rng: random.Random) -> str:
    rows = read_rows(dataset)
    place = rng.randrange(1, len(rows))
    how = rng.choice(("swapped", "dropped", "doubled"))
    if how == "swapped":
        rows[place - 1], rows[place] = rows[place], rows[place - 1]
    elif how == "dropped":
        del rows[place]
    else:
        rows.insert(place, rows[place])
    write_rows(dataset, rows)
    rehash(dataset)
    return f"{how} {place}"


def edit_record(dataset: Path, rng: random.Random) -> str:
    samples = take_apart(dataset)
    record = rng.choice(samples).record
    name = rng.choice(sorted(record.keys() - {"about"}))
    if name == "labels":
        record["labels"]["class"] = "dog" if record["labels"]["class"] == "cat" else "cat"
    elif rng.random() < 0.3:
        del record[name]
    elif rng.random() < 0.3:
        record["name"] = "someone"
    else:
        record[name] = f"{record[name]}0" if isinstance(record[name], str) else record[name] + 1
    put_together(dataset, samples)
    return name


def across_splits(column: str) -> Callable[[Path, random.Random], str]:
    def move(dataset: Path, rng: random.Random) -> str:
        samples = take_apart(dataset)
        one = rng.choice(samples)
        two = rng.choice([sample for sample in samples if sample.row["split"] != one.row["split"]])
        one.say(**{column: two.row[column]})
        put_together(dataset, samples)
        return f"{one.row['key']} {two.row['key']}"

    return move


def other_split(dataset: Path, rng: random.Random) -> str:
    samples = take_apart(dataset)
    patient = rng.choice(samples).row["patient"]
    split = rng.choice(("train", "val", "test"))
    mine = [sample for sample in samples if sample.row["patient"] == patient]
    if split == mine[0].row["split"]:
        split = {"train": "val", "val": "test", "test": "train"}[split]
    for sample in mine:
        sample.say(split=split)
    put_together(dataset, samples)
    return f"{patient} {split}"


def copy_across(dataset: Path, rng: random.Random) -> str:
    samples = take_apart(dataset)
    one = rng.choice(samples)
    two = rng.choice([sample for sample in samples if sample.row["split"] != one.row["split"]])
    one.image = two.image
    size = {name: two.row[name] for name in ("width", "height", "bit_depth", "channels")}
    one.say(**size)
    one.row |= {name: two.row[name] for name in ("extension", "digest", "phash")}
    put_together(dataset, samples)
    return f"{one.row['key']} {two.row['key']}"


def key_twice(dataset: Path, rng: random.Random) -> str:
    samples = take_apart(dataset)
    one, two = rng.sample([sample for sample in samples if sample.row["frame"] is None], 2)
    one.row["key"] = two.row["key"]
    put_together(dataset, samples)
    return str(one.row["key"])


def odd_key(dataset: Path, rng: random.Random) -> str:
    samples = take_apart(dataset)
    sample = rng.choice(samples)
    sample.row["key"] = rng.choice(("doe_john", "1", sample.row["key"] + "-00007"))
    put_together(dataset, samples)
    return str(sample.row["key"])


def odd_label(dataset: Path, rng: random.Random) -> str:
    samples = take_apart(dataset)
    sample = rng.choice(samples)
    sample.row["label.class"] = rng.choice((-2, 2, 1000))
    sample.record["labels"]["class"] = None
    put_together(dataset, samples)
    return str(sample.row["key"])


def pixels(data: bytes) -> bytes | None:
    try:
        return Image.open(io.BytesIO(data)).tobytes()
    except (OSError, SyntaxError, ValueError):
        return None


def image_bytes(dataset: Path, rng: random.Random) -> str:
    """Bytes that something depends on: of a JPEG some are filling, and of its tables some are not used."""
    samples = take_apart(dataset)
    sample = rng.choice(samples)
    while True:
        changed = bytearray(sample.image)
        place = rng.randrange(len(changed))
        changed[place : place + rng.choice((1, 1, 1, 16))] = rng.randbytes(1)
        if changed != sample.image and (sample.row["extension"] == "png" or pixels(changed) != pixels(sample.image)):
            break
    sample.image = bytes(changed)
    put_together(dataset, samples)
    return f"{sample.row['key']}.{sample.row['extension']} at {place}"


def images_exchanged(dataset: Path, rng: random.Random) -> str:
    samples = take_apart(dataset)
    alike = ("extension", "width", "height", "bit_depth", "channels", "split")
    pairs = [
        (one, two)
        for one, two in itertools.combinations(samples, 2)
        if all(one.row[name] == two.row[name] for name in alike)
    ]
    one, two = rng.choice(pairs)
    one.image, two.image = two.image, one.image
    put_together(dataset, samples)
    return f"{one.row['key']} {two.row['key']}"


def metadata_added(dataset: Path, rng: random.Random) -> str:
    samples = take_apart(dataset)
    sample = rng.choice([sample for sample in samples if sample.row["extension"] == "jpg"])
    comment = b"taken of " + rng.randbytes(4).hex().encode()
    marker = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big")
    sample.image = sample.image[:2] + marker + comment + sample.image[2:]
    put_together(dataset, samples)
    return str(sample.row["key"])


def edit_quarantine(forge: bool) -> Callable[[Path, random.Random], str]:
    def edit(dataset: Path, rng: random.Random) -> str:
        rows = read_rows(dataset, "quarantine")
        row = rng.choice(rows)
        how = rng.choice(("reason", "message", "drop", "add", "both", "number"))
        if how == "drop":
            rows.remove(row)
        elif how == "add":
            rows.append({**row, "number": row["number"] + 1000})
        elif how == "number":
            row["number"] = -1
        if how in ("reason", "both"):
            row["reason"] = "corrupt"
        if how == "message":
            row["message"] = "the file of Mr Doe"
        if how == "both":
            row["message"] = "the file is damaged"
        write_rows(dataset, rows, "quarantine")
        if forge:
            rehash(dataset)
        return how

    return edit


def edit_count(dataset: Path, rng: random.Random) -> str:
    content = read_json(dataset)
    name = rng.choice(
        ("samples", "quarantined", "bit_depth", "splits", "patients", "reasons", "labels", "shards", "depth")
    )
    more = rng.choice((1, 2, 5))
    if name in ("samples", "quarantined"):
        content[name] += more
    elif name in ("splits", "patients", "reasons"):
        content[name][rng.choice(sorted(content[name]))] += more
    elif name == "labels":
        names = content["labels"]["class"]["names"]
        names[:] = rng.choice((names[:1], names[::-1], ["cow", *names[1:]]))
    elif name == "shards":
        rng.choice(content["shards"])[rng.choice(("samples", "bytes"))] += more
    elif name == "depth":
        content["channels"] = 4 - content["channels"]
    else:
        content[name] = 24 - content[name]
    write_json(dataset, content)
    return name


def schema_changed(dataset: Path, rng: random.Random) -> str:
    table = pq.read_table(dataset / "index.parquet")
    names = table.schema.names
    name = rng.choice(names)
    how = rng.choice(("drop", "rename"))
    table = table.drop([name]) if how == "drop" else table.rename_columns([n + "2" if n == name else n for n in names])
    pq.write_table(table, dataset / "index.parquet")
    rehash(dataset)
    return f"{how} {name}"


COLUMNS = index_schema(["class"]).names
# How often each, whether it takes decoding to find it, and what it is.
FAULTS: dict[str, tuple[int, bool, Callable[[Path, random.Random], str]]] = {
    "a bit flipped": (120, False, flip),
    "a file cut": (40, False, cut),
    "bytes appended": (40, False, grow),
    "a file lost": (20, False, lose),
    "shards exchanged": (10, False, exchange),
    "a shard added": (10, False, extra),
    "quarantine edited": (8, False, edit_quarantine(False)),
    **{f"index edited: {column}": (1, False, edit_column(column, False)) for column in COLUMNS},
    **{
        f"index edited, hashes too: {column}": (6, column in ("digest", "phash"), edit_column(column, True))
        for column in COLUMNS
    },
    "rows swapped, dropped, doubled, hashes too": (12, False, order_rows),
    "a column dropped or renamed, hashes too": (6, False, schema_changed),
    "record edited, hashes too": (20, False, edit_record),
    "shards exchanged, hashes too": (8, False, exchange_rehashed),
    "a shard added, hashes too": (5, False, extra_rehashed),
    "quarantine edited, hashes too": (12, False, edit_quarantine(True)),
    "a count of dataset.json": (30, False, edit_count),
    "everywhere: a patient in two splits": (6, False, across_splits("patient")),
    "everywhere: a study in two splits": (6, False, across_splits("study")),
    "everywhere: a series in two splits": (6, False, across_splits("series")),
    "everywhere: a patient in another split": (6, False, other_split),
    "everywhere: an image in two splits": (8, False, copy_across),
    "everywhere: a key twice": (5, False, key_twice),
    "everywhere: a key of another form": (5, False, odd_key),
    "everywhere: a label outside its vocabulary": (5, False, odd_label),
    "everywhere: bytes of an image": (40, True, image_bytes),
    "everywhere: images exchanged": (10, True, images_exchanged),
    "everywhere: metadata in an image": (5, True, metadata_added),
}

# What must be among the problems, where it could be found for a wrong reason.
NAMED = {
    "index edited, hashes too: digest": "has other pixels",
    "index edited, hashes too: phash": "has other pixels",
    "index edited, hashes too: split": "does not match index.parquet",
    "everywhere: a patient in two splits": "patients in two splits",
    "everywhere: a study in two splits": "studies in two splits",
    "everywhere: a series in two splits": "series in two splits",
    "everywhere: a patient in another split": "is of the split",
    "everywhere: an image in two splits": "images in two splits",
    "everywhere: a key twice": "keys twice",
    "everywhere: a key of another form": "no proper key",
    "everywhere: a label outside its vocabulary": "outside its vocabulary",
    "everywhere: images exchanged": "has other pixels",
    "everywhere: metadata in an image": "holds metadata",
}
