"""`prep retina` and `prep radimagenet` from a folder to a dataset: what arrives, what is set aside, what is said."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from data_prep.cli import app
from data_prep.dataset import Dataset
from data_prep.options import Options, Running
from data_prep.pictures import RadImageNetSource, Retina
from data_prep.prepare import Summary, prepare
from data_prep.verify import verify


def photograph(path: Path, seed: int, blank: bool = False) -> None:
    """A retina-like disc with a name written into the black border."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (360, 300))
    pen = ImageDraw.Draw(image)
    if not blank:
        pen.ellipse((70, 40, 290, 260), fill=(200, 100, 50))
        for _ in range(60):
            points = np.cumsum(rng.normal(0, 16, (9, 2)), axis=0) + np.array([180, 150])
            inside = points[np.hypot(*(points - (180, 150)).T) < 105]
            pen.line([tuple(point) for point in inside], fill=(120, 40, 25), width=2)
    pen.text((8, 280), "DOE JANE", fill=(255, 255, 255))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "JPEG", quality=92)


def test_photographs_are_cut_to_the_disc_and_their_quality_travels(tmp_path: Path) -> None:
    for number in range(6):
        photograph(tmp_path / "src" / "normal" / f"{number}_left.jpg", number)
    photograph(tmp_path / "src" / "normal" / "9_left.jpg", 9, blank=True)
    kind = Retina(tmp_path / "src", patient_pattern=r"(\d+)_")
    summary = prepare(kind, tmp_path / "out", Options(), Running())
    assert isinstance(summary, Summary)
    assert summary.info.samples == 6
    assert summary.info.quarantined == 1
    dataset = Dataset.open(tmp_path / "out")
    for data in dataset.read(dataset.rows()):
        pixels = np.asarray(Image.open(io.BytesIO(data.tobytes())))
        assert pixels.shape[0] == pixels.shape[1]
        assert 205 <= pixels.shape[0] <= 240  # the disc, 221 wide, and not the frame
        assert pixels[:12, :12].max() < 40  # no name in the corner
    with tarfile.open(tmp_path / "out" / "shards" / "train-00000.tar") as shard:
        record = json.loads(shard.extractfile(shard.getnames()[1]).read())  # type: ignore[union-attr]
    assert {"sharpness", "illumination", "field"} <= set(record["about"]["quality"])
    assert not verify(tmp_path / "out")


def test_radimagenet_keeps_its_split_and_names_anatomy_by_folder(tmp_path: Path) -> None:
    rows = {
        "train": ["CT/lung/nodule/a.png", "US/thyroid/b.png", "MR/knee/normal/c.png"],
        "val": ["MR/brain/normal/d.png"],
        "test": ["CT/abd/normal/gone.png", "CT/abd/normal/e.png"],
    }
    for split, names in rows.items():
        lines = ["filename,label"]
        for name in names:
            path = tmp_path / "src" / "radiology_ai" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if "gone" not in name:
                noise = np.random.default_rng(list(name.encode())).integers(0, 255, (24, 20)).astype(np.uint8)
                Image.fromarray(noise).save(path)
            lines.append(f"radiology_ai/{name},{name.split('/')[-2]}")
        (tmp_path / "src" / f"RadiologyAI_{split}.csv").write_text("\n".join(lines) + "\n")
    summary = prepare(RadImageNetSource(tmp_path / "src"), tmp_path / "out", Options(), Running(workers=2))
    assert isinstance(summary, Summary)
    assert summary.info.splits == {"test": 1, "train": 3, "val": 1}
    assert summary.info.reasons == {"unreadable": 1}
    assert any("no patient" in warning for warning in summary.warnings)
    dataset = Dataset.open(tmp_path / "out")
    links = {row["key"]: row["path"] for row in pq.read_table(summary.private / "sources.parquet").to_pylist()}
    anatomy, names = dataset.labels("anatomy"), dataset.label_names("anatomy")
    found = {links[key]: names[place] for key, place in zip(dataset.index["key"].to_pylist(), anatomy, strict=True)}
    assert found["radiology_ai/US/thyroid/b.png"] == "thyroid"
    assert found["radiology_ai/MR/knee/normal/c.png"] == "knee"
    assert not verify(tmp_path / "out")


@pytest.mark.parametrize("command", ["retina", "radimagenet"])
def test_a_source_that_is_not_there_is_one_message(tmp_path: Path, command: str) -> None:
    result = CliRunner().invoke(app, [command, str(tmp_path / "nowhere"), str(tmp_path / "out")])
    assert "nowhere does not exist" in str(result.exception)
    assert not list(tmp_path.iterdir())
