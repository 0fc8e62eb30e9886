"""`medpretrain` with faults put into its steps: python injected.py FAULTS.json train ...

FAULTS.json is a list of objects with `fault`, and where it happens: `rank` (all ranks if it is missing) and `steps`
(counted from 0; all if missing). `until`: a file whose existence ends it, made at the last of `steps`.

- nan: the loss is NaN.
- raise: `RuntimeError("injected")`.
- sleep: `seconds` at each step.
- wait: until the file `for` exists.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from medpretrain.cli import main
from medpretrain.methods.supervised import Supervised

FAULTS: list[dict] = []
RANK = int(os.environ.get("RANK", "0"))
loss_of = Supervised.loss


def happens(fault, step):
    if fault.get("rank", RANK) != RANK or step not in fault.get("steps", [step]):
        return False
    if "until" not in fault:
        return True
    over = Path(fault["until"])
    there = over.exists()
    if step == fault["steps"][-1]:
        over.touch()
    return not there


def loss(self, outputs, batch, progress):
    value = loss_of(self, outputs, batch, progress)
    for fault in FAULTS:
        if happens(fault, batch.step):
            match fault["fault"]:
                case "nan":
                    value = value * float("nan")
                case "raise":
                    raise RuntimeError("injected")
                case "sleep":
                    time.sleep(fault["seconds"])
                case "wait":
                    while not Path(fault["for"]).exists():
                        time.sleep(0.05)
    return value


if __name__ == "__main__":
    FAULTS = json.loads(Path(sys.argv.pop(1)).read_text())
    Supervised.loss = loss
    main()
