"""Which image goes into which shard of which split, fixed before any pixel is read.

Every choice is a hash of the seed and a name, so the plan does not depend on workers, machine or the order of files on
disk. Images are shuffled within a split; a patient is never in two splits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.errors import UserError
from data_prep.sources import SPLIT_NAME, Source
from data_prep.work import Job

MEASURED_SPLIT = "train"  # whose mean and standard deviation the dataset states


@dataclass(frozen=True)
class Plan:
    """`order` (N,) is the source number at each plan position; `pseudonyms` and `split_ids` (N,) go by position."""

    order: np.ndarray
    splits: list[str]
    split_ids: np.ndarray
    pseudonyms: np.ndarray
    bounds: list[tuple[int, int]]

    def jobs(self, source: Source, measure: int) -> Iterator[Job]:
        """The shards to write, in order.

        Args:
            source: what the plan was made from.
            measure: about how many train images to measure, the first ones of each shard.
        """
        columns = [column.ids for column in source.labels.values()]
        shards = sum(self.splits[self.split_ids[start]] == MEASURED_SPLIT for start, _ in self.bounds)
        for number, (start, stop) in enumerate(self.bounds):
            rows = self.order[start:stop]
            split = self.splits[self.split_ids[start]]
            yield Job(
                number=number,
                split=split,
                start=start,
                names=[source.names[row] for row in rows.tolist()],
                labels=np.stack([ids[rows] for ids in columns], axis=1)
                if columns
                else np.zeros((len(rows), 0), np.int32),
                pseudonyms=self.pseudonyms[start:stop],
                measure=-(-measure // shards) if split == MEASURED_SPLIT else 0,
            )


def parse_split(text: str) -> dict[str, float]:
    """Read `train=0.8,val=0.1,test=0.1`.

    Raises:
        UserError: not of that form, or the parts do not add up to 1.

    >>> parse_split("train=0.9,val=0.1")
    {'train': 0.9, 'val': 0.1}
    """
    parts: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        try:
            fraction = float(value)
        except ValueError:
            raise UserError(f"--split {text!r}: {part!r} is not of the form NAME=FRACTION") from None
        if not SPLIT_NAME.fullmatch(name):
            raise UserError(f"--split {text!r}: the name {name!r} must be lower-case letters, digits or _")
        if name in parts or not 0 < fraction <= 1:
            raise UserError(f"--split {text!r}: {part!r} stands there twice or is not above 0 and up to 1")
        parts[name] = fraction
    if abs(sum(parts.values()) - 1) > 1e-6:
        raise UserError(f"--split {text!r}: the parts add up to {sum(parts.values()):g}, not 1")
    return parts


def make_plan(source: Source, split: Mapping[str, float] | None, seed: int, shard_size: int) -> Plan:
    """Split, shuffle, number the patients and cut into shards.

    Args:
        source: the images.
        split: fractions by name; a patient (or an image without one) falls by its hash, so it keeps its split when
            the source grows. None keeps the source's own split, or puts all into `train`.
        seed: of all hashes.
        shard_size: the most images in a shard.

    Raises:
        UserError: the source has its own split, a split stays empty, or a patient is in two splits.
    """
    if split is not None and source.splits is not None:
        raise UserError("--split: the source brings its own split; leave the option out, or remove the source's split")
    wanted = sorted(split) if split is not None else sorted(set(source.splits or ("train",)))
    if split is not None:
        split_ids = _drawn(source, split, wanted, seed)
    elif source.splits is not None:
        place = {name: number for number, name in enumerate(wanted)}
        split_ids = np.array([place[name] for name in source.splits], np.int64)
    else:
        split_ids = np.zeros(len(source), np.int64)
    _refuse_shared_patients(source, split_ids, wanted)
    order = np.lexsort((_hashes(source.names, seed, b"order"), split_ids))
    known = sorted({patient for patient in source.patients if patient is not None})
    rank = np.argsort(_hashes(known, seed, b"patient"), kind="stable")
    number_of: dict[str | None, int] = {known[place]: number for number, place in enumerate(rank.tolist(), start=1)}
    pseudonyms = np.array([number_of.get(patient, 0) for patient in source.patients], np.int64)
    planned = split_ids[order]
    bounds = []
    for number in range(len(wanted)):
        first, last = np.searchsorted(planned, (number, number + 1)).tolist()
        bounds += [(start, min(start + shard_size, last)) for start in range(first, last, shard_size)]
    return Plan(order, wanted, planned, pseudonyms[order], bounds)


def _hashes(names: Sequence[str], seed: int, use: bytes) -> np.ndarray:
    """A uint64 for each name."""
    salt = seed.to_bytes(8, "little")
    digests = [
        hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8, salt=salt, person=use).digest()
        for name in names
    ]
    return np.frombuffer(b"".join(digests), "<u8")


def _drawn(source: Source, split: Mapping[str, float], names: list[str], seed: int) -> np.ndarray:
    """The split of each image, by the hash of its patient, or of its name where the patient is unknown."""
    # A prefix keeps a patient and a file of the same name apart.
    units = [
        f"image:{name}" if patient is None else f"patient:{patient}"
        for name, patient in zip(source.names, source.patients, strict=True)
    ]
    edges = np.cumsum([split[name] for name in names])[:-1]
    drawn = np.searchsorted(edges, _hashes(units, seed, b"split") / 2.0**64, side="right")
    for number, name in enumerate(names):
        if not (drawn == number).any():
            raise UserError(
                f"--split: {name!r} would get none of {len(set(units))} patients or images; try another --seed"
            )
    return drawn


def _refuse_shared_patients(source: Source, split_ids: np.ndarray, splits: list[str]) -> None:
    """The source's own split may be wrong: two splits with one patient leak the answer into the test."""
    first: dict[str, int] = {}
    for i, patient in enumerate(source.patients):
        if patient is None:
            continue
        j = first.setdefault(patient, i)
        if split_ids[i] != split_ids[j]:
            one, two = splits[split_ids[j]], splits[split_ids[i]]
            raise UserError(
                f"one patient is in two splits: {one!r} ({source.place(j)}) and {two!r} ({source.place(i)})"
            )
