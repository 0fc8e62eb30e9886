"""What an export's weights came from, for its card and for the headers of its files."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

NOT_PROVIDED = "not provided"

# A name is shown in a table and in YAML; a slash would be a path, which may name a patient or a person.
Name = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f/\\|<>\"]+$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class Provenance(BaseModel):
    """What the weights came from; None is shown as "not provided".

    Raises:
        ValueError: a hash that is not 64 hexadecimal digits, a negative count, a name with a slash.

    >>> Provenance(recipe_name="configs/demo.yaml", step=10).header()
    {'recipe': 'demo', 'step': '10'}
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
    checkpoint_sha256: Sha256 | None = None
    """Of its manifest, which holds the SHA-256 of every file of it."""
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

    def header(self) -> dict[str, str]:
        """What is known, as the strings that headers of files and tags of a registry take."""
        known = {
            "method": self.method,
            "recipe": self.recipe_name,
            "recipe_sha256": self.recipe_sha256,
            "dataset_sha256": ",".join(self.dataset_sha256) if self.dataset_sha256 else None,
            "checkpoint_sha256": self.checkpoint_sha256,
            "step": self.step,
            "images_seen": self.images_seen,
            "medpretrain_version": self.medpretrain_version,
            "torch_version": self.torch_version,
            "timm_version": self.timm_version,
        }
        return {key: str(value) for key, value in known.items() if value is not None}
