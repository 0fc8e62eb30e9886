"""What a YAML file in `configs/` may say: typed and strict, so that a typing error costs a second and not a week.

Imports no torch: a recipe can be read and shown where none is installed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, BeforeValidator, ConfigDict, FiniteFloat, field_serializer, model_validator

from medpretrain.data.views import View
from medpretrain.tracking.redaction import redact

Fraction = Annotated[float, Ge(0), Le(1)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Count = Annotated[int, Ge(1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _one_or_several(given: Any) -> Any:
    """A folder may stand alone where a list of them may stand."""
    if given is None or isinstance(given, str):
        return (given,) if given else ()
    if not isinstance(given, list | tuple):
        raise ValueError("give a folder, or a list of folders")
    return tuple(given)


class Balance(_Section):
    label: str
    """A label kind of the dataset; it need not be among `data.labels`. Images where it is unknown are left out."""
    how: Literal["over", "under"]
    """over: each class goes through epochs of its own, small ones more often; an epoch is as many images as the split
    has. under: of each class as many images as the smallest has, always the same; an epoch is those images."""


class Data(_Section):
    path: Annotated[tuple[str, ...], BeforeValidator(_one_or_several)] = ()
    """The folder that `medpretrain prep` wrote, or a list of such folders, trained on together."""
    weights: tuple[Annotated[FiniteFloat, Gt(0)], ...] = ()
    """How the datasets share each global batch, in any unit; a small one then goes through its own epochs more often.
    Without them every image is seen once an epoch. In both cases `epochs` counts as many images as there are."""
    split: str = "train"
    fraction: Annotated[float, Gt(0), Le(100)] = 100.0
    """Percent of the split's patients that are trained on; an image of an unknown patient counts as one. They are the
    same whatever `seed` is, and a smaller part lies in a larger one. mean and std stay those of the split."""
    channels: Literal[1, 3] = 3
    labels: tuple[str, ...] = ()
    """Label kinds that the method learns from."""
    mean: tuple[float, ...] | None = None
    """Of intensities in 0..1, a value a channel; where not given, those of the images as they are sampled."""
    std: tuple[Positive, ...] | None = None
    block_shards: Annotated[int, Ge(0)] = 0
    """0 shuffles fully; G shuffles shards, then samples within blocks of G shards."""
    balance: Balance | None = None
    """Gives the classes of a label, of those with images, equal shares of every global batch. A method is told class
    counts as they are then seen in an epoch; mean and std stay those of the split."""
    threads: Count | None = None
    """Decoding threads a process; by default its share of the cores."""
    trace: bool = False
    """Write the samples and augmentations that each rank saw to the run folder."""

    @model_validator(mode="after")
    def _a_weight_each(self) -> Data:
        if self.path and len(self.weights) not in (0, len(self.path)):
            raise ValueError(f"weights need one value for each of the {len(self.path)} datasets in data.path")
        return self

    @model_validator(mode="after")
    def _balance_alone(self) -> Data:
        if self.balance and self.weights:
            raise ValueError("balance and weights both say what a global batch is made of; give one of them")
        if self.balance and self.block_shards:
            raise ValueError("balance takes images from all shards, and block_shards from few; give one of them")
        return self

    @model_validator(mode="after")
    def _normalisation(self) -> Data:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std are given together or not at all")
        for values in (self.mean, self.std):
            if values is not None and len(values) != self.channels:
                raise ValueError(f"mean and std need one value for each of the {self.channels} channels")
        return self


class Backbone(_Section):
    name: str
    """Any timm architecture."""
    stem: Literal["timm", "3x3"] = "timm"
    """3x3: a ResNet's first convolution has a 3x3 kernel and stride 1."""
    pretrained: bool = False
    drop_path: Fraction = 0.0


class Optim(_Section):
    name: Literal["sgd", "adamw", "lars"]
    lr: Positive
    lr_batch: Count | None = None
    """If given, `lr` and `plain_lr` hold for this global batch and grow in proportion to it."""
    plain_lr: Positive | None = None
    """Highest learning rate of biases and norms (Barlow Twins); by default `lr`. It follows the same curve."""
    layer_decay: Annotated[float, Gt(0), Le(1)] | None = None
    """Factor on the learning rate from each layer of the backbone to the one before it (BEiT, MAE); heads have 1."""
    momentum: Fraction = 0.9
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: NotNegative = 0.0
    final_weight_decay: NotNegative | None = None
    """Reached at the end, on a cosine."""
    warmup: Fraction = 0.0
    """Part of all steps in which the learning rate rises linearly."""
    warmup_lr: NotNegative = 0.0
    final_lr: NotNegative = 0.0
    """Reached at the end, on a cosine."""
    clip: Positive | None = None
    """Largest gradient norm."""
    clip_each: bool = False
    """Clip each parameter by itself (DINO) instead of all together."""

    def scaled(self, global_batch: int) -> float:
        """The learning rate at a global batch."""
        return self.lr * global_batch / self.lr_batch if self.lr_batch else self.lr


class Train(_Section):
    steps: Count | None = None
    epochs: Positive | None = None
    global_batch: Count
    micro_batches: Count = 1
    """Forward passes a step on each process; the loss still sees all its embeddings together."""
    precision: Literal["fp32", "bf16"] = "fp32"
    deterministic: bool = False
    sync_batchnorm: bool = True
    """BatchNorm over the global batch and not a process's part."""
    threads: Count | None = None
    """CPU threads of a process for torch; by default its share of the cores."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed takes apart: 1 the optimizer's state, 2 gradients too, 3 parameters too. Read where `strategy` is
    deepspeed."""
    checkpoint_activations: bool = False
    """Keep only the inputs of the backbone's blocks, and compute the blocks again in the backward pass: less memory, a
    third more time."""
    compile: bool = False
    """Compile the backbone with torch.compile."""
    channels_last: bool = False
    """Convolutions in the channels-last layout of memory, which tensor cores like."""
    log_every: Count = 10

    @model_validator(mode="after")
    def _length(self) -> Train:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        return self


class Checkpoint(_Section):
    every: Count = 500
    """Steps; the last one always has a checkpoint."""
    keep: Count = 3
    """How many of the newest stay."""
    keep_every: Count | None = None
    """Those of steps that this divides stay too."""
    keep_best: Literal["loss"] | None = None
    """The one at which this metric, as it was last logged, was lowest stays too."""
    to: str | None = None
    """A folder or a URL such as s3://bucket/run; by default the folder `checkpoints` of the run."""
    background: bool = True
    """Write while training goes on."""


class Faults(_Section):
    """What a run puts up with."""

    skip: Annotated[int, Ge(0)] = 3
    """Steps one after another whose loss or gradient is not finite, and whose update is left out, before a rollback."""
    rollbacks: Annotated[int, Ge(0)] = 1
    """Returns to the last good checkpoint before the run stops."""
    replaced_samples: Annotated[int, Ge(0)] = 100
    """Images of a process that do not decode, and in whose place another is seen, before the run stops."""
    hang_s: Positive = 600.0
    """Seconds without progress after which the run is ended; the rank that hangs is named."""
    slow: Annotated[float, Gt(1)] = 1.5
    """A rank that takes this many times as long as the others is named."""
    restarts: Count = 3
    """Restarts by torchrun or SLURM, one after another from the same step, before the run stops."""


class Run(_Section):
    dir: str | None = None
    """Where checkpoints and metrics go; runs/NAME by default."""


class Tracking(_Section):
    uri: str | None = None
    """An MLflow tracking URI, or `none`; by default MLFLOW_TRACKING_URI, then mlflow.db beside the run folder.
    A password in it is used and never written down; better give MLFLOW_TRACKING_USERNAME and _PASSWORD."""
    experiment: str = "medpretrain"
    tensorboard: bool = False
    """Write TensorBoard's event files to the folder `tensorboard` of the run too."""

    @field_serializer("uri")
    def _without_password(self, uri: str | None) -> str | None:
        return uri and redact(uri)


_CHANGEABLE = (
    *("about", "run.", "tracking.", "checkpoint.", "faults.", "device", "strategy"),
    *("data.path", "data.threads", "data.trace", "train.threads", "train.log_every", "train.micro_batches"),
    *("train.zero_stage", "train.checkpoint_activations", "train.compile", "train.channels_last"),
)

OVERRIDABLE = ("optim.", "train.steps", "train.epochs", "train.precision", "backbone.drop_path")
"""What else may change at a resumption, where it is asked for by `--override`: nothing that changes a tensor's shape;
`optim.name` may not."""


class Recipe(_Section):
    """Everything a run depends on, but for the data itself."""

    name: str
    about: str = ""
    seed: Annotated[int, Ge(0)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    data: Data = Data()
    backbone: Backbone
    views: dict[str, View]
    method: dict[str, Any]
    """`name`, and the options of that method."""
    optim: Optim
    train: Train
    strategy: Literal["ddp", "fsdp2", "deepspeed"] = "ddp"
    """How the networks are spread over processes: whole on each, in parts by torch's FSDP2, or by DeepSpeed's ZeRO."""
    checkpoint: Checkpoint = Checkpoint()
    faults: Faults = Faults()
    run: Run = Run()
    tracking: Tracking = Tracking()

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir or f"runs/{self.name}")

    def resolved(self) -> dict[str, Any]:
        """Plain data, every default spelled out."""
        return self.model_dump(mode="json")

    def identity(self) -> dict[str, str | int | float | bool | None]:
        """The resolved values that decide what is trained, by dotted key.

        Left out is what may change between a run and its resumption: where data, run and tracker are (the data's
        identity is the hash of each dataset, in their order), device, threads, strategy, and how often is logged and
        saved.
        """
        return {key: value for key, value in flatten(self.resolved()) if not key.startswith(_CHANGEABLE)}

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


def flatten(data: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and scalar values of nested mappings and lists.

    >>> dict(flatten({"a": {"b": [1, 2]}}))
    {'a.b.0': 1, 'a.b.1': 2}
    """
    if isinstance(data, Mapping):
        children: Iterable[tuple[Any, Any]] = data.items()
    elif isinstance(data, list | tuple):
        children = enumerate(data)
    else:
        yield key, data
        return
    for name, value in children:
        yield from flatten(value, f"{key}.{name}" if key else str(name))
