"""Features are the network's own, in order, whoever shares the work; what is kept of them is never trusted blindly."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from data_prep.dataset import Dataset
from data_prep.errors import UserError
from medpretrain.data.batches import plain_batches
from medpretrain.evaluation import feature_cache
from medpretrain.evaluation.features import extract, features
from medpretrain.evaluation.source import Source, open_source
from medpretrain.training.process import Process

ALONE = Process(rank=0, world=1, local_rank=0, local_world=1, device=torch.device("cpu"))
WORKER = Path(__file__).with_name("feature_ranks.py")
SPEC = "random:resnet10t"


@pytest.fixture(scope="module")
def dataset(small_dataset: Path) -> Dataset:
    return Dataset.open(small_dataset)


@pytest.fixture(scope="module")
def source(dataset: Dataset) -> Source:
    return open_source(SPEC, dataset=dataset, size=32)


class Broken(nn.Module):
    """Mean and brightest pixel; not a number for dark images."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = torch.stack([images.mean(dim=(1, 2, 3)), images.amax(dim=(1, 2, 3))], dim=1)
        return torch.where(found[:, :1] < -0.5, torch.nan, found)


def test_features_are_those_of_the_network_on_the_prepared_images_in_order(dataset: Dataset, source: Source) -> None:
    rows = np.random.default_rng(1).permutation(len(dataset))[:21]
    prep = source.preprocessing
    images = plain_batches(
        dataset, rows, size=32, channels=1, mean=prep.mean, std=prep.std, batch=21, device=torch.device("cpu")
    )
    with torch.inference_mode():
        expected = source.backbone(next(iter(images))).numpy()
    found = features(source, dataset, rows, process=ALONE, cache=None)
    assert found.shape == (21, 512)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    backwards = features(source, dataset, rows[::-1].copy(), process=ALONE, cache=None)
    np.testing.assert_allclose(backwards[::-1], found, rtol=1e-4, atol=1e-5)


def test_batches_of_any_size_give_the_same_features(dataset: Dataset, source: Source) -> None:
    rows = dataset.rows("train")[:23]
    options = {"device": "cpu", "preprocessing": source.preprocessing}
    whole = extract(source.network(), dataset, rows, batch=64, **options)  # type: ignore[arg-type]
    parts = extract(source.network(), dataset, rows, batch=5, **options)  # type: ignore[arg-type]
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-5)


def test_the_source_and_the_number_of_threads_are_left_as_they_were(dataset: Dataset, source: Source) -> None:
    before = {name: tensor.clone() for name, tensor in source.backbone.state_dict().items()}
    threads = torch.get_num_threads()
    features(source, dataset, dataset.rows("test")[:3], process=ALONE, cache=None)
    assert torch.get_num_threads() == threads
    after = source.backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(after[name].is_contiguous() for name in before)


@dataclasses.dataclass(frozen=True)
class Shared:
    """What three ranks made of the cases, and what one process makes of the first ones."""

    out: Path
    alone: dict[str, np.ndarray]
    broken_key: str
    caches: Path

    def of(self, case: str) -> list[np.ndarray]:
        return [np.load(self.out / f"{case}-{rank}.npy") for rank in range(3)]


@pytest.fixture(scope="module")
def shared(
    small_dataset: Path,
    dataset: Dataset,
    source: Source,
    run_ranks: Callable[..., None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Shared:
    out, caches = tmp_path_factory.mktemp("ranks"), tmp_path_factory.mktemp("caches")
    rows = np.random.default_rng(3).permutation(len(dataset))
    counts = {"many": 20, "few": 2}
    alone = {
        name: features(source, dataset, rows[:count], process=ALONE, cache=caches / "kept")
        for name, count in counts.items()
    }
    shards = out / "shards"
    shutil.copytree(small_dataset, shards)
    row = int(rows[19])  # of the last rank
    shard, key = dataset.sample_name(row)
    with (shards / "shards" / shard).open("r+b") as file:
        file.seek(dataset.index.column("offset")[row].as_py())
        file.write(b"\0" * dataset.index.column("length")[row].as_py())
    cases = [
        {"name": name, "shards": str(small_dataset), "count": count, "cache": str(caches / "new")}
        for name, count in counts.items()
    ]
    cases.append({"name": "kept", "shards": str(small_dataset), "count": 20, "cache": str(caches / "kept")})
    cases.append({"name": "broken", "shards": str(shards), "count": 20, "cache": str(caches / "broken")})
    run_ranks([str(WORKER), str(out), json.dumps(cases)], 3, timeout=300)
    return Shared(out, alone, key, caches)


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["many", "few"])
def test_ranks_share_the_rows_and_have_all_features_also_where_one_has_no_row(case: str, shared: Shared) -> None:
    assert len(np.unique(shared.alone[case], axis=0)) == len(shared.alone[case])
    for found in shared.of(case):
        np.testing.assert_allclose(found, shared.alone[case], rtol=1e-4, atol=1e-5)
    assert len(list((shared.caches / "new").iterdir())) == 2


@pytest.mark.distributed
def test_what_one_process_kept_all_ranks_have_to_the_bit(shared: Shared) -> None:
    for found in shared.of("kept"):
        assert found.tobytes() == shared.alone["many"].tobytes()


@pytest.mark.distributed
def test_an_image_that_one_rank_cannot_decode_ends_all(shared: Shared) -> None:
    for rank in range(3):
        said = (shared.out / f"broken-{rank}.txt").read_text()
        assert said.startswith("WorkFailed")
        assert shared.broken_key in said
    assert not list((shared.caches / "broken").iterdir())


def no_images(*_: object, **__: object) -> None:
    raise AssertionError("the images were read")


def test_features_that_are_kept_are_the_same_bytes_and_read_no_image(
    dataset: Dataset, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, cache = dataset.rows("test"), tmp_path / "deep" / "cache"
    first = features(source, dataset, rows, process=ALONE, cache=cache)
    (kept,) = cache.iterdir()
    assert cache.stat().st_mode & 0o077 == 0
    content = kept.read_bytes()
    for row in rows:
        assert dataset.sample_name(row)[1].encode() not in content
    monkeypatch.setattr(Dataset, "read", no_images)
    again = features(source, dataset, rows, process=ALONE, cache=cache)
    assert again.tobytes() == first.tobytes()
    renamed = dataclasses.replace(source, name="another", about={})
    assert features(renamed, dataset, rows, process=ALONE, cache=cache).tobytes() == first.tobytes()


def test_whatever_changes_a_feature_changes_the_key(
    dataset: Dataset, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, rows = torch.device("cpu"), dataset.rows("test")
    keys = [
        feature_cache.cache_key(source.sha256, dataset.sha256, rows, cpu),
        feature_cache.cache_key("0" * 64, dataset.sha256, rows, cpu),
        feature_cache.cache_key(source.sha256, "0" * 64, rows, cpu),
        feature_cache.cache_key(source.sha256, dataset.sha256, rows[::-1], cpu),
        feature_cache.cache_key(source.sha256, dataset.sha256, rows[1:], cpu),
        feature_cache.cache_key(source.sha256, dataset.sha256, rows, torch.device("cuda")),
    ]
    assert feature_cache.cache_key(source.sha256, dataset.sha256, rows.astype(np.int32), cpu) == keys[0]
    monkeypatch.setattr(torch, "__version__", "99.0")
    keys.append(feature_cache.cache_key(source.sha256, dataset.sha256, rows, cpu))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("damage", ["a flipped bit", "cut short", "empty", "of another key", "of fewer rows"])
def test_what_is_damaged_is_computed_anew_with_a_warning_and_put_right(
    damage: str, dataset: Dataset, source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = dataset.rows("test")[:6]
    first = features(source, dataset, rows, process=ALONE, cache=tmp_path)
    (kept,) = tmp_path.iterdir()
    content = bytearray(kept.read_bytes())
    if damage == "a flipped bit":
        content[-5] ^= 4
    elif damage == "cut short":
        content = content[:-8]
    elif damage == "empty":
        content = bytearray()
    else:
        other = features(
            source, dataset, rows[:5] if "fewer" in damage else rows[::-1].copy(), process=ALONE, cache=None
        )
        key = kept.stem if "fewer" in damage else "0" * 64
        feature_cache.store(tmp_path / "..", key, other)
        content = bytearray((tmp_path / ".." / f"{key}.safetensors").read_bytes())
    kept.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        again = features(source, dataset, rows, process=ALONE, cache=tmp_path)
    assert "is damaged" in caplog.text
    np.testing.assert_array_equal(again, first)
    caplog.clear()
    features(source, dataset, rows, process=ALONE, cache=tmp_path)
    assert not caplog.text


def test_a_disk_that_is_full_costs_what_is_kept_and_not_the_features(
    dataset: Dataset, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_cache, "save_file", full)
    found = features(source, dataset, dataset.rows("test")[:3], process=ALONE, cache=tmp_path)
    assert len(found) == 3
    assert "No space left" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_is_refused_before_an_image_is_read(
    dataset: Dataset, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Dataset, "read", no_images)
    with pytest.raises(UserError, match="the cache of features"):
        features(source, dataset, dataset.rows("test"), process=ALONE, cache=tmp_path / "file")


def test_the_folder_is_the_one_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEDPRETRAIN_CACHE", str(tmp_path))
    assert feature_cache.default_folder() == tmp_path
    monkeypatch.delenv("MEDPRETRAIN_CACHE")
    assert feature_cache.default_folder() == Path.home() / ".cache" / "medpretrain" / "features"


def test_features_that_are_not_finite_are_refused_counted_and_named_and_not_kept(
    dataset: Dataset, source: Source, tmp_path: Path
) -> None:
    rows = dataset.rows("train")
    broken = dataclasses.replace(source, backbone=Broken().eval())
    finite = np.isfinite(extract(Broken(), dataset, rows, source.preprocessing, device="cpu")).all(axis=1)
    bad = np.flatnonzero(~finite)
    assert 0 < len(bad) < len(rows)
    key = dataset.sample_name(rows[bad[0]])[1]
    with pytest.raises(UserError, match=f"{len(bad)} of {len(rows)} images .* not finite.* {key} ") as refused:
        features(broken, dataset, rows, process=ALONE, cache=tmp_path)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_no_row_is_refused(dataset: Dataset, source: Source) -> None:
    with pytest.raises(UserError, match="no image"):
        features(source, dataset, np.zeros(0, np.int64), process=ALONE, cache=None)


def test_colour_images_for_a_gray_network_are_converted_with_a_warning(
    colour_dataset: Path, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    colour = Dataset.open(colour_dataset)
    with caplog.at_level(logging.WARNING):
        features(source, colour, colour.rows("test")[:2], process=ALONE, cache=None)
    assert "colour images as their luma" in caplog.text
