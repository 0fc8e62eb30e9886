"""What one process of test_communication.py does: `python communication_ranks.py FOLDER`.

Each rank writes `FOLDER/rank{r}.json`: for each case the bytes that it sent in a step and those of the formula.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import overhead
from scaling_model import shapes

from medpretrain.recipe import Recipe
from medpretrain.training.communication import least_bytes, step_bytes
from medpretrain.training.process import joined
from medpretrain.training.trainer import Trainer

IMAGES, STEPS = 4, 2
CASES = {
    "dino": (
        "vit_tiny_patch16_224",
        {"global": {"size": 32, "count": 2}, "local": {"size": 16, "count": 2}},
        {"prototypes": 1024, "hidden": 256, "bottleneck": 64},
    ),
    "simclr": ("resnet18", {"crop": {"size": 32, "count": 2}}, {"projector": [64]}),
}
_BYTES_ACKED = 120  # where struct tcp_info of <linux/tcp.h> has tcpi_bytes_acked, a u64, since Linux 4.1


def acknowledged() -> int:
    """Bytes that the TCP connections of this process have delivered, without headers; needs no right of any kind."""
    total = 0
    for entry in os.scandir("/proc/self/fd"):
        try:
            if not os.readlink(entry.path).startswith("socket:"):
                continue
            copy = socket.socket(fileno=os.dup(int(entry.name)))
        except OSError:  # the descriptor of the folder itself
            continue
        with copy:
            if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM:
                info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
                total += struct.unpack_from("=Q", info, _BYTES_ACKED)[0]
    return total


def settled() -> int:
    """The count when no rank sends any more."""
    dist.barrier()
    time.sleep(0.1)
    return acknowledged()


def main() -> None:
    found = {}
    torch.set_num_threads(1)
    with joined("cpu") as process:
        for name, strategy, micro_batches in (
            ("dino", "ddp", 1),
            ("dino", "fsdp2", 1),
            ("simclr", "ddp", 2),
        ):
            backbone, views, options = CASES[name]
            chosen = Recipe.model_validate(
                {
                    "name": "counted",
                    "data": {"channels": 1, "mean": [0.5], "std": [0.5]},
                    "backbone": {"name": backbone},
                    "views": views,
                    "method": {"name": name, **options},
                    "optim": {"name": "adamw", "lr": 1e-3},
                    "train": {"steps": 9, "global_batch": IMAGES * process.world, "micro_batches": micro_batches},
                    "strategy": strategy,
                }
            )
            whole = overhead.one_batch(chosen, process)
            one = Trainer(overhead.network(chosen, process), chosen, process, total=9, steps_per_epoch=9.0)
            batch = replace(whole, micro=_cut(whole.micro[0], micro_batches))
            one.step(batch)  # buckets are made, connections opened
            before = settled()
            for _ in range(STEPS):
                assert one.step(batch).finite
            sent = (settled() - before) / STEPS
            step = shapes(chosen, IMAGES).exchanges(
                process.world, strategy=strategy, micro_batches=micro_batches, gloo=True
            )
            found[f"{name} {strategy}"] = {
                "sent": sent,
                "formula": step_bytes(step, process.world),
                "cut": [key for key, value in one.method.named_parameters() if isinstance(value, DTensor)],
                "least": least_bytes(step, process.world),
            }
        (Path(sys.argv[1]) / f"rank{process.rank}.json").write_text(json.dumps(found))


def _cut(views, parts):
    return [{name: [view.chunk(parts)[turn] for view in many] for name, many in views.items()} for turn in range(parts)]


if __name__ == "__main__":
    main()
