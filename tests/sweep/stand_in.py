"""Stands for `medpretrain train` and `medpretrain evaluate`: leaves their files at once.

$STAND_IN is a folder: `evaluation.json` is what an evaluation leaves, with an accuracy that `accuracy.json` may give by
run; `fail-NAME` makes a run's training end with 1, `wait-NAME` makes it wait for SIGTERM and end with 75. With a file
`really` trainings are medpretrain's own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def train(here: Path) -> None:
    words = dict(word.split("=", 1) for word in sys.argv[3:] if "=" in word)
    run = Path(words["run.dir"])
    if (here / f"fail-{run.name}").exists():
        print("error: nothing but bad luck", file=sys.stderr)
        sys.exit(1)
    run.mkdir(exist_ok=True)
    (run / "recipe.yaml").write_text(json.dumps(words))
    if (here / f"wait-{run.name}").exists():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        (here / f"waiting-{run.name}").touch()
        time.sleep(60)


def evaluate(here: Path) -> None:
    run = Path(sys.argv[3])
    content = json.loads((here / "evaluation.json").read_text())
    given = here / "accuracy.json"
    if given.is_file():
        for summary in content["summaries"]:
            summary["mean"]["accuracy"] = json.loads(given.read_text())[run.name]
    (run / "evaluation").mkdir(exist_ok=True)
    (run / "evaluation" / f"{sys.argv[2]}-exact-class.evaluation.json").write_text(json.dumps(content))


def main() -> None:
    here = Path(os.environ["STAND_IN"])
    with (here / "calls.jsonl").open("a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\n")
    if sys.argv[1] == "evaluate":
        evaluate(here)
    elif (here / "really").exists():
        os.execv(sys.executable, [sys.executable, "-m", "medpretrain", *sys.argv[1:]])
    else:
        train(here)


if __name__ == "__main__":
    main()
