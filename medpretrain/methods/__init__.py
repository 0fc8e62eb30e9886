"""The registry of methods: a name in a recipe, and the file that holds it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from data_prep.errors import UserError, nearest

if TYPE_CHECKING:
    from medpretrain.methods.base import Method

METHODS = {
    "amimv": "medpretrain.methods.amimv:Amimv",
    "barlow_twins": "medpretrain.methods.barlow_twins:BarlowTwins",
    "bcl": "medpretrain.methods.bcl:Bcl",
    "byol": "medpretrain.methods.byol:Byol",
    "dino": "medpretrain.methods.dino:Dino",
    "kcl": "medpretrain.methods.kcl:Kcl",
    "moco_v3": "medpretrain.methods.moco_v3:MocoV3",
    "modan_mulsupcon": "medpretrain.methods.modan_mulsupcon:ModAnMulSupCon",
    "nnclr": "medpretrain.methods.nnclr:Nnclr",
    "paco": "medpretrain.methods.paco:Paco",
    "ressl": "medpretrain.methods.ressl:ReSsl",
    "sbc": "medpretrain.methods.sbc:Sbc",
    "simclr": "medpretrain.methods.simclr:SimClr",
    "supcon": "medpretrain.methods.supcon:SupCon",
    "supervised": "medpretrain.methods.supervised:Supervised",
    "supervised_minority": "medpretrain.methods.supervised_minority:SupervisedMinority",
    "supervised_prototypes": "medpretrain.methods.supervised_prototypes:SupervisedPrototypes",
    "tsc": "medpretrain.methods.tsc:Tsc",
    "vicreg": "medpretrain.methods.vicreg:VicReg",
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
