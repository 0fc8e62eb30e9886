"""KCL: contrast with a few keys of the class, as many for a rare class as for a common one (Kang et al. 2021)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, MinLen
from torch import Tensor

from data_prep.errors import UserError
from medpretrain.data.batches import Batch
from medpretrain.data.counter import purpose, uniform
from medpretrain.losses.gather import gather
from medpretrain.losses.k_positive import Targets, kcl, sample_positives
from medpretrain.methods.base import Backbone, LabelKinds, MethodOptions, Outputs, Progress, TrainingSet
from medpretrain.methods.momentum import MomentumEncoder, MomentumOptions, refuse_a_short_queue
from medpretrain.models.heads import projection_mlp
from medpretrain.models.queue import Queue

_POSITIVES = purpose("positives")


class KPositiveOptions(MomentumOptions):
    """What KCL and TSC share. The default of `positives` is for binary data; the paper's is 6, for 1000 classes."""

    temperature: Annotated[float, Gt(0)] = 0.07
    projector: Annotated[tuple[int, ...], MinLen(1)] = (2048, 128)
    queue: Annotated[int, Ge(1)] = 65536
    """Embeddings of earlier batches that are keys beside this one's."""
    positives: Annotated[int, Ge(1)] = 3
    """Keys of the class an image is pulled to, beside its own: K."""


class KclOptions(KPositiveOptions):
    name: Literal["kcl"] = "kcl"


class Kcl(MomentumEncoder):
    """Queries are first crops, keys the second crops and the queue, through the encoder that follows."""

    options: ClassVar[type[KPositiveOptions]] = KclOptions
    labels: ClassVar[LabelKinds] = "one"
    exact_views: ClassVar[bool] = True
    symmetric: ClassVar[bool] = False
    opt: KPositiveOptions

    def __init__(self, options: KPositiveOptions, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(options, backbone, data)
        self.opt = options
        self.data = data
        self._build(backbone, projection_mlp(backbone.num_features, options.projector))
        self.queue = Queue(options.queue, options.projector[-1], seed=data.seed)

    @classmethod
    def check(cls, options: MethodOptions, data: TrainingSet, global_batch: int) -> None:
        super().check(options, data, global_batch)
        assert isinstance(options, KPositiveOptions)
        refuse_a_short_queue(options, options.queue, global_batch)
        if sum(count > 0 for count in data.counts[data.label]) < 2:
            raise UserError(
                f"{options.name} tells classes apart, and all labelled images of the training split have one "
                f"{data.label!r}; give another data.labels"
            )

    def loss(self, outputs: Outputs, batch: Batch, progress: Progress) -> Tensor:
        queries = outputs["query"][:, 0]
        labels = batch.labels[self.data.label]
        mine = np.arange(batch.first, batch.first + len(queries))
        # Named by the image's place in the global batch, so that ranks cannot change them.
        draws = uniform(batch.seed, _POSITIVES, batch.step, mine[:, None], np.arange(self.opt.positives))
        own = torch.from_numpy(mine).to(queries.device)
        positives, mask = sample_positives(
            own, torch.cat([labels, self.queue.labels]), torch.from_numpy(draws).to(queries.device)
        )
        return kcl(
            queries,
            [gather(outputs["key"][:, 0].detach()), self.queue.embeddings],
            own,
            positives,
            mask,
            temperature=self.opt.temperature,
            targets=self.pull(labels[own]),
        )

    def pull(self, labels_A: Tensor) -> Targets | None:
        """What queries of these labels are pulled to beside keys."""
        return None

    @torch.no_grad()
    def after_update(self, outputs: Outputs, batch: Batch, progress: Progress) -> None:
        super().after_update(outputs, batch, progress)
        self.queue.push(gather(outputs["key"][:, 0]), batch.labels[self.data.label])
