"""DINO: a student learns the output of a slowly following teacher on other crops (Caron et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from medpretrain.data.batches import Batch, Views
from medpretrain.losses.distillation import dino_loss
from medpretrain.losses.gather import mean_over_ranks
from medpretrain.methods.base import Backbone, Method, MethodOptions, Outputs, Progress, TrainingSet, image_first
from medpretrain.models.ema import follow, frozen_copy
from medpretrain.models.heads import DinoHead
from medpretrain.training.schedules import cosine

Fraction = Annotated[float, Ge(0), Le(1)]


class DinoOptions(MethodOptions):
    """Defaults are the paper's for ViT-S/16."""

    name: Literal["dino"] = "dino"
    prototypes: Annotated[int, Gt(1)] = 65536
    hidden: Annotated[int, Gt(0)] = 2048
    bottleneck: Annotated[int, Gt(0)] = 256
    student_temperature: Annotated[float, Gt(0)] = 0.1
    teacher_temperature: Annotated[float, Gt(0)] = 0.04
    warmup_teacher_temperature: Annotated[float, Gt(0)] | None = None
    """Where the teacher's temperature starts; it rises linearly during `teacher_warmup` of all steps."""
    teacher_warmup: Fraction = 0.0
    teacher_momentum: Fraction = 0.996
    """Rises to 1 on a cosine."""
    center_momentum: Fraction = 0.9
    freeze_last_layer_epochs: Annotated[float, Ge(0)] = 1.0


class Dino(Method):
    options = DinoOptions
    view_kinds: ClassVar[Mapping[str, int]] = {"global": 1, "local": 0}
    collapse_causes = "a lower optim.lr, method.teacher_temperature or method.center_momentum are the usual cures"
    freezable = ("student_head.prototypes",)
    center: Tensor

    def __init__(self, options: DinoOptions, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(options, backbone, data)
        self.opt = options
        self.student = backbone
        self.student_head = DinoHead(
            backbone.num_features, hidden=options.hidden, bottleneck=options.bottleneck, prototypes=options.prototypes
        )
        self.teacher, self.teacher_head = frozen_copy(self.student), frozen_copy(self.student_head)
        self.register_buffer("center", torch.zeros(options.prototypes))

    def forward(self, views: Views) -> Outputs:
        """`student` (n, S, K), `teacher` (n, T, K), global views first, and the teacher's `features`."""
        n = len(views["global"][0])
        # Views of one size share a pass.
        passes = [torch.cat(views[name]) for name in self.view_kinds if name in views]
        student = torch.cat([self.student_head(self.student(crops)) for crops in passes])
        with torch.no_grad():
            features = self.teacher(passes[0])
            teacher = self.teacher_head(features)
        return {
            "student": image_first(student, len(student) // n),
            "teacher": image_first(teacher, len(teacher) // n),
            "features": image_first(features, len(features) // n),
        }

    def loss(self, outputs: Outputs, batch: Batch, progress: Progress) -> Tensor:
        return dino_loss(
            outputs["student"].transpose(0, 1),
            outputs["teacher"].transpose(0, 1),
            self.center,
            student_temperature=self.opt.student_temperature,
            teacher_temperature=self.teacher_temperature(progress),
        )

    def teacher_temperature(self, progress: Progress) -> float:
        start, end = self.opt.warmup_teacher_temperature, self.opt.teacher_temperature
        if start is None or progress.fraction >= self.opt.teacher_warmup:
            return end
        return start + (end - start) * progress.fraction / self.opt.teacher_warmup

    def frozen(self, progress: Progress) -> bool:
        return progress.epoch < self.opt.freeze_last_layer_epochs

    @torch.no_grad()
    def after_update(self, outputs: Outputs, batch: Batch, progress: Progress) -> None:
        momentum = cosine(progress.step, total=progress.total, start=self.opt.teacher_momentum, end=1.0)
        follow(self.teacher, self.student, momentum)
        follow(self.teacher_head, self.student_head, momentum)
        batch_center = mean_over_ranks(outputs["teacher"].to(self.center.dtype).mean(dim=(0, 1)))
        self.center.lerp_(batch_center, 1 - self.opt.center_momentum)

    @property
    def exported(self) -> nn.Module:
        return self.teacher

    @property
    def trained(self) -> nn.Module:
        return self.student
