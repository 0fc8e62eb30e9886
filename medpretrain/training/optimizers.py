"""Optimizers: weight decay only where it belongs, learning rates by layer, LARS, and DINO's clip of each gradient."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, overload

import torch
from timm.models import group_parameters
from torch import Tensor, nn

from data_prep.errors import UserError, nearest

OptimizerName = Literal["sgd", "adamw", "lars"]

WholeNorms = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""Norms of whole tensors, (N,), from those of the parts that this process has, and the parts themselves."""


def build_optimizer(
    module_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    name: OptimizerName,
    lr: float,
    momentum: float,
    weight_decay: float,
    betas: tuple[float, float],
    plain_lr: float | None = None,
    lr_scales: Mapping[nn.Parameter, float] | None = None,
    freezable: Collection[str] = (),
    whole_norms: WholeNorms | None = None,
) -> torch.optim.Optimizer:
    """An optimizer over groups {"decay": True} with weight decay and {"decay": False} without.

    Parameters with at most one dimension (norms, layer scales) and biases are plain: not decayed, and with a learning
    rate of their own where `plain_lr` is given. Frozen parameters are left out, a shared one counts once, an empty
    group is dropped. Whoever schedules weight decay writes it to the groups with `decay` alone, and whoever schedules
    the learning rate writes its value times the group's `lr_scale`. A group marked `frozen` is not touched in a step.

    Args:
        module_parameters: what `module.named_parameters()` gives.
        name: "sgd", "adamw" or "lars".
        lr: learning rate, > 0.
        momentum: of sgd and lars; adamw does not read it.
        weight_decay: of the decayed groups; decoupled in adamw, added to the gradient in the other two.
        betas: of adamw; the other two do not read it.
        plain_lr: learning rate of the plain parameters, > 0; None: `lr`.
        lr_scales: factors on the learning rate of single parameters, see `layer_lr_scales`; 1 for all others.
        freezable: names of parameters that are frozen at times; their groups are marked with it.
        whole_norms: of lars, see there.

    Raises:
        UserError: an unknown name, or nothing to train.

    >>> layer = nn.Linear(3, 2)
    >>> optimizer = build_optimizer(
    ...     layer.named_parameters(), name="lars", lr=0.2, plain_lr=0.05, momentum=0.9, weight_decay=1e-6, betas=(0, 0)
    ... )
    >>> [(group["decay"], group["weight_decay"], group["lr"]) for group in optimizer.param_groups]
    [(True, 1e-06, 0.2), (False, 0.0, 0.05)]
    """
    parts: dict[tuple[bool, float, bool], list[nn.Parameter]] = defaultdict(list)
    seen: set[int] = set()
    for path, parameter in module_parameters:
        if not parameter.requires_grad or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        plain = parameter.ndim <= 1 or path.rpartition(".")[2] == "bias"
        scale = 1.0 if lr_scales is None else lr_scales.get(parameter, 1.0)
        if plain and plain_lr is not None:
            scale *= plain_lr / lr
        parts[not plain, scale, path in freezable].append(parameter)
    if not parts:
        raise UserError("there is nothing to train: every parameter is frozen")
    groups: list[dict[str, Any]] = [
        {
            "params": parameters,
            "decay": decayed,
            "weight_decay": weight_decay if decayed else 0.0,
            "lr": lr * scale,
            "lr_scale": scale,
            "freezable": may_freeze,
            "frozen": False,
        }
        for (decayed, scale, may_freeze), parameters in sorted(parts.items(), key=lambda part: not part[0][0])
    ]
    optimizer: torch.optim.Optimizer
    if name == "sgd":  # torch's fused one fails where a parameter has its first gradient later than the others
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum)
    elif name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    elif name == "lars":
        optimizer = Lars(groups, lr=lr, momentum=momentum, whole_norms=whole_norms)
    else:
        raise UserError(f"unknown optimizer {name!r}{nearest(name, ['sgd', 'adamw', 'lars'])}")
    optimizer.register_step_pre_hook(_leave_out_frozen)
    return optimizer


def _leave_out_frozen(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        if group["frozen"]:
            for parameter in group["params"]:
                parameter.grad = None


def first_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The state of a parameter before its first step, which the optimizer takes for none at all."""
    if isinstance(optimizer, torch.optim.AdamW):
        moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.zeros((), device=parameter.device), **moments}
    return {"momentum_buffer": torch.zeros_like(parameter)} if optimizer.defaults["momentum"] else {}


def layer_lr_scales(backbone: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """Layer-wise learning-rate decay (BEiT, Bao et al. 2022): a factor for each parameter of a backbone.

    Layer l of L, as timm groups them (stem 0, then the blocks, norms behind the last block with it), has
    decay ** (L - l): the last layer `decay`, whatever stands behind the backbone 1.

    Args:
        backbone: a timm model.
        decay: > 0 and <= 1; 0.65 to 0.75 in BEiT and MAE.

    Raises:
        UserError: timm does not say which of the backbone's layers come first.

    >>> import timm
    >>> vit = timm.create_model("test_vit", num_classes=0)
    >>> scales = layer_lr_scales(vit, 0.5)
    >>> scales[vit.norm.weight], scales[vit.blocks[0].attn.qkv.weight], scales[vit.pos_embed]
    (0.5, 0.015625, 0.0078125)
    """
    matcher = getattr(backbone, "group_matcher", None)
    if matcher is None:
        raise UserError(
            f"optim.layer_decay needs the order of the layers, which timm does not have for {type(backbone).__name__}; "
            "leave it out or give another backbone.name"
        )
    layers: dict[str, int] = group_parameters(backbone, matcher(coarse=False), reverse=True)
    depth = max(layers.values()) + 1
    return {parameter: decay ** (depth - layers[name]) for name, parameter in backbone.named_parameters()}


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling, algorithm 1 of You et al. 2017, for each parameter w with gradient g:

        local = eta * |w| / (|g| + weight_decay * |w|)        (1 where |w| or |g| is 0)
        v = momentum * v + lr * local * (g + weight_decay * w)
        w = w - v

    A group marked {"decay": False} takes plain momentum steps instead: local = 1, no weight decay (BYOL, Barlow Twins).
    The learning rate stands inside the momentum, as in the paper; some libraries put it outside, which differs while
    the rate changes.

    Args:
        params: parameters or groups; a group may carry `lr`, `momentum`, `weight_decay`, `eta`, `decay`.
        lr: learning rate, >= 0.
        momentum: from 0 to below 1.
        weight_decay: >= 0, added to the gradient.
        eta: the trust coefficient, > 0.
        whole_norms: norms of whole tensors from those of the parts that a process has, see `Strategy.whole_norms`.

    Raises:
        UserError: a value outside its range.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 0.001,
        whole_norms: WholeNorms | None = None,
    ) -> None:
        if not lr >= 0 or not 0 <= momentum < 1 or not weight_decay >= 0 or not eta > 0:
            raise UserError(
                "LARS needs lr >= 0, 0 <= momentum < 1, weight_decay >= 0 and eta > 0, "
                f"not {lr}, {momentum}, {weight_decay} and {eta}"
            )
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta, "decay": True}
        super().__init__(params, defaults)
        self._whole_norms = whole_norms or (lambda norms, _: norms)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weights in _alike([p for p in group["params"] if p.grad is not None]):
                self._update(weights, group)
        return loss

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        grads = [weight.grad for weight in weights if weight.grad is not None]
        if group["decay"]:
            decay = group["weight_decay"]
            weight_norms = self._whole_norms(torch.stack(torch._foreach_norm(weights)), weights)
            grad_norms = self._whole_norms(torch.stack(torch._foreach_norm(grads)), weights)
            ratios = group["eta"] * weight_norms / (grad_norms + decay * weight_norms)
            ratios = torch.where((weight_norms > 0) & (grad_norms > 0), ratios, torch.ones_like(ratios))
            deltas = torch._foreach_mul(torch._foreach_add(grads, weights, alpha=decay), list(ratios.unbind()))
            torch._foreach_mul_(deltas, group["lr"])
        else:
            deltas = torch._foreach_mul(grads, group["lr"])
        velocities = []
        for weight in weights:
            state = self.state[weight]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            velocities.append(state["momentum_buffer"])
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, deltas)
        torch._foreach_sub_(weights, velocities)


@torch.no_grad()
def l2_norms(tensors: Sequence[Tensor | None]) -> Tensor:
    """The L2 norm of each tensor, (N,), 0 where there is none.

    >>> l2_norms([torch.tensor([3.0, 4.0]), None])
    tensor([5., 0.])
    """
    there = [(place, tensor) for place, tensor in enumerate(tensors) if tensor is not None]
    norms = torch.zeros(len(tensors))
    if there:
        found = torch.stack(torch._foreach_norm([tensor for _, tensor in there]))
        norms = found.new_zeros(len(tensors))
        norms[[place for place, _ in there]] = found
    return norms


@torch.no_grad()
def clip_(gradients: Sequence[Tensor | None], norms_N: Tensor, max_norm: float, *, each: bool) -> None:
    """Scale gradients to an L2 norm of at most `max_norm`, in place.

    g = g * min(1, max_norm / (|g| + 1e-6)), where |g| is the norm of all together or, with `each`, of that gradient
    alone (DINO, Caron et al. 2021).

    Args:
        norms_N: of the whole gradients, of which `gradients` may be parts.
        max_norm: > 0; DINO uses 3.0.

    >>> gradient = torch.tensor([3.0, 4.0])
    >>> clip_([gradient], torch.tensor([5.0]), 1.0, each=True)
    >>> gradient
    tensor([0.6000, 0.8000])
    """
    assert max_norm > 0
    reference = norms_N if each else norms_N.norm().expand(len(norms_N))
    scales = (max_norm / (reference + 1e-6)).clamp(max=1.0)
    there = [(gradient, scales[place]) for place, gradient in enumerate(gradients) if gradient is not None]
    if there:
        torch._foreach_mul_([gradient for gradient, _ in there], [scale for _, scale in there])


def _alike(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Sort into lists of one device and dtype, since norms are stacked and scaled a list at a time."""
    lists: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        lists[tensor.device, tensor.dtype].append(tensor)
    return list(lists.values())
