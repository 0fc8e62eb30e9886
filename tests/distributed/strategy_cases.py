"""What one process of test_strategies.py does: `python strategy_cases.py FOLDER [CASE ...]`.

Many cases in one launch, since imports and DeepSpeed's start cost seconds. Rank 0 writes `FOLDER/world{n}.pt`: for each
case what the strategies found, parts put together from those of all ranks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import exactness as ex

from medpretrain.training.process import Process, joined
from medpretrain.training.trainer import Trainer

STRATEGIES = {"ddp": ("ddp", 0), "fsdp2": ("fsdp2", 0)} | {f"zero{stage}": ("deepspeed", stage) for stage in range(4)}
STEPS, WRITTEN = 8, 3
Whole = dict[str, Tensor]
OPTIM = {
    "dino": {"clip": 0.02, "clip_each": True, "final_weight_decay": 0.4},
    "modan_mulsupcon": {"clip": 0.1, "layer_decay": 0.7},
    "kcl": {"name": "sgd", "lr": 0.1, "plain_lr": 0.05},
}


def trainer(method: str, backbone: str, strategy: str, process: Process, **train: Any) -> tuple[Trainer, Any]:
    name, stage = STRATEGIES[strategy]
    chosen = ex.recipe(method, backbone, strategy=name, zero_stage=stage, **train)
    optim = chosen.optim.model_validate(chosen.optim.model_dump() | OPTIM.get(method, {}))
    chosen = chosen.model_copy(update={"optim": optim})
    return ex.trainer(chosen, process, torch.float32), chosen


def train(one: Trainer, chosen: Any, process: Process, steps: range) -> list[tuple[float, float]]:
    """Each step's loss and gradient norm; every process has losses of its own images."""
    found = []
    for step in steps:
        measured = one.step(ex.batch(chosen, step, process, torch.float32))
        assert measured.finite
        found.append((measured.loss.item(), measured.grad_norm.item()))
    return found


def whole(one: Trainer, process: Process) -> Whole:
    """Every tensor of the state, from the parts of all ranks; each element must come from one rank alone."""
    everyone: list[Any] = [None] * process.world
    mine = [(part, part.values.detach().clone()) for part in one.parts()]
    if process.world > 1:
        dist.all_gather_object(everyone, [(p.name, p.shape, v, p.start, p.copied) for p, v in mine])
    else:
        everyone = [[(p.name, p.shape, v, p.start, p.copied) for p, v in mine]]
    names = [[part[0] for part in parts] for parts in everyone]
    assert all(one == names[0] for one in names) and len(set(names[0])) == len(names[0])
    found = {}
    for same in zip(*everyone, strict=True):
        name, shape, first, _, copied = same[0]
        assert all(part[1] == shape and part[4] == copied for part in same), name
        if copied:
            assert all(torch.equal(part[2], first) for part in same), name
            found[name] = first.reshape(shape).contiguous()
            continue
        tensor, seen = torch.zeros(shape, dtype=first.dtype).view(-1), torch.zeros(shape, dtype=torch.int64).view(-1)
        for _, _, values, start, _ in same:
            tensor[start : start + len(values)] = values
            seen[start : start + len(values)] += 1
        assert bool((seen == 1).all()), name
        found[name] = tensor.view(shape)
    return found


def load(one: Trainer, tensors: Whole) -> None:
    names = set()
    for part in one.parts():
        tensor = tensors[part.name]
        assert tuple(tensor.shape) == part.shape, part.name
        if not part.copied:
            tensor = tensor.view(-1)[part.start : part.start + len(part.values)]
        part.values.copy_(tensor.reshape(part.values.shape))
        names.add(part.name)
    assert names == tensors.keys()
    one.loaded()


def followed(method: str, backbone: str, strategy: str, process: Process, **options: Any) -> dict[str, Any]:
    """Eight steps, the state after three, and an embedding of images between steps."""
    one, chosen = trainer(method, backbone, strategy, process, **options)
    losses = train(one, chosen, process, range(WRITTEN))
    written = whole(one, process)
    images = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(process.rank))
    one.method.eval()
    with torch.no_grad():
        embedded = one.method.embed(images)
    one.method.train()
    losses += train(one, chosen, process, range(WRITTEN, STEPS))
    return {"losses": losses, "written": written, "embedded": embedded, "end": whole(one, process)}


def gone_on(strategy: str, sources: dict[str, Whole], process: Process) -> dict[str, Any]:
    """Four steps from each of the states; the first is read by an object that has not stepped yet."""
    one, chosen = trainer("dino", "vit", strategy, process)
    found = {}
    for source, state in sources.items():
        load(one, state)
        losses = train(one, chosen, process, range(WRITTEN, WRITTEN + 4))
        found[source] = {"losses": losses, "end": whole(one, process)}
    return found


def skipped(strategy: str, process: Process) -> dict[str, Any]:
    """A step whose loss is NaN on the last rank alone, between others."""
    one, chosen = trainer("modan_mulsupcon", "resnet", strategy, process)
    losses = train(one, chosen, process, range(2))
    before = [(part.name, part.values.clone()) for part in one.parts()]
    loss = one.method.loss
    if process.rank == process.world - 1:
        one.method.loss = lambda *given: loss(*given) * torch.nan  # type: ignore[method-assign]
    assert not one.step(ex.batch(chosen, 2, process, torch.float32)).finite
    one.method.loss = loss  # type: ignore[method-assign]
    for (name, kept), part in zip(before, one.parts(), strict=True):
        assert torch.equal(kept, part.values), name
    losses += train(one, chosen, process, range(3, 5))
    return {"losses": losses, "end": whole(one, process)}


def unbroken(strategy: str, process: Process) -> dict[str, Any]:
    """The same without that step."""
    one, chosen = trainer("modan_mulsupcon", "resnet", strategy, process)
    losses = train(one, chosen, process, range(2)) + train(one, chosen, process, range(3, 5))
    return {"losses": losses, "end": whole(one, process)}


def case(name: str, process: Process, folder: Path) -> dict[str, Any]:
    kind, *given = name.split()
    if kind == "go_on":
        if process.world > 1:
            dist.barrier()
        first = torch.load(folder / "first.pt")
        sources = {strategy: found["written"] for strategy, found in first.items()}
        return {strategy: gone_on(strategy, sources, process) for strategy in given or STRATEGIES}
    if kind == "skip":
        return {one: {"skipped": skipped(one, process), "unbroken": unbroken(one, process)} for one in STRATEGIES}
    method, backbone, *options = given
    train = dict(option.split("=") for option in options)
    return {
        strategy: followed(method, backbone, strategy, process, **train)
        for strategy in STRATEGIES
        if not (method == "bcl" and strategy == "zero3")
    }


def main() -> None:
    folder, *names = sys.argv[1:]
    torch.set_num_threads(1)
    with joined("cpu") as process:
        found: dict[str, Any] = {}
        for name in names:
            found[name] = case(name, process, Path(folder))
            if name == "follow dino vit" and process.leads:
                torch.save(found[name], Path(folder) / "first.pt")
        everyone: list[Any] = [found]
        if process.world > 1:
            everyone = [None] * process.world
            dist.all_gather_object(everyone, found)
        if process.leads:
            torch.save(everyone, Path(folder) / f"world{process.world}.pt")


if __name__ == "__main__":
    main()
