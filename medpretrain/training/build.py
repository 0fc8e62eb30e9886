"""From a recipe to its networks, fresh or as a checkpoint left them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import nn

from data_prep.errors import UserError
from medpretrain.checkpoints import CheckpointInfo, Found, at, newest, open_target, read
from medpretrain.checkpoints.manifest import MANIFEST
from medpretrain.data.balance import BalancedOrder
from medpretrain.data.mixture import Mixture
from medpretrain.data.order import SampleSequence
from medpretrain.methods import method_class
from medpretrain.methods.base import Backbone, Method, TrainingSet
from medpretrain.models.backbones import create_backbone
from medpretrain.models.preprocessing import Preprocessing
from medpretrain.recipe import Recipe
from medpretrain.recipe_file import read_recipe
from medpretrain.training.start import RECIPE_FILE


def build_backbone(recipe: Recipe) -> Backbone:
    """The recipe's backbone with its initial weights, from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    backbone = create_backbone(
        recipe.backbone.name,
        channels=recipe.data.channels,
        stem=recipe.backbone.stem,
        image_size=image_size(recipe),
        pretrained=recipe.backbone.pretrained,
        drop_path=recipe.backbone.drop_path,
    )
    return cast("Backbone", backbone)


def training_set(recipe: Recipe, dataset: Mixture, order: SampleSequence | None = None) -> TrainingSet:
    """The images and labels a recipe trains on.

    Counts of classes are those of the split. Where `order` balances the classes of a label they are those of the images
    seen in an epoch, an image as often as it is: weights and priors by the split's counts would balance a second time.
    They are rounded, and 1 at least where any image is seen.

    Raises:
        UserError: no dataset has one of the labels.
    """
    rows = dataset.rows(recipe.data.split)
    times = order.times_N if isinstance(order, BalancedOrder) else np.ones(len(rows))
    classes = {kind: tuple(dataset.label_names(kind)) for kind in recipe.data.labels}
    counts = {}
    for kind, names in classes.items():
        ids = dataset.labels(kind)[rows]
        known = ids >= 0
        seen = np.bincount(ids[known], weights=times[known], minlength=len(names))
        # To six decimals first: sums of thirds must not part equal classes at a half.
        counts[kind] = tuple(np.maximum(np.rint(seen.round(6)), seen > 0).astype(int).tolist())
    return TrainingSet(len(rows), classes, counts, recipe.seed)


def build_method(recipe: Recipe, data: TrainingSet) -> Method:
    """The recipe's method with its initial weights.

    Raises:
        UserError: a backbone timm does not know; data or a batch that do not fit the method.
    """
    method = method_class(recipe.method["name"])
    options = method.options.model_validate_json(json.dumps(recipe.method), strict=True)
    method.check(options, data, recipe.train.global_batch)
    return method(options, build_backbone(recipe), data)


def refuse_batchnorm_of_one(method: nn.Module, recipe: Recipe, world: int) -> None:
    """Raises:
    UserError: a BatchNorm would see one image at a time, and normalise it to zero.
    """
    if not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in method.modules()):
        return
    train = recipe.train
    together = world if train.sync_batchnorm else 1
    if train.global_batch // (world * train.micro_batches) * together < 2:
        sync = "" if train.sync_batchnorm or world == 1 else "train.sync_batchnorm=true, "
        raise UserError(
            f"BatchNorm would see one image at a time: train.global_batch={train.global_batch} over {world} "
            f"processes x {train.micro_batches} micro-batches; set {sync}a larger train.global_batch or fewer "
            "train.micro_batches"
        )


def image_size(recipe: Recipe) -> int:
    """The pixels a side at which the backbone sees whole images: those of the method's first kind of view."""
    first = next(iter(method_class(recipe.method["name"]).view_kinds))
    return recipe.views[first].size


class DatasetFacts(TypedDict):
    """What a checkpoint keeps of its datasets together, which may be out of reach when the backbone is used."""

    bit_depth: int
    splits: dict[str, int]
    training: dict[str, Any]
    """Its `TrainingSet` as JSON."""
    windows: NotRequired[list[str | None]]
    """Of each dataset what `medpretrain prep dicom` was told as `--window`; None: images, which have none."""


@dataclass(frozen=True)
class TrainedRun:
    """What a run has come to: its recipe, its newest whole checkpoint, and the backbone in it."""

    folder: Path
    """The run's, also where one of its checkpoints was asked for: a checkpoint takes no other file."""
    recipe: Recipe
    info: CheckpointInfo
    backbone: nn.Module
    preprocessing: Preprocessing
    dataset: DatasetFacts
    checkpoint_sha256: str
    """Of the checkpoint's manifest, which holds those of its files."""


def load_run(run: Path) -> TrainedRun:
    """The backbone of a run, or of one of its checkpoints.

    Raises:
        UserError: no run there, or no whole checkpoint in it.
    """
    single = (run / MANIFEST).is_file()
    if single:
        found: Found | None = at(run)
    elif (run / RECIPE_FILE).is_file():
        to = read_recipe((run / RECIPE_FILE).read_text()).checkpoint.to
        found = newest(open_target(to, run))
    else:
        raise UserError(f"{run} is neither a run nor a checkpoint: it has no {RECIPE_FILE}")
    if found is None:
        raise UserError(f"the run in {run} has no whole checkpoint")
    recipe = read_recipe(found.info.recipe)
    dataset: DatasetFacts = found.info.extra["dataset"]
    method = build_method(from_scratch(recipe), TypeAdapter(TrainingSet).validate_python(dataset["training"]))
    method.load_state_dict(read(found, "method."))
    assert recipe.data.mean is not None
    assert recipe.data.std is not None
    preprocessing = Preprocessing(
        image_size(recipe), recipe.data.channels, recipe.data.mean, recipe.data.std, bit_depth=dataset["bit_depth"]
    )
    return TrainedRun(
        run.parent.parent if single else run,
        recipe,
        found.info,
        method.exported.eval(),
        preprocessing,
        dataset,
        found.sha256,
    )


def from_scratch(recipe: Recipe) -> Recipe:
    """The recipe without pretrained weights, for networks whose weights come from elsewhere."""
    return recipe.model_copy(update={"backbone": recipe.backbone.model_copy(update={"pretrained": False})})
