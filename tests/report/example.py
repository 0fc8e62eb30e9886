"""A small, seeded example of all that a report can show: four methods, two protocols, runs, spaces. Nothing is trained;
the scores are drawn, so that what is known of them (who is better, by how much) is known to the tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medpretrain.evaluation import results, space_record
from medpretrain.evaluation.intervals import summarise
from medpretrain.evaluation.metrics import metrics
from medpretrain.evaluation.results import DataRecord, Evaluation, Interval, Predictions, SourceRecord, Summary, Unit
from medpretrain.recipe_file import dump_recipe, load_recipe

CLASSES = {"class": ["benign", "malignant"], "organ": ["liver", "kidney_left", "spleen", "lung & airways"]}
METHODS = {"mulsupcon": 2.4, "simclr": 1.6, "supervised": 1.9, "random": 0.5}
"""How far apart the classes are in the scores of each."""
FRACTIONS = (1.0, 10.0, 100.0)


def source(name: str, kind: str = "run", **about: results.Value) -> SourceRecord:
    sha256 = f"{sum(map(ord, name)):x}".rjust(8, "a") * 8
    return SourceRecord(name=name, kind=kind, sha256=sha256, architecture="resnet18", about={"method": name} | about)


def data(label: str = "class", n_test: int = 120, **other: object) -> DataRecord:
    classes = CLASSES[label]
    counts = [n_test // len(classes) + (3 if k == 0 else 0) for k in range(len(classes))]
    given = {
        "name": "breastmnist",
        "sha256": "b" * 64,
        "label": label,
        "classes": classes,
        "train_split": "train",
        "test_split": "test",
        "test_name": "breastmnist",
        "test_sha256": "b" * 64,
        "train_counts": [40 * (k + 1) for k in range(len(classes))],
        "test_counts": counts,
        "left_out": {"train": 0, "test": 0},
        "patients": "known",
    }
    return DataRecord(**(given | other))


def evaluated(
    name: str,
    *,
    protocol: str = "linear",
    label: str = "class",
    fractions: Sequence[float] = (100.0,),
    repeats: int = 3,
    folds: int = 2,
    kind: str = "run",
    converged: bool = True,
    record: DataRecord | None = None,
    parameters: dict[str, results.Value] | None = None,
    strength: float | None = None,
    intervals: bool = True,
) -> tuple[Evaluation, Predictions]:
    """Normal scores whose means lie `strength` apart; two images a patient."""
    record = record or data(label)
    labels = np.repeat(np.arange(len(record.classes)), record.test_counts)
    strength = METHODS[name] if strength is None else strength
    units, parts = [], []
    for fraction in fractions:
        for repeat in range(repeats):
            draw = np.random.default_rng([sum(map(ord, name)), int(fraction * 10), repeat])
            order = np.random.default_rng(repeat).permutation(len(labels))
            for fold in range(max(1, folds)):
                rows = np.sort(order[fold :: max(1, folds)])
                of = labels[rows]
                shift = strength * (0.35 + 0.65 * np.log10(1 + fraction) / 2)
                logits = draw.normal(size=(len(rows), len(record.classes))) + shift * np.eye(len(record.classes))[of]
                scores = np.exp(logits)
                scores /= scores.sum(axis=1, keepdims=True)
                number = len(units)
                parts.append(
                    Predictions(np.full(len(rows), number, np.int32), rows, rows // 2, of.astype(np.int32), scores)
                )
                units.append(
                    Unit(
                        number=number,
                        fraction=fraction,
                        seed=0,
                        repeat=repeat,
                        fold=fold if folds else None,
                        n_train=int(sum(record.train_counts) * fraction / 100),
                        n_val=0,
                        n_test=len(rows),
                        parameters={"C": 1.0, "converged": converged},
                        metrics=metrics(scores, of, record.classes),
                    )
                )
    predictions = Predictions.joined(parts)
    evaluation = Evaluation(
        protocol=protocol,
        variant="exact" if protocol == "linear" else "weighted",
        parameters=parameters or {},
        source=source(name, kind),
        data=record,
        folds=folds,
        repeats=repeats,
        seeds=[0],
        units=units,
        summaries=[
            _with_intervals(one, intervals) for one in summarise(units, predictions, record.classes, resamples=0)
        ],
        seconds=1.0,
        device="cpu",
        medpretrain_version="0.1.0",
    )
    return evaluation, predictions


def _with_intervals(summary: Summary, wanted: bool) -> Summary:
    """Made up, for a bootstrap takes time: 0.04 below to 0.03 above each mean."""
    bounds = {
        name: Interval(low=max(0.0, value - 0.04), high=min(1.0, value + 0.03)) for name, value in summary.mean.items()
    }
    return summary.model_copy(update={"interval": bounds if wanted else {}})


def write_run(
    folder: Path, name: str, *, seed: int = 0, data_path: str = "/secret/place/mednist", steps: int = 60
) -> Path:
    """A run folder without checkpoints: recipe, metrics, provenance, environment."""
    recipe_name = {"simclr": "demo_dino"}.get(name, "demo_modan_mulsupcon")
    recipe = load_recipe(recipe_name, [f"seed={seed}", f"data.path={data_path}", f"run.dir={folder}"])
    channels = recipe.data.channels
    data = recipe.data.model_copy(update={"mean": (0.3,) * channels, "std": (0.2,) * channels})
    recipe = recipe.model_copy(update={"name": name, "data": data})
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    draw = np.random.default_rng(len(name))
    rows = [
        {
            "step": step,
            "time": 0.0,
            "loss": 2 + 3 * np.exp(-step / 20) + 0.1 * draw.normal(),
            "lr": 0.001 * (1 - step / steps),
            "grad_norm": float(np.exp(draw.normal())),
            "feature_std": 0.9 - 0.3 * np.exp(-step / 10),
            "rankme": 20 + step / 4 + draw.normal(),
        }
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = {
        "time": 1.79e9,
        "time_utc": "2026-11-30T16:45:26Z",
        "command": f"python -m medpretrain train {name} run.dir={folder}",
        "host": "secret-host",
        "medpretrain": "0.1.0",
        "git": {"commit": "669b94702571ff541bbf1b1c7a96c9a2d80380cf", "dirty": False},
        "recipe": name,
        "recipe_sha256": recipe.sha256,
        "datasets": [{"path": data_path, "sha256": "d" * 64}],
        "world_size": 2,
        "strategy": "ddp",
        "environment_sha256": "e" * 64,
    }
    (folder / "provenance.json").write_text(json.dumps({"starts": [start]}))
    (folder / "environment.txt").write_text(
        "# python 3.11.2 (CPython)\n# no CUDA device\ntimm==1.0.27\ntorch==2.11.0\n"
    )
    return folder


def write_space(folder: Path, name: str, kind: str = "run", n: int = 150) -> Path:
    """A description of feature space with maps, neighbours and attention."""
    draw = np.random.default_rng(sum(map(ord, name)))
    classes = CLASSES["class"]
    label = np.arange(n) % 2
    place = draw.normal(size=(n, 2)) + METHODS[name] * 2 * label[:, None]
    organ = np.array(["liver", "spleen", "lung"])[draw.integers(0, 3, n)].tolist()
    images = list(range(8))
    pictures = [space_record.Picture(file=f"image-{row}.png", kind="image", row=row, number=None) for row in images]
    attention = [
        space_record.Picture(file=f"attention-{row}-{number}.png", kind="attention", row=row, number=number)
        for row in images[:2]
        for number in (None, 0, 1)
    ]
    with_attention = name == "simclr"
    ramp = np.linspace(0, 255, 32 * 32).reshape(32, 32).astype(np.uint8)
    edges = np.linspace(0, 4, 41)
    positive = np.histogram(draw.normal(1, 0.3, 2000), edges)[0]
    negative = np.histogram(draw.normal(1 + METHODS[name] / 2, 0.4, 5000), edges)[0]
    record = space_record.SpaceRecord(
        source=source(name, kind),
        data=space_record.SpaceData(
            name="breastmnist",
            sha256="b" * 64,
            label="class",
            classes=classes,
            split="test",
            counts=np.bincount(label).tolist(),
            n_images=n,
            n_labelled=n,
            left_out=0,
            patients="known",
        ),
        view="{}",
        view_from="source",
        views=2,
        seed=0,
        metrics=space_record.SpaceMetrics(
            sad=0.4, saa=0.9, cad=1.1, cac=0.7, gpu=-2.5, alignment=0.3, uniformity=-1.9, rankme=34.2, feature_std=0.6
        ),
        neighbourhood=10,
        histogram=space_record.Histogram(
            edges=edges.tolist(),
            positive=positive.tolist(),
            negative=negative.tolist(),
            positive_mean=1.0,
            negative_mean=1.9,
        ),
        projections=[
            space_record.Projection(name=kind, parameters={"perplexity": 30}, seed=0, n_points=n)
            for kind in ("tsne", "umap")
        ],
        other_patients_only=True,
        neighbours=[
            space_record.Neighbours(
                row=row,
                label=row % 2,
                nearest=[
                    space_record.Neighbour(row=other, label=other % 2, similarity=0.9 - 0.1 * k)
                    for k, other in enumerate(other for other in images if other != row)
                ][:5],
            )
            for row in (0, 1)
        ],
        no_attention=None if with_attention else "the backbone is no ViT",
        pictures=[*pictures, *(attention if with_attention else [])],
        seconds=1.0,
        device="cpu",
        medpretrain_version="0.1.0",
    )
    points = space_record.Points(
        np.arange(n, dtype=np.int64),
        np.arange(n, dtype=np.int64) // 2,
        label.astype(np.int32),
        {"class": [classes[k] for k in label], "organ": organ},
        {"tsne": place, "umap": place @ np.array([[0.0, 1.0], [-1.0, 0.0]])},
    )
    pixels = {picture.file: np.roll(ramp, 97 * place) for place, picture in enumerate(record.pictures)}
    return space_record.write(folder, record, points, pixels)


def write_example(
    folder: Path, names: Sequence[str] = ("mulsupcon", "simclr", "random"), repeats: int = 3
) -> list[Path]:
    """RUN... for a report: runs, and a folder with what was measured of an untrained backbone."""
    found = []
    for name in names:
        kind = "random" if name == "random" else "run"
        place = folder / name if kind == "random" else write_run(folder / name, name)
        into = place if kind == "random" else place / "evaluation"
        results.write(into, *evaluated(name, kind=kind, fractions=FRACTIONS, repeats=repeats))
        results.write(into, *evaluated(name, kind=kind, protocol="knn", label="organ", repeats=1, folds=0))
        write_space(into, name, kind)
        found.append(place)
    return found
