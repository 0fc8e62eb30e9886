"""`prep retina` and `prep radimagenet`: pictures of a known kind, on the road of `prep images`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.dataset_info import Deidentification
from data_prep.errors import UserError
from data_prep.images import FileReader, Images, read_file
from data_prep.options import MEASURED, MEASURED_TRUSTED
from data_prep.pool import Engine
from data_prep.radimagenet import SPLITS, read_radimagenet
from data_prep.retina import RetinaSettings, prepare_photograph
from data_prep.samples import decoded, from_image
from data_prep.sources import Source, no_patients
from data_prep.work import Picture, Reader


@dataclass(frozen=True)
class RetinaReader:
    """Photographs below `root`, cut to the field of view; `settings` say which are usable."""

    root: Path
    resize: int | None
    settings: RetinaSettings

    def read(self, name: bytes, measure: bool) -> Iterable[Picture]:
        found = prepare_photograph(decoded(read_file(self.root, name)), self.settings)
        sample = from_image(found.image, "jpg", self.resize, measure)
        return (Picture(sample, about={"quality": found.quality}),)


@dataclass(frozen=True)
class Retina(Images):
    """Retinal photographs: as `Images`, each cut to its field of view and judged by `settings`."""

    settings: RetinaSettings = field(default_factory=RetinaSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source.suffix == ".npz":
            raise UserError(f"{self.source}: prep retina takes a folder or a manifest of photographs")
        assert not self.trust_images

    def options(self) -> dict[str, Any]:
        return {**super().options(), "source": "retina", "quality": asdict(self.settings)}

    def reader(self, state: Path) -> Reader:
        return RetinaReader(self.root, self.resize, self.settings)


@dataclass(frozen=True)
class RadImageNetSource:
    """RadImageNet as published: see `read_radimagenet`.

    Attributes:
        source: the folder with the three CSV files.
        ultrasound: a labels file that gives the anatomy of ultrasound classes; None takes the shipped one.
        resize: the largest shorter side in pixels.
        trust_images: do not decode images that pass through.
    """

    source: Path
    ultrasound: Path | None = None
    resize: int | None = None
    trust_images: bool = False

    def __post_init__(self) -> None:
        if self.resize is not None and self.resize < 1:
            raise UserError(f"--resize must be at least 1, not {self.resize}")

    @property
    def root(self) -> Path:
        return self.source

    @property
    def measured(self) -> int:
        return MEASURED_TRUSTED if self.trust_images else MEASURED

    @functools.cached_property
    def _table_sha256(self) -> str | None:
        from data_prep.dataset import file_sha256

        return None if self.ultrasound is None else file_sha256(self.ultrasound)

    def options(self) -> dict[str, Any]:
        return {
            "source": "radimagenet",
            "labels_sha256": self._table_sha256,
            "resize": self.resize,
            "trust_images": self.trust_images,
        }

    def request(self) -> dict[str, Any]:
        return {"path": str(self.source.resolve())}

    def deidentification(self) -> Deidentification | None:
        return None

    def open(self, engine: Engine, state: Path, report: Callable[[int, int | None], None]) -> Source:
        found = read_radimagenet(self.source, self.ultrasound)
        names = found.names.cast(pa.large_binary())
        splits = pa.DictionaryArray.from_arrays(pa.array(found.splits.astype(np.int32)), pa.array(SPLITS, pa.string()))
        return Source(
            "radimagenet",
            self.source,
            names,
            no_patients(len(found)),
            splits,
            found.labels,
            lambda i: f"{self.source}/{names[i].as_py().decode()}",
            notes=found.warnings,
        )

    def reader(self, state: Path) -> Reader:
        return FileReader(self.source, self.resize, self.trust_images)
