"""The registry of methods: a name in a recipe, and the file that holds it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from data_prep.errors import UserError, nearest

if TYPE_CHECKING:
    from medpretrain.methods.base import Method

METHODS = {
    "amimv": "medpretrain.methods.amimv:Amimv",
    "dino": "medpretrain.methods.dino:Dino",
    "modan_mulsupcon": "medpretrain.methods.modan_mulsupcon:ModAnMulSupCon",
    "simclr": "medpretrain.methods.simclr:SimClr",
    "supcon": "medpretrain.methods.supcon:SupCon",
    "supervised": "medpretrain.methods.supervised:Supervised",
}


def method_class(name: str) -> type[Method]:
    """The class of a method; importing it imports torch.

    Raises:
        UserError: no such method.
    """
    if name not in METHODS:
        raise UserError(f"there is no method {name!r}{nearest(name, METHODS)}")
    module, _, attribute = METHODS[name].partition(":")
    found: type[Method] = getattr(importlib.import_module(module), attribute)
    return found
