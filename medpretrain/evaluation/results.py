"""What an evaluation leaves behind: a JSON file that says everything, and a Parquet file with every score."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from data_prep.errors import UserError
from medpretrain.evaluation.metrics import Metrics
from medpretrain.whole import whole_file

FORMAT = "medpretrain evaluation"
VERSION = 2
SUFFIX = ".evaluation.json"
PREDICTIONS = ".predictions.parquet"

Value = bool | int | float | str | None
SEED, SETTING = "seed", "setting_sha256"
"""In `SourceRecord.about`: the seed of a pretraining, and the hash of its recipe but for the seed."""
Protocol = Literal["knn", "linear", "finetune"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceRecord(_Record):
    """What was evaluated."""

    name: str
    """How tables call it."""
    kind: Literal["run", "export", "timm", "random"]
    sha256: str
    """Of weights and preprocessing."""
    architecture: str
    about: dict[str, Value]
    """Where the weights come from: method, recipe and its hash, step, seed, pretraining data."""


class DataRecord(_Record):
    """What it was evaluated on."""

    name: str
    """The dataset's folder name."""
    sha256: str
    label: str
    classes: list[str]
    """In the order of the vocabulary; of two, the second is the positive one."""
    train_split: str
    test_split: str
    test_name: str
    test_sha256: str
    """Of another dataset where the test set is external."""
    train_counts: list[int]
    """Images of each class that could be learned from, before folds and fractions."""
    test_counts: list[int]
    left_out: dict[str, int]
    """Images without this label, by split; above 0 only where leaving them out was asked for."""
    patients: Literal["known", "partly known", "unknown"]
    """An image whose patient is unknown counts as a patient of its own."""


class Unit(_Record):
    """One classifier: fitted on some patients, scored on others."""

    number: int
    """Its rows in the predictions have this `unit`."""
    fraction: float
    """Percent of the training patients."""
    seed: int
    repeat: int
    fold: int | None
    """None: the dataset's own splits."""
    n_train: int
    n_val: int
    n_test: int
    parameters: dict[str, Value]
    """As used: k, C and what it was chosen on, epochs, whether it converged."""
    metrics: Metrics


class Interval(_Record):
    """95 % interval of a bootstrap by patients, of the mean over units."""

    low: float
    high: float


class Summary(_Record):
    """The units of one fraction together."""

    fraction: float
    units: int
    mean: dict[str, float]
    """By metric: mean over repeats or seeds of the mean over folds."""
    sd: dict[str, float] | None
    """Between repeats or seeds, ddof 1; None for one."""
    interval: dict[str, Interval]
    """Empty where no resamples were asked for."""


class Evaluation(_Record):
    """One source, one protocol, one dataset; whoever reads it needs nothing else to repeat it."""

    format: Literal["medpretrain evaluation"] = "medpretrain evaluation"
    version: Literal[2] = 2
    protocol: Protocol
    variant: str
    """Which of the protocol's published settings: `weighted`, `exact`, `amimv`, `modan`, `report`, ..."""
    parameters: dict[str, Value]
    """As asked for."""
    source: SourceRecord
    data: DataRecord
    folds: int
    """0: the dataset's own splits."""
    repeats: int
    seeds: list[int]
    units: list[Unit]
    summaries: list[Summary]
    seconds: float
    device: str
    medpretrain_version: str

    @property
    def title(self) -> str:
        return f"{self.protocol} ({self.variant})"

    def comparable(self) -> str:
        """What two evaluations must share to be compared: protocol, settings, data, folds; a SHA-256."""
        shared = self.model_dump(include={"protocol", "variant", "parameters", "data", "folds", "repeats", "seeds"})
        return _digest(shared)

    def file_stem(self) -> str:
        """The same evaluation of the same source replaces its file; any other has another name."""
        digest = _digest([self.comparable(), self.source.sha256])[:8]
        return f"{self.protocol}-{self.variant}-{self.data.label}-{digest}"


class Predictions:
    """Scores of every test image of every unit.

    Attributes:
        unit_R: (R,) int32, `Unit.number`.
        row_R: (R,) int64, the image's row in the test dataset's index.
        patient_R: (R,) int64, a number a patient, the same in every unit.
        label_R: (R,) int32, the true class.
        scores_RK: (R, K) float64, each row summing to 1.
    """

    def __init__(
        self,
        unit_R: NDArray[np.int32],
        row_R: NDArray[np.int64],
        patient_R: NDArray[np.int64],
        label_R: NDArray[np.int32],
        scores_RK: NDArray[np.float64],
    ) -> None:
        assert len(unit_R) == len(row_R) == len(patient_R) == len(label_R) == len(scores_RK)
        self.unit_R, self.row_R, self.patient_R = unit_R, row_R, patient_R
        self.label_R, self.scores_RK = label_R, scores_RK

    def of_unit(self, number: int) -> Predictions:
        chosen = self.unit_R == number
        return Predictions(
            self.unit_R[chosen],
            self.row_R[chosen],
            self.patient_R[chosen],
            self.label_R[chosen],
            self.scores_RK[chosen],
        )

    @classmethod
    def joined(cls, parts: Sequence[Predictions]) -> Predictions:
        names = ("unit_R", "row_R", "patient_R", "label_R", "scores_RK")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def write(folder: Path, evaluation: Evaluation, predictions: Predictions) -> Path:
    """Write both files into the folder, which is made; the JSON file comes last, so what it names is there.

    Returns:
        The JSON file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = evaluation.file_stem()
    columns = {
        "unit": predictions.unit_R,
        "row": predictions.row_R,
        "patient": predictions.patient_R,
        "label": predictions.label_R,
        **{f"score_{k}": predictions.scores_RK[:, k] for k in range(predictions.scores_RK.shape[1])},
    }
    with whole_file(folder / f"{stem}{PREDICTIONS}") as partial:
        pq.write_table(pa.table(columns), partial, compression="zstd")
    path = folder / f"{stem}{SUFFIX}"
    with whole_file(path) as partial:
        partial.write_text(evaluation.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return path


def read(path: Path) -> tuple[Evaluation, Predictions]:
    """An evaluation and its predictions.

    Raises:
        UserError: no such file, one that a newer medpretrain wrote, or one that was changed.
    """
    evaluation = read_record(path, Evaluation, FORMAT, VERSION)
    file = path.with_name(path.name.removesuffix(SUFFIX) + PREDICTIONS)
    if not file.is_file():
        raise UserError(f"{file} is missing: {path.name} is not whole without it")
    table = pq.read_table(file)
    scores = [table.column(f"score_{k}").to_numpy() for k in range(len(evaluation.data.classes))]
    unit, row, patient, true = (table.column(name).to_numpy() for name in ("unit", "row", "patient", "label"))
    predictions = Predictions(unit, row, patient, true, np.stack(scores, axis=1))
    counted = {unit.number: unit.n_test for unit in evaluation.units}
    found = dict(zip(*(part.tolist() for part in np.unique(predictions.unit_R, return_counts=True)), strict=True))
    if counted != found:
        raise UserError(f"{file} does not have the images that {path.name} counts")
    return evaluation, predictions


Record = TypeVar("Record", bound=BaseModel)


def read_record(path: Path, record: type[Record], format: str, version: int) -> Record:
    """A JSON file of ours.

    Raises:
        UserError: no such file; another format; a newer version; unknown or missing fields.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is not JSON") from None
    if not isinstance(content, dict) or content.get("format") != format:
        raise UserError(f"{path} is no {format!r} file")
    if content.get("version") != version:
        raise UserError(
            f"{path} has version {content.get('version')} of the format {format!r}, this medpretrain reads {version}"
        )
    try:
        return record.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path} was changed: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
