"""DeepSpeed's ZeRO: optimizer state, gradients and parameters in parts, stage by stage."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from medpretrain.checkpoints.parts import Part
from medpretrain.data.batches import Views
from medpretrain.methods.base import Method, Outputs
from medpretrain.recipe import Recipe
from medpretrain.training.process import Process
from medpretrain.training.strategies.base import MakeOptimizer, Strategy, copied, state_of

_BUCKET = 1 << 25
"""Elements reduced or gathered at once: 128 MiB of float32, of which DeepSpeed holds a buffer all the time."""


@dataclass(frozen=True)
class _Place:
    """Where this process's elements of a trained parameter are.

    Attributes:
        flat: the optimizer's parameter that they are in, with others of their group.
        offset: of the first of them in `flat`.
        count: how many there are; may be 0.
        start: the place of the first in the parameter itself, row by row.
        gradient: the keys of their gradient in DeepSpeed's lists; None where there are none.
    """

    flat: Tensor
    offset: int
    count: int
    start: int
    gradient: tuple[int, int] | None


class DeepSpeed(Strategy):
    """A DeepSpeed engine around the method. Stage 0 keeps all whole; 1 has the optimizer's state in parts and a second
    copy of this process's part of the weights; 2 gradients too; 3 parameters too, those of the networks that only
    follow among them.

    The optimizer sees one flat tensor for each of its groups, so it must treat elements alone.
    """

    def __init__(self, method: Method, recipe: Recipe, process: Process, make_optimizer: MakeOptimizer) -> None:
        super().__init__(method, recipe, process)
        self._stage = recipe.train.zero_stage
        if self._bf16:
            # Inside the method: the engine ends an autocast that it finds around itself.
            method.forward = torch.autocast(process.device.type, torch.bfloat16)(method.forward)  # type: ignore[method-assign]
        parameters = dict(method.named_parameters())
        self._parameters = [parameters[name] for name in self.names]
        # While parameters have their shapes and are still apart: a group's name and scale depend on them.
        self.optimizer = make_optimizer(dict(zip(self.names, self._parameters, strict=True)), self.whole_norms)
        if not dist.is_initialized():  # a process alone; DeepSpeed wants a group
            assert process.world == 1
            backend = "nccl" if process.device.type == "cuda" else "gloo"
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", str(process.local_rank))
        os.environ.setdefault("DS_ACCELERATOR", process.device.type)  # or it takes a GPU that the run does not use
        import deepspeed

        if process.device.type == "cpu":
            # Sums go through gloo: a kernel for memory that processes share would be compiled first, for minutes.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._engine, *_ = deepspeed.initialize(
            model=method,
            optimizer=self.optimizer,
            model_parameters=self._parameters,
            config=_config(recipe, process),
            dist_init_required=False,
        )
        self._zero: Any = self._engine.optimizer if self._stage else None
        self._places = self._located()
        self.trained = self._parameters
        if self._stage == 3:
            self.trained = [
                nn.Parameter(whole.ds_tensor[: place.count])  # type: ignore[attr-defined]
                for whole, place in zip(self._parameters, self._places, strict=True)
            ]

    @property
    def _wrapped(self) -> nn.Module:
        engine: nn.Module = self._engine
        return engine

    def forward(self, views: Views) -> Outputs:
        outputs: Outputs = self._engine(views)
        return outputs

    def backward(self, values: Sequence[Tensor], gradients: Sequence[Tensor], *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # The engine wants a scalar: the gradients of this one are those given, to the bit.
        products = [(value * gradient).sum().float() for value, gradient in zip(values, gradients, strict=True)]
        self._engine.backward(torch.stack(products).sum(), scale_wrt_gas=False)

    def gradients(self) -> list[Tensor | None]:
        if self._stage == 0:
            return [parameter.grad for parameter in self._parameters]
        return [self._gradient(place) for place in self._places]

    def _gradient(self, place: _Place) -> Tensor | None:
        if place.gradient is None:
            return None
        group, index = place.gradient
        gradient: Tensor = self._zero.averaged_gradients[group][index]
        return gradient.view(-1)[: place.count]  # what is behind is padding

    def whole_norms(self, norms_N: Tensor, trained: Sequence[Tensor]) -> Tensor:
        if self._stage == 0 or self.process.world == 1:
            return norms_N
        # In float64, or the square of a large norm would be infinite.
        squares = norms_N.to(self.process.device, torch.float64).square()
        dist.all_reduce(squares)
        return squares.sqrt().to(norms_N.dtype)

    def step(self) -> None:
        self._engine.step()
        assert self._engine.was_step_applied()
        self._forget()

    def drop_gradients(self) -> None:
        self._engine.zero_grad()
        if self._stage:
            self._zero.zero_grad(set_to_none=True)
            for kept in (self._zero.averaged_gradients, getattr(self._zero, "all_grad_tensors", {})):
                for group in kept:
                    kept[group] = None
        self._forget()

    def _forget(self) -> None:
        """Stage 3 would take the last gradient for that of a parameter that has none in the next step."""
        if self._stage == 3:
            self._zero.parameter_offload.partition_all_parameters()
            self._zero.grad_partitions_flat_buffer.zero_()

    def parts(self) -> Iterator[Part]:
        if self._stage == 3:
            self._zero.parameter_offload.partition_all_parameters()
        parameters = dict(self.method.named_parameters(remove_duplicate=False))
        for name, value in self.method.state_dict().items():
            if self._stage == 3 and name in parameters:
                start, count = self._range(parameters[name])
                whole: Any = parameters[name]
                yield Part(
                    f"method.{name}", tuple(whole.ds_shape), whole.ds_tensor.detach()[:count], start, copied=False
                )
            else:
                yield from copied({name: value}, "method.")
        for name, parameter, place in zip(self.names, self._parameters, self._places, strict=True):
            prefix, shape = f"optimizer.{name}.", tuple(getattr(parameter, "ds_shape", parameter.shape))
            for key, value in state_of(self.optimizer, place.flat).items():
                if self._stage and value.shape == place.flat.shape:
                    part = value.detach()[place.offset : place.offset + place.count]
                    yield Part(f"{prefix}{key}", shape, part, place.start, copied=False)
                else:
                    yield from copied({key: value}, prefix)

    def loaded(self) -> None:
        """The parameters have been read; stages 1 and 2 step a copy of this process's part of them."""
        if self._stage:
            self._zero.refresh_fp32_params()

    def _located(self) -> list[_Place]:
        if self._stage == 0:
            return [_Place(one, 0, one.numel(), 0, None) for one in self._parameters]
        groups = self._zero.fp16_groups if self._stage == 3 else self._zero.bit16_groups
        found: dict[Tensor, _Place] = {}
        for number, group in enumerate(groups):
            if self._stage == 3:
                flat, offset = self._zero.fp32_partitioned_groups_flat[number], 0
                for index, parameter in enumerate(group):
                    start, count = self._range(parameter)
                    found[parameter] = _Place(flat, offset, count, start, (number, index) if count else None)
                    offset += parameter.partition_numel()
                continue
            flat = self._zero.single_partition_of_fp32_groups[number]
            for parameter in group:
                here = parameter._hp_mapping
                if here is None:
                    found[parameter] = _Place(flat, 0, 0, 0, None)
                    continue
                count, start = here.lp_fragment_address.numel, here.lp_fragment_address.start
                gradient = (number, parameter._index_in_param_group)
                found[parameter] = _Place(flat, here.hp_fragment_address.start, count, start, gradient)
        return [found[parameter] for parameter in self._parameters]

    def _range(self, parameter: Any) -> tuple[int, int]:
        """Where this process's part of a parameter of stage 3 starts, and how many elements are no padding."""
        start = min(self.process.rank * parameter.partition_numel(), parameter.ds_numel)
        return start, min(parameter.partition_numel(), parameter.ds_numel - start)


def _config(recipe: Recipe, process: Process) -> dict[str, Any]:
    """What the engine is to do, spelled out: its defaults change, and clip gradients."""
    train = recipe.train
    zero: dict[str, Any] = {"stage": train.zero_stage}
    if train.zero_stage:
        zero |= {
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": process.device.type == "cuda",
            "reduce_bucket_size": _BUCKET,
            "allgather_bucket_size": _BUCKET,
            "round_robin_gradients": False,
            "parameter_alignment": False,
            "ignore_unused_parameters": True,
        }
    if train.zero_stage in (1, 2):
        zero["compute_grad_norm"] = False  # a step that is not finite does not come this far
    if train.zero_stage == 3:
        zero |= {
            "sub_group_size": 1_000_000_000,
            "stage3_prefetch_bucket_size": _BUCKET,
            "stage3_param_persistence_threshold": 0,  # what stays whole is not what `held` says
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 0,  # by default networks of less than 10^9 parameters are never let go
        }
    return {
        "train_micro_batch_size_per_gpu": max(1, train.global_batch // process.world // train.micro_batches),
        "gradient_accumulation_steps": 1,  # each backward pass says whether it is the last
        "gradient_clipping": 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "wall_clock_breakdown": False,
        "log_level": "warning",
    }
