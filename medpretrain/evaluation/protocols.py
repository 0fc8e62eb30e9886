"""The protocols: what a user asks for, and how one classifier of it is fitted and scores its test images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from medpretrain.evaluation.finetune import finetune_scores, finetune_setting
from medpretrain.evaluation.knn import knn_scores
from medpretrain.evaluation.labelled import Labelled
from medpretrain.evaluation.linear import linear_scores
from medpretrain.evaluation.plan import Images, Split
from medpretrain.evaluation.probe import probe_scores, probe_setting
from medpretrain.evaluation.results import Value
from medpretrain.evaluation.source import Source


class _Asked(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def draws_nothing(self) -> bool:
        """Whether it comes out the same every time."""
        return False

    @property
    def on_features(self) -> bool:
        """Whether features of the frozen backbone are all it needs."""
        return True


class Knn(_Asked):
    """The nearest training images vote, weighted by cosine similarity (`knn.py`)."""

    protocol: Literal["knn"] = "knn"
    variant: Literal["weighted"] = "weighted"
    k: Annotated[int, Field(ge=1)] = 200
    temperature: Annotated[float, Field(gt=0)] = 0.07

    @property
    def draws_nothing(self) -> bool:
        return True


class Linear(_Asked):
    """`exact`: logistic regression (`linear.py`); `amimv`, `modan`: trained as in those papers (`probe.py`)."""

    protocol: Literal["linear"] = "linear"
    variant: Literal["exact", "amimv", "modan"] = "exact"

    @property
    def draws_nothing(self) -> bool:
        return self.variant == "exact"


class FineTune(_Asked):
    """The backbone is trained too (`finetune.py`)."""

    protocol: Literal["finetune"] = "finetune"
    variant: Literal["report", "modan", "plain", "layer_decay"] = "report"

    @property
    def on_features(self) -> bool:
        return False


Asked = Knn | Linear | FineTune


@dataclass(frozen=True)
class Features:
    """Of the images of `Images.train`, `val` and `test`, in their order."""

    train_ND: NDArray[np.float32]
    val_ND: NDArray[np.float32]
    test_ND: NDArray[np.float32]


@dataclass(frozen=True)
class Scored:
    """Class scores of the test images of one split, and how they came about."""

    scores_MK: NDArray[np.float64]
    parameters: dict[str, Value]


def score(
    asked: Asked,
    split: Split,
    images: Images,
    source: Source,
    features: Features | None,
    device: torch.device,
    threads: int,
) -> Scored:
    """Fit the classifier of one split and score its test images.

    Args:
        asked: the protocol and its settings.
        split: whose.
        images: what its places are of.
        source: the backbone, for fine-tuning.
        features: None for fine-tuning.
        device: where it is fitted.
        threads: that decode images.
    """
    train = images.train
    labels, classes = train.labels_N[split.train], len(train.classes)
    # Repeats and folds differ in their random numbers, whatever the seed: a seed is spread over 2 ** 31.
    seed = int(np.random.SeedSequence([split.seed, split.repeat, split.fold or 0]).generate_state(1)[0] >> 1)
    if isinstance(asked, FineTune):
        val = part(images.val, split.val) if images.val else None
        tuned = finetune_scores(
            source.network(),
            part(train, split.train),
            part(images.test, split.test),
            source.preprocessing,
            finetune_setting(asked.variant),
            seed=seed,
            device=device,
            val=val,
            threads=threads,
        )
        return Scored(tuned.scores_MK, tuned.parameters)
    assert features is not None
    learned, measured = features.train_ND[split.train], features.test_ND[split.test]
    if isinstance(asked, Knn):
        train_ND, labels_N, test_MD = (torch.from_numpy(one).to(device) for one in (learned, labels, measured))
        scores = knn_scores(train_ND, labels_N, test_MD, classes, k=asked.k, temperature=asked.temperature)
        used: dict[str, Value] = {"k": min(asked.k, len(learned)), "temperature": asked.temperature}
        return Scored(scores.cpu().numpy(), used)
    if asked.variant == "exact":
        chosen_on = (features.val_ND[split.val], images.val.labels_N[split.val]) if images.val else None
        probe = linear_scores(learned, labels, measured, classes, val=chosen_on)
        used = {
            "C": probe.C,
            "chosen_on": probe.chosen_on,
            "iterations": probe.iterations,
            "converged": probe.converged,
            "gradient": probe.gradient,
        }
        return Scored(probe.scores, used)
    setting = probe_setting(asked.variant)
    scores_MK = probe_scores(learned, labels, measured, classes, setting, seed=seed, device=device)
    return Scored(scores_MK, {"seed": seed, **setting.model_dump(exclude={"name"}, exclude_none=True)})


def part(whole: Labelled, places: NDArray[np.int64]) -> Labelled:
    """Some of the images, in the order of the places."""
    return Labelled(
        whole.dataset,
        whole.rows_N[places],
        whole.labels_N[places],
        whole.patients_N[places],
        whole.classes,
        whole.left_out,
    )
