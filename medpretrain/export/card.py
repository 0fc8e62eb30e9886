"""The model card: what the weights are, what they were made from, how they are loaded, what is not known."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medpretrain.export.card_code import lines
from medpretrain.export.description import CARD, PREPROCESSING, WEIGHTS, Description, Form, Window
from medpretrain.export.difference import BATCHES, Difference
from medpretrain.export.provenance import NOT_PROVIDED, Provenance
from medpretrain.export.timm_form import enlargement_note

if TYPE_CHECKING:
    from medpretrain.evaluation.results import Evaluation

_TITLES: dict[Form, str] = {
    "timm": "timm",
    "onnx": "ONNX, with onnxruntime and without torch",
    "pt2": "torch.export, with torch alone",
}


def model_card(
    name: str,
    features: int,
    description: Description,
    provenance: Provenance,
    differences: Mapping[Form, Difference],
    evaluations: Sequence[Evaluation] = (),
) -> str:
    """The README.md of an export: Markdown with YAML front matter, after TRIPOD+AI and MI-CLAIM where they apply.

    Args:
        name: of the model.
        features: D.
        description: of `preprocessing.json`; its forms get lines that load them.
        provenance: what is known of the origin.
        differences: as measured, by form.
        evaluations: of these weights.
    """
    d, p = description, provenance
    tags = ["timm", "medical-imaging", "medpretrain", *([p.method] if p.method else [])]
    front = ["library_name: timm", "pipeline_tag: image-feature-extraction", "license: other", "tags:"]
    front += [f"- {json.dumps(tag)}" for tag in tags]
    return f"""---
{chr(10).join(front)}
---

# {name}

A `{d.architecture}` backbone without a classifier, pretrained on medical images with medpretrain.
An image of {d.size} x {d.size} pixels and {d.channels} channel(s) becomes {features} features.

## How to load it

In this folder, with an image file:
{_loading(d)}
{_preparation(d)}
| form | file | largest difference from the trained backbone | of the largest feature |
| --- | --- | --- | --- |
{_differences(d, differences)}

Measured when it was exported, on random images in batches of {", ".join(map(str, BATCHES))}, in float32 on a CPU.

## What it was made from

| | |
| --- | --- |
{_table(_origin(p))}

## Results

{_results(evaluations)}
## Reporting

The items of TRIPOD+AI (and the parts of MI-CLAIM) that apply to a pretrained backbone.

| item | |
| --- | --- |
{_table(_reporting(d, p, evaluations))}

## Intended use

A starting point for research: frozen features, or weights to fine-tune on a labelled task.

## Limits

- It is not a medical device. It makes no diagnosis and has not been tested in clinical use.
- Images from other devices, hospitals or patients than those it saw may be represented badly.
- Measure it on your own data before you rely on it, overall and by subgroup.
- Weights can retain something of their training images; treat them as your agreement on those images says.

## Licence and contact

Licence: other, that is: {NOT_PROVIDED}. It depends on the agreement on the training images.
Contact: {NOT_PROVIDED}.
"""


def _loading(d: Description) -> str:
    blocks = [f"\n### {_TITLES[form]}\n\n```python\n{lines(form, d)}\n```\n" for form in d.forms]
    return "".join(blocks)


def _preparation(d: Description) -> str:
    steps = [f"squash to {d.size} x {d.size} (bilinear, antialiased; the aspect ratio is not kept)"]
    steps += ["round to whole gray values"] if d.rounded else []
    steps += [f"divide by {d.divide:.0f}", "subtract the mean, divide by the deviation"]
    text = [f"`{PREPROCESSING}` holds the same in numbers: {', '.join(steps)}."]
    if "onnx" in d.forms or "pt2" in d.forms:
        text.append("The ONNX and torch.export forms take pixels from 0 to 1 and do the last step themselves.")
    if d.channels == 1 and d.bit_depth <= 8:
        text.append("A colour image becomes its luma; decoders differ in it by up to 3 gray values.")
    if d.bit_depth > 8:
        text.append("The image files are gray, of 16 bits.")
    if d.enlarge:
        text.append(
            f"\n\n**For timm the image must be enlarged twice.** This backbone was {enlargement_note(d.size)}. timm's "
            f"own transform resizes to {2 * d.size} x {2 * d.size} in one step, which is not the same."
        )
    for window in d.window or ():
        shown = f"{window.window}" if window.window else "none; the images came as they are"
        text.append(f"\n\nGray values were windowed before: {shown} (dataset {window.dataset_sha256[:12]}).")
        if window.centre_width:
            pairs = ", ".join(f"{place} {c:g}/{w:g}" for place, (c, w) in window.centre_width.items())
            text.append(f"For CT, centre/width in Hounsfield units: {pairs}.")
    return " ".join(text).replace(" \n", "\n") + "\n"


def _differences(d: Description, differences: Mapping[Form, Difference]) -> str:
    return "\n".join(
        f"| {form} | {d.forms[form].file} | {found.absolute:.1e} | {found.relative:.1e} |"
        for form, found in differences.items()
    )


def _origin(p: Provenance) -> dict[str, object]:
    counts = ", ".join(f"{key} {count}" for key, count in p.dataset_counts.items()) if p.dataset_counts else None
    return {
        "method": p.method,
        "recipe": p.recipe_name,
        "recipe SHA-256": p.recipe_sha256,
        "dataset SHA-256": ", ".join(p.dataset_sha256) if p.dataset_sha256 else None,
        "checkpoint SHA-256": p.checkpoint_sha256,
        "images in the dataset": counts,
        "steps": p.step,
        "images seen": p.images_seen,
        "medpretrain": p.medpretrain_version,
        "torch": p.torch_version,
        "timm": p.timm_version,
    }


def _results(evaluations: Sequence[Evaluation]) -> str:
    if not evaluations:
        return f"Performance on any task, overall and by subgroup: {NOT_PROVIDED}.\n"
    rows = [
        "Of these weights; 95 % intervals of a bootstrap by patients.",
        "",
        "| protocol | dataset | label | training data | test images | AUROC | 95 % interval | balanced accuracy |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for evaluation in evaluations:
        data = evaluation.data
        external = f"{data.name}, tested on {data.test_name}" if data.test_sha256 != data.sha256 else data.name
        for summary in evaluation.summaries:
            interval = summary.interval.get("auroc")
            shown = f"{interval.low:.3f} to {interval.high:.3f}" if interval else NOT_PROVIDED
            tested = sum(data.test_counts) if not evaluation.folds else sum(data.train_counts)
            rows.append(
                f"| {evaluation.title} | {_cell(external)} | {_cell(data.label)} | {summary.fraction:g} % | {tested} | "
                f"{summary.mean['auroc']:.3f} | {shown} | {summary.mean['balanced_accuracy']:.3f} |"
            )
    return "\n".join([*rows, "", f"By subgroup: {NOT_PROVIDED}."]) + "\n"


def _reporting(d: Description, p: Provenance, evaluations: Sequence[Evaluation]) -> dict[str, object]:
    counts = p.dataset_counts
    return {
        "source, setting and dates of the data (5, 6a; MI-CLAIM 1)": None,
        "eligibility: inclusion and exclusion (6b)": None,
        "patients: number, age, sex, ethnicity (20b; MI-CLAIM 1)": None,
        "devices and acquisition": None,
        "data preparation (7)": f"{PREPROCESSING}" + (f"; {_windows(d.window)}" if d.window else ""),
        "outcome and its assessment (8)": "none is predicted: the output is features",
        "sample size (10)": f"{sum(counts.values())} images" if counts else None,
        "missing data (11)": None,
        "model, training and hyperparameters (12c, 22; MI-CLAIM 2)": (
            f"{d.architecture}, {p.method}, recipe {p.recipe_name} ({p.recipe_sha256})" if p.recipe_sha256 else None
        ),
        "class imbalance (13)": None,
        "fairness (14, 26)": None,
        "separation of training and test data (16; MI-CLAIM 2)": _separation(evaluations),
        "performance with confidence intervals (12e, 23a; MI-CLAIM 3)": "see Results" if evaluations else None,
        "examination of the model (MI-CLAIM 4)": None,
        "ethics approval and consent (17)": None,
        "funding and conflicts of interest (18a, 18b)": None,
        "protocol and registration (18c, 18d)": None,
        "availability of data (18e)": None,
        "availability of code and model (18f; MI-CLAIM 5)": f"medpretrain (Apache-2.0); {WEIGHTS}, {CARD} and the rest",
        "patient and public involvement (19)": None,
    }


def _windows(windows: Sequence[Window]) -> str:
    return "windows " + ", ".join(sorted({window.window or "none" for window in windows}))


def _separation(evaluations: Sequence[Evaluation]) -> str | None:
    if not evaluations:
        return None
    return "by patient where patients are known: " + ", ".join(sorted({found.data.patients for found in evaluations}))


def _table(rows: Mapping[str, object]) -> str:
    return "\n".join(f"| {key} | {_shown(value)} |" for key, value in rows.items())


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def _shown(value: Any) -> str:
    return NOT_PROVIDED if value is None else str(value)
