"""What one process of test_features.py does: `python feature_ranks.py FOLDER CASES`.

CASES is JSON, each with `name`, `shards`, `count`, `cache` (a folder or null). The features of so many images, in a
changed order, go to `FOLDER/NAME-{rank}.npy`; where they cannot be taken, the error goes to a `.txt` of that name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.dataset import Dataset
from medpretrain.evaluation.features import features
from medpretrain.evaluation.source import open_source
from medpretrain.training.process import joined


def main(folder: Path, cases: list[dict[str, Any]]) -> None:
    with joined("cpu") as process:
        for case in cases:
            dataset = Dataset.open(case["shards"])
            source = open_source("random:resnet10t", dataset=dataset, size=32)
            rows = np.random.default_rng(3).permutation(len(dataset))[: case["count"]]
            cache = case["cache"] and Path(case["cache"])
            stem = folder / f"{case['name']}-{process.rank}"
            try:
                np.save(f"{stem}.npy", features(source, dataset, rows, process=process, cache=cache))
            except Exception as error:
                Path(f"{stem}.txt").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
