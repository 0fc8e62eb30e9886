"""preprocessing.json: what an export takes and what its images need, as data; writer and reader side by side.

No code is needed to read it: every number that turns an image file into the network's input is there by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from data_prep.errors import UserError
from medpretrain.models.backbones import Stem
from medpretrain.models.preprocessing import Preprocessing

FORMAT = "medpretrain export"
FORMAT_VERSION = 2
WEIGHTS, CONFIG, PREPROCESSING, CARD = "model.safetensors", "config.json", "preprocessing.json", "README.md"

Form = Literal["timm", "onnx", "pt2"]
FORMS: tuple[Form, ...] = ("timm", "onnx", "pt2")
FILES: dict[Form, str] = {"timm": WEIGHTS, "onnx": "model.onnx", "pt2": "model.pt2"}
INPUT, OUTPUT = "pixels", "features"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Enlarge(_Record):
    """What a 3x3 stem, stored as a 7x7 one, needs after normalisation; for the form `timm` alone."""

    factor: Literal[2] = 2
    interpolation: Literal["nearest"] = "nearest"


class Window(_Record):
    """Which gray values the images of a dataset show as black and white; made before an image becomes a file."""

    dataset_sha256: str
    window: str | None
    """`stored`, `percentile:LOW,HIGH`, `fixed`, as of `medpretrain prep dicom`; None: the images came as they are."""
    centre_width: dict[str, tuple[float, float]] | None = None
    """Of a shipped table: centre and width in Hounsfield units, by anatomy, `*` for any other; for CT alone."""


class Input(_Record):
    """What one form of the export takes: float32 (n, channels, size, size)."""

    file: str
    takes: Literal["normalised", "pixels"]
    """normalised: after mean, std and enlargement; pixels: from 0 to 1, the form subtracts mean and divides itself."""
    size: int


class Description(_Record):
    """The content of preprocessing.json; the steps are in the order in which they are taken.

    Version 1 had neither `window` nor `edges`, `rounded`, `architecture`, `forms` and `weights_sha256`.
    """

    format: Literal["medpretrain export"] = "medpretrain export"
    version: int = FORMAT_VERSION
    architecture: str | None = None
    """timm's name."""
    window: list[Window] | None = None
    channels: int
    """1: a colour image becomes its luma (of a JPEG, its Y); 3: a gray image becomes three equal channels."""
    bit_depth: int
    size: int
    resize: Literal["squash"] = "squash"
    """To size x size; the aspect ratio is not kept."""
    interpolation: Literal["bilinear"] = "bilinear"
    antialias: bool = True
    """A triangle as wide as the reduction; where the image is enlarged, plain bilinear."""
    edges: Literal["replicate"] = "replicate"
    """Beyond its border the image goes on as its last pixel does."""
    rounded: bool = False
    """To whole gray values after the resize."""
    divide: float | None = None
    """Pixels by this, to 0..1."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    enlarge: Enlarge | None = None
    forms: dict[Form, Input] = {}
    weights_sha256: str | None = None
    """Of model.safetensors."""

    @property
    def stem(self) -> Stem:
        return "timm" if self.enlarge is None else "3x3"

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(self.size, self.channels, self.mean, self.std, self.bit_depth)


def describe(
    preprocessing: Preprocessing, architecture: str, stem: Stem, forms: tuple[Form, ...], windows: list[Window] | None
) -> Description:
    """What preprocessing.json is to say."""
    p, side = preprocessing, preprocessing.size * (2 if stem == "3x3" else 1)
    return Description(
        architecture=architecture,
        window=windows,
        channels=p.channels,
        bit_depth=p.bit_depth,
        size=p.size,
        rounded=p.bit_depth <= 8,
        divide=2.0**p.bit_depth - 1,
        mean=p.mean,
        std=p.std,
        enlarge=Enlarge() if stem == "3x3" else None,
        forms={
            form: Input(file=FILES[form], takes="normalised", size=side)
            if form == "timm"
            else Input(file=FILES[form], takes="pixels", size=p.size)
            for form in forms
        },
    )


def write_description(folder: Path, description: Description) -> None:
    """Write preprocessing.json."""
    (folder / PREPROCESSING).write_text(description.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_description(folder: Path) -> Description:
    """What an export says of itself.

    Raises:
        UserError: no export, one that a newer medpretrain made, or one that was changed.
    """
    path = folder / PREPROCESSING
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise UserError(f"{folder} is no export: {PREPROCESSING} is not of the format {FORMAT!r}")
    version = content.get("version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"{folder} was exported by a newer medpretrain: it has version {version} of the format {FORMAT!r}, and "
            f"this one reads up to {FORMAT_VERSION}; install a newer medpretrain"
        )
    try:
        description = Description.model_validate(content)
        _ = description.preprocessing  # refuses numbers that cannot be
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path} was changed: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return description


def read_preprocessing(folder: Path) -> Preprocessing:
    """What an export's images need.

    Raises:
        UserError: as `read_description`.
    """
    return read_description(folder).preprocessing


def is_export(folder: Path) -> bool:
    """Whether there is an export, of whatever version."""
    if folder.is_symlink() or not (folder / PREPROCESSING).is_file():
        return False
    try:
        return read_json(folder / PREPROCESSING).get("format") == FORMAT
    except UserError:
        return False


def read_json(path: Path) -> dict[str, Any]:
    """Raises:
    UserError: no such file, or no JSON object in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is damaged: it is not JSON") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it is not a JSON object")
    return content
