"""What can be evaluated: a run, an export, timm's pretrained weights, or the same networks untrained."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import nn

from data_prep.dataset import Dataset
from data_prep.errors import UserError, nearest
from medpretrain.checkpoints.manifest import MANIFEST
from medpretrain.data.mixture import Mixture
from medpretrain.data.views import View
from medpretrain.evaluation.augmented import view_of
from medpretrain.evaluation.results import SEED, SETTING, SourceRecord, Value
from medpretrain.export.description import PREPROCESSING
from medpretrain.export.reading import read_bundle
from medpretrain.models.backbones import create_backbone
from medpretrain.models.preprocessing import Preprocessing
from medpretrain.training.build import load_run
from medpretrain.training.start import RECIPE_FILE

TIMM, RANDOM = "timm:", "random:"
FORMS = (
    "a run's folder, one of its checkpoints, an export's folder, timm:NAME (timm's pretrained weights), random:NAME or "
    "random:FOLDER (the same network untrained)"
)
_LARGEST_DEFAULT = 224  # pixels; what networks are made for


@dataclass(frozen=True)
class Source:
    """A frozen network with what its images need."""

    name: str
    """How tables call it."""
    kind: Literal["run", "export", "timm", "random"]
    backbone: nn.Module
    """On the CPU, in eval mode: preprocessed images (n, C, S, S) to features (n, D)."""
    preprocessing: Preprocessing
    architecture: str
    """timm's name, without a tag."""
    sha256: str
    """Of architecture, weights and preprocessing: equal where features are."""
    about: dict[str, Value]
    """Where the weights come from."""
    view: View | None = None
    """How a run's images were augmented when it was trained; None for what is no run."""

    def record(self) -> SourceRecord:
        """What an evaluation writes down of it."""
        return SourceRecord(
            name=self.name, kind=self.kind, sha256=self.sha256, architecture=self.architecture, about=self.about
        )

    def network(self) -> nn.Module:
        """A copy of the backbone, to be changed by whoever asks."""
        return copy.deepcopy(self.backbone)


def open_source(spec: str, *, dataset: Dataset, seed: int | None = None, size: int | None = None) -> Source:
    """Open what a user names.

    Args:
        spec: one of
            - a run's folder (its newest checkpoint) or one of its checkpoints;
            - an export's folder;
            - `timm:NAME`: timm's weights, with the mean, std and size they were pretrained with. Images are squashed to
              a square as all others are; a crop that timm's own evaluation would take is not taken. To gray images
              the weights are adapted by timm, and mean and std are averaged;
            - `random:NAME`: timm's architecture with random weights and the dataset's own mean and std;
            - `random:FOLDER`: network and preprocessing of a run or an export, with random weights.
        dataset: what it is opened for: gives channels, bit depth and statistics to the forms that have none.
        seed: of random weights; left out, the run's own, which gives the weights it began with, or 0.
        size: pixels a side for `timm:` and `random:NAME`. Left out: what timm's weights were pretrained with; for an
            untrained network what its architecture is fixed to, else the median longer side of the images, up to 224
            and in steps of 32.

    Raises:
        UserError: none of these forms; an unknown name; weights out of reach, damaged, or of a newer medpretrain; a
            size for what has its own; images that do not fit (see `conversion`).
    """
    with torch.random.fork_rng(devices=[]):  # networks draw their first weights, also those that are loaded over
        source = _open(spec, dataset, seed, size)
    conversion(source.preprocessing, dataset)
    return source


def untrained(source: Source, seed: int | None = None) -> Source:
    """The same network and preprocessing with random weights, from a seed: by default the run's own, or 0."""
    stem: Any = source.about["stem"]
    if seed is None:
        seed = int(source.about.get(SEED) or 0)
    preprocessing = source.preprocessing
    backbone = _seeded(
        seed,
        lambda: create_backbone(
            source.architecture, channels=preprocessing.channels, stem=stem, image_size=preprocessing.size
        ),
    )
    about: dict[str, Value] = {SEED: seed, "stem": stem, "network_of": source.name}
    if SETTING in source.about:
        about[SETTING] = source.about[SETTING]
    made = _source(f"random ({source.architecture})", "random", backbone, preprocessing, source.architecture, about)
    return dataclasses.replace(made, view=source.view)


def conversion(preprocessing: Preprocessing, dataset: Dataset) -> str | None:
    """What must be done to a dataset's images so that a network sees its own kind of images; None: nothing.

    Colour and gray are converted, as in training on such images; whoever evaluates is to say so.

    Raises:
        UserError: the images are of another bit depth, as a run refuses too: intensities would mean something else.
    """
    if dataset.bit_depth != preprocessing.bit_depth:
        raise UserError(
            f"{dataset.path} has images of {dataset.bit_depth} bits and the network saw images of "
            f"{preprocessing.bit_depth}; prepare both alike"
        )
    if dataset.channels == preprocessing.channels:
        return None
    return "colour images as their luma" if dataset.channels == 3 else "gray images as three equal channels"


def _open(spec: str, dataset: Dataset, seed: int | None, size: int | None) -> Source:
    if spec.startswith(TIMM):
        return _timm(spec.removeprefix(TIMM), dataset, size)
    named = spec.removeprefix(RANDOM)
    folder = Path(named)
    if named != spec and not folder.is_dir():
        return _random(named, dataset, seed or 0, size)
    if size is not None:
        raise UserError(f"{named} has its own image size; a size is for timm:NAME and random:NAME")
    if (folder / MANIFEST).is_file() or (folder / RECIPE_FILE).is_file():
        source = _run(folder)
    elif (folder / PREPROCESSING).is_file():
        source = _export(folder)
    else:
        raise UserError(_no_such(spec, folder))
    return source if named == spec else untrained(source, seed)


def _run(folder: Path) -> Source:
    trained = load_run(folder)
    recipe, step = trained.recipe, trained.info.step
    about: dict[str, Value] = {
        "method": recipe.method["name"],
        "recipe": recipe.name,
        "recipe_sha256": recipe.sha256,
        "step": step,
        SEED: recipe.seed,
        SETTING: recipe.model_copy(update={"seed": 0}).sha256,
        "images_seen": step * recipe.train.global_batch,
        "dataset_sha256": ",".join(trained.info.dataset_sha256),
        "stem": recipe.backbone.stem,
    }
    name = trained.folder.resolve().name
    if trained.folder != folder:  # one of its checkpoints
        name = f"{name} (step {step})"
    source = _source(name, "run", trained.backbone, trained.preprocessing, recipe.backbone.name, about)
    return dataclasses.replace(source, view=view_of(recipe))


def _export(folder: Path) -> Source:
    loaded = read_bundle(folder)
    about: dict[str, Value] = {**loaded.provenance, "stem": loaded.stem}
    return _source(loaded.name, "export", loaded.backbone, loaded.preprocessing, loaded.architecture, about)


def _timm(name: str, dataset: Dataset, size: int | None) -> Source:
    channels = dataset.channels
    config = _known(name)
    side, other = config.input_size[1:]
    if side != other and size is None:
        raise UserError(f"{name} was pretrained on images of {side} x {other} pixels; give a size for square ones")
    size = size or side
    backbone = create_backbone(name, channels=channels, image_size=size, pretrained=True)
    mean, std = (tuple(map(float, values)) for values in (config.mean, config.std))
    if channels == 1:
        mean, std = ((sum(values) / len(values),) for values in (mean, std))
    about: dict[str, Value] = {"weights": f"{config.architecture}.{config.tag}", "stem": "timm"}
    preprocessing = Preprocessing(size, channels, mean, std, dataset.bit_depth)
    return _source(name, "timm", backbone, preprocessing, name, about)


def _random(name: str, dataset: Dataset, seed: int, size: int | None) -> Source:
    config = _known(name, may_be_folder=True)
    architecture = name.partition(".")[0]
    if size is None:
        size = config.input_size[1] if config.fixed_input_size else _fitting(dataset)
    mean, std = Mixture([dataset]).normalisation(next(iter(dataset.info.splits)), dataset.channels)
    preprocessing = Preprocessing(size, dataset.channels, mean, std, dataset.bit_depth)
    backbone = _seeded(seed, lambda: create_backbone(architecture, channels=dataset.channels, image_size=size))
    about: dict[str, Value] = {SEED: seed, "stem": "timm"}
    return _source(f"random ({name})", "random", backbone, preprocessing, architecture, about)


def _source(
    name: str,
    kind: Literal["run", "export", "timm", "random"],
    backbone: nn.Module,
    preprocessing: Preprocessing,
    architecture: str,
    about: dict[str, Value],
) -> Source:
    plain = architecture.partition(".")[0]  # a tag names where weights came from, and these have gone on from there
    backbone.eval()
    return Source(name, kind, backbone, preprocessing, plain, _identity(backbone, plain, preprocessing), about)


def _identity(backbone: nn.Module, architecture: str, preprocessing: Preprocessing) -> str:
    """SHA-256 over all that a feature depends on, but for the image."""
    said = ["medpretrain source 1", architecture, dataclasses.asdict(preprocessing)]
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    torch.default_generator.manual_seed(seed)
    return make()


def _known(name: str, *, may_be_folder: bool = False) -> Any:
    """timm's configuration of a model's weights."""
    architecture, _, tag = name.partition(".")
    if architecture not in timm.list_models():
        folder = f", and there is no folder {name}" if may_be_folder else ""
        raise UserError(f"timm has no model {name!r}{folder}{_close(architecture)}; what can be evaluated is {FORMS}")
    tagged = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tagged:
        raise UserError(f"timm has no weights {name!r}{nearest(name, tagged)}")
    return timm.get_pretrained_cfg(name)


def _close(name: str) -> str:
    hint = nearest(name, timm.list_models())
    return hint.rstrip("?") if "did you mean" in hint else ""  # not the first dozen of a thousand


def _fitting(dataset: Dataset) -> int:
    longer = sorted(dataset.sizes.max(axis=1).tolist())
    steps = round(min(longer[len(longer) // 2], _LARGEST_DEFAULT) / 32)
    return 32 * max(1, steps)


def _no_such(spec: str, folder: Path) -> str:
    if folder.is_dir():
        return f"{folder} is neither a run, a checkpoint nor an export; what can be evaluated is {FORMS}"
    if spec.partition(".")[0] in timm.list_models():
        return f"there is no folder {spec!r}; say timm:{spec} or random:{spec} for a network of timm's"
    return f"there is no folder {spec!r}{_close(folder.name)}; what can be evaluated is {FORMS}"
