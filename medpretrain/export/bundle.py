"""Write a backbone as a folder that others load, and prove that every form in it computes the same features."""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from data_prep.dataset import file_sha256
from data_prep.errors import UserError, nearest
from medpretrain.export import graph_forms
from medpretrain.export.card import model_card
from medpretrain.export.description import (
    CARD,
    CONFIG,
    FILES,
    FORMAT,
    FORMAT_VERSION,
    FORMS,
    PREPROCESSING,
    WEIGHTS,
    Description,
    Form,
    Window,
    describe,
    is_export,
    write_description,
)
from medpretrain.export.difference import Difference, FeaturesDiffer, enlarged, measure, random_images
from medpretrain.export.provenance import Provenance
from medpretrain.export.timm_form import checked_state, load_timm, write_timm
from medpretrain.models.backbones import Stem
from medpretrain.models.preprocessing import Preprocessing
from medpretrain.whole import whole_folder

if TYPE_CHECKING:
    from medpretrain.evaluation.results import Evaluation

__all__ = [
    "CARD",
    "CONFIG",
    "FORMAT",
    "FORMAT_VERSION",
    "FORMS",
    "PREPROCESSING",
    "WEIGHTS",
    "ExportReport",
    "FeaturesDiffer",
    "export",
    "parse_forms",
]


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it was checked."""

    out: Path
    features: int
    """D: the width of the output."""
    differences: dict[Form, Difference]
    """Of each form, loaded back, from the trained backbone."""
    enlarged: bool
    """True for a 3x3 stem: for timm images are to be enlarged twice."""
    sha256: dict[str, str]
    """By file name."""


def parse_forms(text: str) -> tuple[Form, ...]:
    """The forms of a comma-separated list; timm is always among them, for the rest is read with it.

    Raises:
        UserError: an unknown form.

    >>> parse_forms("onnx")
    ('timm', 'onnx')
    """
    given = [part.strip() for part in text.split(",") if part.strip()]
    for form in given:
        if form not in FORMS:
            raise UserError(f"there is no form {form!r}{nearest(form, FORMS)}")
    return tuple(form for form in FORMS if form == "timm" or form in given)


def export(
    backbone: nn.Module,
    *,
    architecture: str,
    stem: Stem,
    channels: int,
    image_size: int,
    mean: list[float],
    std: list[float],
    name: str,
    provenance: Provenance,
    out: Path,
    bit_depth: int = 8,
    windows: list[Window] | None = None,
    evaluations: Sequence[Evaluation] = (),
    forms: tuple[Form, ...] = FORMS,
    overwrite: bool = False,
) -> ExportReport:
    """Write OUT: model.safetensors and config.json for timm, model.onnx, model.pt2, preprocessing.json, README.md.

    It is written beside OUT, each form is loaded back and compared on random images in float32 on the CPU, and only
    then renamed to OUT. The features of timm's form must be equal; those of a 3x3 stem, which timm has as a 7x7 one of
    an enlarged image, and those of the graphs may differ by 1e-5 of the largest feature (of 1, if that is smaller), for
    sums are taken in another order.

    Args:
        backbone: from `create_backbone`, on any device; left as it is.
        architecture: its timm name.
        stem: its stem.
        channels: its channels, 1 or 3.
        image_size: pixels it was trained on.
        mean: one value a channel, of pixels in [0, 1].
        std: the same.
        name: what the model is to be called: letters, digits, dots, dashes, underscores.
        provenance: for the card and the headers of the files.
        out: the folder.
        bit_depth: of the images; pixels were divided by 2 ** bit_depth - 1.
        windows: what the images show of their gray values, a dataset each; None: not known.
        evaluations: of these weights, for the card.
        forms: which to write, in the order of `FORMS`.
        overwrite: replace an earlier export. A crash between the two renames of a replacement leaves the earlier one
            whole under a hidden name beside OUT.

    Raises:
        UserError: OUT exists and is not an earlier export, or is one and overwrite is False; weights that do not fit
            the architecture or are not finite; a name or preprocessing that cannot be; a package that a form needs.
        FeaturesDiffer: a comparison failed.
        WorkFailed: a form cannot be made of this architecture.
    """
    preprocessing = Preprocessing(image_size, channels, tuple(mean), tuple(std), bit_depth)
    if channels not in (1, 3):
        raise UserError(f"an export takes images of 1 or 3 channels, as training does, not {channels}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", name):
        raise UserError(f"the name {name!r} must be of letters, digits, dots, dashes and underscores")
    out = Path(out)
    refuse_unless_free(out, overwrite)
    graph_forms.refuse_without_packages(forms)
    architecture = architecture.partition(".")[0]  # the tag names ImageNet's weights, not these
    state = checked_state(backbone, architecture, stem, channels, image_size)
    description = describe(preprocessing, architecture, stem, forms, windows)
    metadata = {"export": f"{FORMAT} {FORMAT_VERSION}", **provenance.header()}
    metadata["preprocessing"] = description.model_dump_json(exclude={"weights_sha256"})

    with whole_folder(out) as partial:
        features = write_timm(
            partial,
            state,
            architecture=architecture,
            stem=stem,
            name=name,
            preprocessing=preprocessing,
            metadata=metadata,
        )
        if "onnx" in forms or "pt2" in forms:
            program = graph_forms.trace(state, architecture, stem, preprocessing)
            if "pt2" in forms:
                graph_forms.write_pt2(program, partial / FILES["pt2"], metadata)
            if "onnx" in forms:
                graph_forms.write_onnx(program, partial / FILES["onnx"], metadata)
        differences = _compare(backbone, partial, description)
        description = description.model_copy(update={"weights_sha256": file_sha256(partial / WEIGHTS)})
        write_description(partial, description)
        card = model_card(name, features, description, provenance, differences, evaluations)
        (partial / CARD).write_text(card, encoding="utf-8")
        for file in partial.iterdir():
            # safetensors makes its file readable by its owner alone; the card's mode is what the umask allows.
            file.chmod((partial / CARD).stat().st_mode)
        report = ExportReport(
            out=out,
            features=features,
            differences=differences,
            enlarged=stem == "3x3",
            sha256={file.name: _settle(file) for file in sorted(partial.iterdir())},
        )
    return report


def refuse_unless_free(out: Path, overwrite: bool) -> None:
    """Raises:
    UserError: OUT is there, and is no earlier export or is not to be replaced.
    """
    if not (out.exists() or out.is_symlink()):
        return
    if not is_export(out):
        raise UserError(f"{out} exists and is not an earlier export; name a folder that does not exist")
    if not overwrite:
        raise UserError(f"{out} holds an earlier export; say --overwrite to replace it")


def _compare(backbone: nn.Module, folder: Path, description: Description) -> dict[Form, Difference]:
    # A copy in the layout and precision of the export: another layout would add in another order.
    trained = copy.deepcopy(backbone).to("cpu", torch.float32)
    trained.to(memory_format=torch.contiguous_format).eval()
    from_pixels = graph_forms.FromPixels(trained, description.preprocessing)
    channels, size = description.channels, description.size
    differences: dict[Form, Difference] = {}
    for form in description.forms:
        if form == "timm":
            loaded = load_timm(folder)
            images = random_images(channels, size, pixels=False)
            exact = not description.enlarge
            as_trained = enlarged(loaded) if description.enlarge else loaded
            differences[form] = measure(form, trained, as_trained, images, exact=exact)
        else:
            load = graph_forms.load_onnx if form == "onnx" else graph_forms.load_pt2
            images = random_images(channels, size, pixels=True)
            differences[form] = measure(form, from_pixels, load(folder / FILES[form]), images, exact=False)
    return differences


def _settle(file: Path) -> str:
    """Bring a file to the disk, so that the rename never shows one that a power cut empties; its SHA-256."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        return hashlib.file_digest(opened, "sha256").hexdigest()
