"""Time and memory of NT-Xent and SupCon: ours, the full matrix in plain torch, lightly, pytorch-metric-learning.

    pip install -e '.[train,bench]'
    python benchmarks/contrastive.py [--sizes 256 1024 ...] [--turns 5] [--out benchmarks/results]

One forward and backward pass of N embeddings, N / 2 images in two views. The contestants take turns, each turn in a
process of its own: what its peak of resident memory adds to what was resident right before the first pass, and the
median time of the passes after it. A contestant that needs more memory or time than the limits is not asked again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from medpretrain.losses.instance import nt_xent
from medpretrain.losses.supervised import sup_con

WIDTH, TEMPERATURE, CLASSES = 128, 0.1, 10
OURS, FULL, LIGHTLY, METRIC = "ours", "full matrix", "lightly", "pytorch-metric-learning"
CONTESTANTS = {"NT-Xent": (OURS, FULL, LIGHTLY, METRIC), "SupCon": (OURS, FULL, METRIC)}
"""lightly has no supervised contrast."""
FEW_SECONDS = 5.0
"""A first pass longer than this is the only one, and is timed."""
Loss = Callable[[Tensor, Tensor], Tensor]


def full_nt_xent(z: Tensor, labels: Tensor) -> Tensor:
    x = F.normalize(z.flatten(0, 1), dim=1)
    logits = (x @ x.T / TEMPERATURE).masked_fill(torch.eye(len(x), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(x)).roll(len(x) // 2))


def full_sup_con(z: Tensor, labels: Tensor) -> Tensor:
    x, label = F.normalize(z.flatten(0, 1), dim=1), labels.repeat(2)
    own = torch.eye(len(x), dtype=torch.bool)
    logits = x @ x.T / TEMPERATURE
    log_p = logits - logits.masked_fill(own, -torch.inf).logsumexp(dim=1, keepdim=True)
    positive = (label[:, None] == label) & ~own
    return -((log_p * positive).sum(dim=1) / positive.sum(dim=1)).mean()


def contestant(loss: str, name: str) -> Loss:
    """From embeddings (2, N / 2, D) and labels (N / 2,) to the loss."""
    if name == OURS:
        if loss == "NT-Xent":
            return lambda z, labels: nt_xent(z, temperature=TEMPERATURE)
        return lambda z, labels: sup_con(z, labels, temperature=TEMPERATURE)
    if name == FULL:
        return full_nt_xent if loss == "NT-Xent" else full_sup_con
    if name == LIGHTLY:
        from lightly.loss import NTXentLoss

        theirs = NTXentLoss(temperature=TEMPERATURE)
        return lambda z, labels: theirs(z[0], z[1])
    from pytorch_metric_learning import losses

    if loss == "NT-Xent":
        pairs = losses.NTXentLoss(temperature=TEMPERATURE)
        return lambda z, labels: pairs(z.flatten(0, 1), torch.arange(len(labels)).repeat(2))
    supervised = losses.SupConLoss(temperature=TEMPERATURE)
    return lambda z, labels: supervised(z.flatten(0, 1), labels.repeat(2))


def inputs(size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    z = torch.randn(2, size // 2, WIDTH, dtype=dtype, requires_grad=True)
    return z, torch.randint(CLASSES, (size // 2,))


def resident(field: str) -> float:
    """MiB of VmRSS (now) or VmHWM (the peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def one(loss: str, name: str, size: int, gib: int) -> dict[str, float]:
    """What a turn measures; in a process of its own."""
    resource.setrlimit(resource.RLIMIT_DATA, (gib << 30, gib << 30))
    run = contestant(loss, name)
    run(*inputs(64)).backward()
    z, labels = inputs(size)

    def seconds() -> float:
        z.grad = None
        began = time.perf_counter()
        run(z, labels).backward()
        return time.perf_counter() - began

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    first = seconds()
    extra = resident("VmHWM") - before
    times = [first]
    if first < FEW_SECONDS:
        times = [seconds() for _ in range(max(3, min(50, int(1 / first))))]
    return {"seconds": statistics.median(times), "extra_mib": extra}


def turn(loss: str, name: str, size: int, gib: int, limit: float) -> dict[str, float] | str:
    """One turn, or why there is none."""
    command = [sys.executable, __file__, "--one", loss, name, "--sizes", str(size), "--gib", str(gib)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return f"over {limit:.0f} s"
    if done.returncode == 0:
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found
    # torch says "can't allocate memory"; the kernel kills.
    if done.returncode == -9 or "allocate memory" in done.stderr or "MemoryError" in done.stderr:
        return f"over {gib} GiB"
    raise RuntimeError(f"{loss}, {name}, N = {size}:\n{done.stderr}")


def differences(size: int = 256) -> dict[str, dict[str, list[float]]]:
    """Each contestant's relative distance from the full matrix in float64: value, and gradient by its largest entry."""
    found: dict[str, dict[str, list[float]]] = {}
    for loss, names in CONTESTANTS.items():
        found[loss] = {}
        z, labels = inputs(size, torch.float64)
        expected = contestant(loss, FULL)(z, labels)
        (expected_grad,) = torch.autograd.grad(expected, z)
        for name in names:
            value = contestant(loss, name)(z, labels)
            (grad,) = torch.autograd.grad(value, z)
            apart = (grad - expected_grad).abs().max() / expected_grad.abs().max()
            found[loss][name] = [abs(value.item() / expected.item() - 1), apart.item()]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 4096, 8192, 16384, 32768])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--gib", type=int, default=20, help="memory a contestant may take")
    parser.add_argument("--limit", type=float, default=300, help="seconds a turn may take")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(*options.one, options.sizes[0], options.gib)))
        return
    apart = differences()
    load = [os.getloadavg()[0]]
    found: dict[str, dict[str, dict[int, list[dict[str, float]]]]] = {}
    out: dict[str, dict[str, dict[int, str]]] = {}
    for loss, names in CONTESTANTS.items():
        found[loss], out[loss] = {name: {} for name in names}, {name: {} for name in names}
        for size in sorted(options.sizes):
            for number in range(options.turns):
                for name in names:
                    if out[loss][name]:
                        continue
                    result = turn(loss, name, size, options.gib, options.limit)
                    print(f"{loss}, N = {size}, turn {number + 1}: {name}: {result}", flush=True)
                    if isinstance(result, str):
                        out[loss][name][size] = result
                        found[loss][name].pop(size, None)
                    else:
                        found[loss][name].setdefault(size, []).append(result)
                load.append(os.getloadavg()[0])
    write(options, found, out, apart, load)


def write(
    options: argparse.Namespace,
    found: dict[str, dict[str, dict[int, list[dict[str, float]]]]],
    out: dict[str, dict[str, dict[int, str]]],
    apart: dict[str, dict[str, list[float]]],
    load: list[float],
) -> None:
    listed = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in listed if line.startswith("model name")), "?")
    machine = (
        f"{cpu}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads, "
        f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    )
    versions = {name: version(name) for name in ("torch", LIGHTLY, METRIC)} | {"Python": platform.python_version()}
    lines = [
        "# The contrastive core",
        "",
        f"`python benchmarks/contrastive.py --turns {options.turns}`: forward and backward, two views, "
        f"D = {WIDTH}, float32, T = {TEMPERATURE}, {CLASSES} classes; medians of {options.turns} interleaved turns, "
        f"each in a process of its own. At most {options.gib} GiB and {options.limit:.0f} s a turn.",
        "",
        f"{machine}; {', '.join(f'{name} {number}' for name, number in versions.items())}. "
        f"Load average while it ran: {min(load):.1f} to {max(load):.1f}, median {statistics.median(load):.1f}; "
        "the benchmark itself is about 2.",
    ]
    medians: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
    for loss, names in CONTESTANTS.items():
        medians[loss] = {
            name: {
                size: {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
                for size, turns in found[loss][name].items()
            }
            for name in names
        }
        heads = [f"{name}{unit}" for unit in (", ms", ", MiB") for name in names]
        lines += ["", f"## {loss}", "", f"| N | {' | '.join(heads)} |", f"| ---: |{' ---: |' * len(heads)}"]
        for size in sorted(options.sizes):
            cells = []
            for key, scale in (("seconds", 1000), ("extra_mib", 1)):
                for name in names:
                    full, own = (medians[loss][who].get(size, {}).get(key) for who in (FULL, name))
                    if own is None:
                        cells.append(out[loss][name].get(size, "-") if key == "seconds" else "-")
                    else:
                        ratio = f" ({own / full:.3g})" if full and name != FULL else ""
                        cells.append(f"{own * scale:.1f}{ratio}")
            lines.append(f"| {size} | {' | '.join(cells)} |")
        equal = "; ".join(f"{name} {value:.0e} and {grad:.0e}" for name, (value, grad) in apart[loss].items())
        text = "times the full matrix. Relative differences from its value and gradient in float64 at N = 256"
        lines += ["", f"In parentheses: {text}: {equal}."]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "contrastive.md").write_text("\n".join(lines) + "\n")
    data = {"machine": machine, "versions": versions, "load": load, "turns": found, "median": medians, "stopped": out}
    data |= {"relative_difference_value_gradient": apart}
    (options.out / "contrastive.json").write_text(json.dumps(data, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
