"""Checkpoints in parts: every process writes what it holds, and any number of processes reads it back.

    CHECKPOINTS/step-00001234/rank-00000-of-00002.safetensors   what process 0 of 2 wrote
    CHECKPOINTS/step-00001234/rank-00001-of-00002.safetensors
    CHECKPOINTS/step-00001234/manifest.json                     what it belongs to; which range of which tensor lies
                                                                where; bytes and SHA-256 of every file

Every strategy holds contiguous ranges of tensors laid out row-major, so a checkpoint is a set of named ranges (`Part`),
and who held which of them when it was written does not matter when it is read.
"""

from medpretrain.checkpoints.folder_target import FolderTarget
from medpretrain.checkpoints.manifest import CheckpointError, CheckpointInfo, OtherFormat
from medpretrain.checkpoints.parts import Part
from medpretrain.checkpoints.places import open_target
from medpretrain.checkpoints.reading import Found, aside_later, at, load, newest, read, verify
from medpretrain.checkpoints.saver import Outcome, Saver
from medpretrain.checkpoints.store_target import StoreTarget
from medpretrain.checkpoints.target import Target

__all__ = [
    "CheckpointError",
    "CheckpointInfo",
    "FolderTarget",
    "Found",
    "OtherFormat",
    "Outcome",
    "Part",
    "Saver",
    "StoreTarget",
    "Target",
    "aside_later",
    "at",
    "load",
    "newest",
    "open_target",
    "read",
    "verify",
]
