"""The model card: what the weights are, what they were made from, how they are loaded, what is not known."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from medpretrain.models.backbones import Stem
from medpretrain.models.preprocessing import Preprocessing

NOT_PROVIDED = "not provided"

# A name is shown in a table and in YAML; a slash would be a path, which may name a patient or a person.
Name = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f/\\|<>\"]+$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class Provenance(BaseModel):
    """What the weights came from; None is shown as "not provided".

    Raises:
        ValueError: a hash that is not 64 hexadecimal digits, a negative count, a name with a slash.

    >>> Provenance(recipe_name="configs/demo.yaml").recipe_name
    'demo'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Name | None = None
    recipe_name: Name | None = None
    """A recipe given as a path is known by the name of its file."""
    recipe_sha256: Sha256 | None = None
    dataset_sha256: tuple[Sha256, ...] | None = None
    """Of each dataset, in their order."""
    dataset_counts: dict[Name, Count] | None = None
    """Images, by split or by whatever the dataset counts."""
    step: Count | None = None
    images_seen: Count | None = None
    """Images drawn over the whole run, repeats counted."""
    medpretrain_version: Name | None = None
    torch_version: Name | None = None
    timm_version: Name | None = None

    @field_validator("recipe_name", mode="before")
    @classmethod
    def _file_name_only(cls, value: object) -> object:
        return re.split(r"[/\\]", value)[-1].removesuffix(".yaml") if isinstance(value, str) else value


def model_card(
    name: str, architecture: str, stem: Stem, features: int, preprocessing: Preprocessing, provenance: Provenance
) -> str:
    """The README.md of an export: Markdown with YAML front matter, after TRIPOD+AI and MI-CLAIM where they apply."""
    p, size = provenance, preprocessing.size
    counts = ", ".join(f"{key} {count}" for key, count in p.dataset_counts.items()) if p.dataset_counts else None
    tags = ["timm", "medical-imaging", "medpretrain", *([p.method] if p.method else [])]
    front = ["library_name: timm", "pipeline_tag: image-feature-extraction", "license: other", "tags:"]
    front += [f"- {json.dumps(tag)}" for tag in tags]
    rows = {
        "method": p.method,
        "recipe": p.recipe_name,
        "recipe SHA-256": p.recipe_sha256,
        "dataset SHA-256": ", ".join(p.dataset_sha256) if p.dataset_sha256 else None,
        "images in the dataset": counts,
        "steps": p.step,
        "images seen": p.images_seen,
        "medpretrain": p.medpretrain_version,
        "torch": p.torch_version,
        "timm": p.timm_version,
    }
    made_from = "\n".join(f"| {key} | {_shown(value)} |" for key, value in rows.items())
    return f"""---
{chr(10).join(front)}
---

# {name}

A `{architecture}` backbone without a classifier, pretrained on medical images with medpretrain.
An image of {size} x {size} pixels and {preprocessing.channels} channel(s) becomes {features} features.

## How to load it

In this folder, with timm and Pillow:

```python
{_loading(stem, preprocessing)}
```

{_preparation(stem, preprocessing)}
## What it was made from

| | |
| --- | --- |
{made_from}

| about the data | |
| --- | --- |
| source, setting and dates | {NOT_PROVIDED} |
| patients: number, age, sex, ethnicity | {NOT_PROVIDED} |
| devices and acquisition | {NOT_PROVIDED} |
| inclusion and exclusion | {NOT_PROVIDED} |
| ethics approval and consent | {NOT_PROVIDED} |

## Intended use

A starting point for research: frozen features, or weights to fine-tune on a labelled task.

## Limits

- It is not a medical device. It makes no diagnosis and has not been tested in clinical use.
- Images from other devices, hospitals or patients than those it saw may be represented badly.
- Performance on any task, overall and by subgroup: {NOT_PROVIDED}. Measure it on your own data before you rely on it.
- Weights can retain something of their training images; treat them as your agreement on those images says.

## Licence and contact

Licence: other, that is: {NOT_PROVIDED}. It depends on the agreement on the training images.
Contact: {NOT_PROVIDED}. Funding: {NOT_PROVIDED}.
"""


def enlargement_note(size: int) -> str:
    """Why a 3x3-stem export asks for images twice as large, for the card and the config."""
    return (
        f"trained on {size} x {size} pixels with a 3x3 first convolution of stride 1, stored as an equal 7x7 one of "
        f"stride 2: prepare the image at {size} x {size}, then repeat each pixel twice in both directions (2x, nearest)"
    )


def _preparation(stem: Stem, preprocessing: Preprocessing) -> str:
    size = preprocessing.size
    text = (
        f"`preprocessing.json` holds the same in numbers: squash to {size} x {size} (bilinear, antialiased; the aspect "
        f"ratio is not kept), divide by {2**preprocessing.bit_depth - 1}, subtract the mean, divide by the deviation.\n"
    )
    if stem == "timm":
        return text
    return text + (
        f"\n**The image must be enlarged twice.** This backbone was {enlargement_note(size)}. "
        f"timm's own transform resizes to {2 * size} x {2 * size} in one step, which is not the same.\n"
    )


def _loading(stem: Stem, preprocessing: Preprocessing) -> str:
    size, channels, depth = preprocessing.size, preprocessing.channels, preprocessing.bit_depth
    mode = {(1, True): "L", (1, False): "F", (3, True): "RGB"}.get((channels, depth <= 8))
    lines = ["import json, numpy, timm, torch"]
    if mode:
        lines += [
            "from PIL import Image",
            "",
            'p = json.load(open("preprocessing.json"))',
            f'image = Image.open("image.png").convert("{mode}").resize(({size}, {size}), Image.Resampling.BILINEAR)',
            f'x = torch.from_numpy(numpy.array(image, "float32")).view(1, {size}, {size}, {channels}) / {2**depth - 1}',
        ]
    else:
        lines += [
            "",
            'p = json.load(open("preprocessing.json"))',
            f"x = torch.rand(1, {size}, {size}, {channels})  # here: your image, scaled to [0, 1]",
        ]
    lines.append('x = ((x - torch.tensor(p["mean"])) / torch.tensor(p["std"])).permute(0, 3, 1, 2)')
    if stem == "3x3":
        lines.append("x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)  # the 2x nearest enlargement")
    lines.append('features = timm.create_model("local-dir:.", pretrained=True).eval()(x)')
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return NOT_PROVIDED if value is None else str(value)
