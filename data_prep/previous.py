"""A dataset that is added to: what it has, and what of a source is new to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.columns import values
from data_prep.dataset import INDEX, QUARANTINE
from data_prep.dataset_info import DatasetInfo
from data_prep.errors import UserError
from data_prep.labels import UNKNOWN, LabelColumn
from data_prep.plan import Base, difference
from data_prep.quarantine import REASONS
from data_prep.sources import REJECTED_SCHEMA, Source, shown
from data_prep.staging import LINKS, Staging
from data_prep.store import open_store


@dataclass(frozen=True)
class Previous:
    """The dataset as it stands; tables are whole in memory, some 200 bytes an image."""

    info: DatasetInfo
    sha256: str
    index: pa.Table
    quarantine: pa.Table
    links: pa.Table

    @classmethod
    def of(cls, staging: Staging) -> Previous:
        """Read the dataset at OUT.

        Raises:
            UserError: there is none, or its private folder is missing.
        """
        there = staging.refuse_foreign()
        assert there is not None
        store = open_store(staging.out)
        with store.local(INDEX) as index, store.local(QUARANTINE) as quarantine:
            tables = pq.read_table(index), pq.read_table(quarantine)
        return cls(*there, *tables, pq.read_table(staging.final_private / LINKS))

    @property
    def base(self) -> Base:
        pairs = self.index.select(["patient", "split"]).group_by(["patient", "split"]).aggregate([]).to_pylist()
        patients = {row["patient"]: row["split"] for row in pairs if row["patient"] is not None}
        # Not the count of sources: files that are known are numbered again, and left out.
        number = pc.max(self.links.column("number")).as_py() + 1
        return Base.of(self.info, [pc.max(self.index.column("key")).as_py()], patients, number)

    def refuse_other(self, options: Mapping[str, Any], key_id: str | None, seed: int) -> None:
        """Whatever is added must be made as the rest was.

        Raises:
            UserError: an option, the key or the seed differs.
        """
        odd = difference(self.info.options, options)
        if odd is not None:
            raise UserError(f"--append: the dataset was made with other options: {odd}")
        if self.info.deidentification is not None and self.info.deidentification.key_id != key_id:
            raise UserError("--append: the dataset was made with another key, so patients would get second names")
        if int(self.links.schema.metadata[b"seed"]) != seed:
            raise UserError("--append: the dataset was made with another --seed, so patients could change their split")

    def without_known(self, source: Source) -> Source:
        """The sources that are new, with the labels' ids as the dataset has them.

        A file is known by its path below the same SOURCE, a DICOM instance by its UID wherever it lies.

        Raises:
            UserError: other labels than the dataset has, or patients without a key.
        """
        if not source.keyed and source.patients.null_count < len(source):
            raise UserError(
                "--append: with patients it needs the --key-file the dataset was made with: without a key "
                "they are numbered, and numbers would name other patients now"
            )
        root = str(source.root.resolve())
        here = self.links.filter(pc.equal(self.links.column("root"), root)).column("path")

        def new(names: pa.Array) -> pa.Array:
            paths = pa.array([shown(name) for name in values(names)], pa.string())
            return pc.invert(pc.is_in(paths, value_set=here))

        rejected = source.rejected.filter(new(source.rejected.column("name").combine_chunks()))
        rows = np.flatnonzero(new(source.names).to_numpy(zero_copy_only=False))
        source = replace(source.taken(rows), rejected=rejected)
        if source.instances is not None:
            again = pc.is_in(source.instances, value_set=self.index.column("instance").drop_null())
            source = without_twice(source, again.to_numpy(zero_copy_only=False))
        if set(source.labels) != set(self.info.labels):
            raise UserError(
                f"--append: the source has the labels {sorted(source.labels)}, the dataset {sorted(self.info.labels)}"
            )
        labels = {name: self._joined(name, column) for name, column in source.labels.items()}
        return replace(source, labels={name: labels[name] for name in self.info.labels})

    def _joined(self, name: str, column: LabelColumn) -> LabelColumn:
        """A label's ids with the dataset's vocabulary; new names go to its end, so that old ids stay."""
        old = self.info.labels[name]
        names = [*old.names, *(value for value in column.names if value not in set(old.names))]
        table = np.array([names.index(value) for value in column.names] + [UNKNOWN], np.int32)
        return LabelColumn(names, table[column.ids], old.source, old.version)


def without_twice(source: Source, again: np.ndarray) -> Source:
    """Set the sources aside whose DICOM instance is there already: `again` (N,) bool."""
    rows = np.flatnonzero(again)
    if not len(rows):
        return source
    assert source.instances is not None
    numbers = np.arange(len(source)) if source.numbers is None else source.numbers
    code = "duplicate_instance"
    twice = pa.table(
        {
            "number": numbers[rows],
            "reason": [code] * len(rows),
            "message": [REASONS[code]] * len(rows),
            "patient": source.patients.take(rows).cast(pa.string()),
            "instance": source.instances.take(rows),
            "name": source.names.take(rows),
        },
        schema=REJECTED_SCHEMA,
    )
    rejected = pa.concat_tables([source.rejected, twice]).sort_by("number")
    return replace(source.taken(np.flatnonzero(~again)), rejected=rejected)
