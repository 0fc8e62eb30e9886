"""If these fail, a run on several datasets does not see the images and labels it says it sees."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.dataset import Dataset
from data_prep.errors import UserError
from data_prep.images import prepare
from medpretrain.data.batches import Share, Stream
from medpretrain.data.mixture import Mixture
from medpretrain.data.patients import some_patients
from medpretrain.data.views import View

CPU = torch.device("cpu")
BATCH = 12


@pytest.fixture(scope="module")
def both(small_dataset, colour_dataset):
    return [small_dataset, colour_dataset]


def stream(folders, weights=(), **options):
    settings = {"split": "train", "seed": 3, "global_batch": BATCH, "channels": 3, "device": CPU, "threads": 1}
    settings |= {"mean": [0.0] * 3, "std": [1.0] * 3, "labels": ["class", "modality"]}
    return Stream(Mixture.open(folders, weights), {"crop": View(size=24, crop=(0.5, 1.0))}, **settings | options)


def take(one, start, count):
    batches = one.batches(start)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def test_rows_read_and_sizes_are_those_of_the_datasets_in_their_order(both):
    mixture, datasets = Mixture.open(both), [Dataset.open(folder) for folder in both]
    rows = mixture.rows("test")
    expected = [image.tobytes() for dataset in datasets for image in dataset.read(dataset.rows("test"))]
    assert [image.tobytes() for image in mixture.read(rows)] == expected
    backwards = [image.tobytes() for image in mixture.read(rows[::-1])]
    assert backwards == expected[::-1]
    assert np.array_equal(mixture.sizes[rows], np.concatenate([one.sizes[one.rows("test")] for one in datasets]))
    assert mixture.sha256 == tuple(dataset.sha256 for dataset in datasets)
    assert mixture.splits == dict(sum((Counter(dataset.info.splits) for dataset in datasets), Counter()))


def test_labels_are_joined_by_name_and_unknown_where_a_dataset_has_none(both, caplog):
    caplog.set_level("INFO")
    mixture, datasets = Mixture.open(both), [Dataset.open(folder) for folder in both]
    assert mixture.label_names("class") == ["chest", "hand", "head", "foot"]  # the colour dataset says foot, hand
    words = [mixture.label_names("class")[place] for place in mixture.labels("class")]
    assert words == [dataset.label_names("class")[place] for dataset in datasets for place in dataset.labels("class")]
    assert mixture.label_names("modality") == datasets[0].label_names("modality")
    first = len(datasets[0])
    assert np.array_equal(mixture.labels("modality")[:first], datasets[0].labels("modality"))
    assert (mixture.labels("modality")[first:] == -1).all()
    assert f"{both[1]} has no label 'modality'" in caplog.text
    reverse = Mixture.open(both[::-1])
    assert reverse.label_names("class") == ["foot", "hand", "chest", "head"]
    with pytest.raises(UserError, match=r"no label 'modalty' in .*did you mean 'modality'"):
        mixture.labels("modalty")


def test_a_label_unknown_to_its_own_dataset_stays_unknown(tmp_path, small_dataset):
    lines = ["path,modality"]
    for number in range(4):
        image = np.full((16, 16), 40 * number, np.uint8)
        Image.fromarray(image).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{'US' if number else ''}")
    (tmp_path / "images.csv").write_text("\n".join(lines))
    prepare(tmp_path / "images.csv", tmp_path / "shards", split={"train": 1.0})
    mixture = Mixture.open([small_dataset, tmp_path / "shards"])
    names = mixture.label_names("modality")
    assert sorted(mixture.labels("modality")[-4:].tolist()) == [-1] + [names.index("US")] * 3


def test_without_weights_every_image_is_seen_once_an_epoch(both):
    one = stream(both)
    places = one.order.places(0, 2 * len(one))
    for epoch in range(2):
        assert sorted(places.sample[places.epoch == epoch].tolist()) == list(range(len(one)))
    assert one.steps_per_epoch == len(one) / BATCH == stream(both, [1, 2]).steps_per_epoch


@pytest.mark.parametrize("block_shards", [0, 1])
@pytest.mark.parametrize("weights", [(), (1, 2)])
def test_later_starts_ranks_and_micro_batches_see_the_same_global_batch(weights, block_shards, both):
    whole = take(stream(both, weights, block_shards=block_shards), 1, 5)
    for world, micro_batches in ((1, 1), (3, 2)):
        shares = [Share(rank, world, micro_batches) for rank in range(world)]
        parts = [take(stream(both, weights, block_shards=block_shards, share=share), 3, 3) for share in shares]
        for turn in range(3):
            shared = [micro["crop"][0] for part in parts for micro in part[turn].micro]
            assert torch.equal(torch.cat(shared), whole[turn + 2].micro[0]["crop"][0])
            for part in parts:
                assert torch.equal(part[turn].labels["class"], whole[turn + 2].labels["class"])


def test_images_come_with_their_own_labels_and_in_their_shares(both):
    one = stream(both, [1, 2])
    names = one.dataset.label_names("class")
    for batch in take(one, 0, 6):
        images = batch.micro[0]["crop"][0]
        colour = (images[:, 0] - images[:, 2]).mean(dim=(1, 2)) > 0.1
        assert colour.sum() == 2 * BATCH / 3
        assert torch.equal(batch.labels["modality"] == -1, colour)
        for image, is_colour, label in zip(images, colour, batch.labels["class"], strict=True):
            gray = {"chest": 0.15, "head": 0.43, "hand": 0.70}
            expected = {"hand": 0.22, "foot": 0.57} if is_colour else gray
            assert abs(image.mean().item() - expected[names[label]]) < 0.13


@pytest.mark.parametrize("weights", [(), (1, 3)])
def test_the_normalisation_is_that_of_the_images_as_they_are_sampled(weights, both):
    mixture, datasets = Mixture.open(both, weights), [Dataset.open(folder) for folder in both]
    counts = [len(dataset.rows("train")) for dataset in datasets]
    share = np.array(weights or counts) / sum(weights or counts)
    gray, colour = (dataset.info.statistics for dataset in datasets)
    means, stds = np.array([gray.mean * 3, colour.mean]), np.array([gray.std * 3, colour.std])
    mean, std = mixture.normalisation("train", 3)
    assert mean == pytest.approx(share @ means, abs=1e-6)
    assert std == pytest.approx(np.sqrt(share @ (means**2 + stds**2) - (share @ means) ** 2), abs=1e-6)
    alone = Mixture.open(both[1:])
    assert alone.normalisation("train", 3) == (tuple(colour.mean), tuple(colour.std))


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ([1, 50], {}, r"data.weights give .*small.* 0.235 images of train.global_batch=12; it must be at least 1"),
        ([1, 9], {"global_batch": 40}, r"data.weights give .*colour.* 36 images .* no more than the \d+ in"),
        ([], {"global_batch": 1000}, r"global_batch=1000 is more than the \d+ samples of split 'train' in .*, "),
        ([], {"split": "val"}, r"small.* has no images in a split 'val'"),
        ([1, 1], {"labels": ["organ"]}, r"no label 'organ' in .*; it can be "),
    ],
)
def test_mixtures_that_cannot_be_trained_on_are_refused(weights, options, message, both):
    with pytest.raises(UserError, match=message):
        stream(both, weights, **options)


def test_datasets_that_do_not_go_together_are_refused(both, tmp_path):
    with pytest.raises(UserError, match="are the same dataset"):
        Mixture.open([*both, both[0]])
    with pytest.raises(UserError, match=r"several are a list, as in data.path=\[brain,chest\]"):
        Mixture.open(["brain,chest"])
    (tmp_path / "images").mkdir()
    for number in range(4):
        Image.fromarray(np.full((16, 16), 9000 * number, np.uint16)).save(tmp_path / "images" / f"{number}.png")
    prepare(tmp_path / "images", tmp_path / "deep", split={"train": 1.0})
    with pytest.raises(UserError, match=r"small.* has images of 8 bits and .*deep of 16"):
        Mixture.open([both[0], tmp_path / "deep"])


def test_a_fraction_of_the_patients_is_nested_and_the_same_for_any_seed(both):
    parts = {percent: Mixture.open(both, fraction=percent) for percent in (20.0, 60.0, 100.0)}
    rows = {percent: part.rows("train") for percent, part in parts.items()}
    assert set(rows[20.0]) < set(rows[60.0]) < set(rows[100.0])
    whole = [len(dataset.rows("train")) for dataset in parts[100.0].datasets]
    assert len(rows[20.0]) == sum(round(0.2 * images) for images in whole)  # their patients are unknown: an image each
    for seed in (0, 1):
        order = parts[20.0].order("train", seed=seed, global_batch=4)
        assert order.epoch_size == len(rows[20.0])
        assert set(order.places(0, order.epoch_size).sample) == set(range(len(rows[20.0])))


def test_a_stream_of_a_fraction_shows_its_images_and_no_others(both):
    few = Mixture.open(both, fraction=40.0)
    settings = {"split": "train", "seed": 3, "global_batch": 6, "channels": 3, "device": CPU, "threads": 1}
    settings |= {"mean": [0.0] * 3, "std": [1.0] * 3, "labels": ["class"], "block_shards": 1}
    one = Stream(few, {"crop": View(size=24)}, **settings)
    labels = few.labels("class")[few.rows("train")]
    assert np.array_equal(one.all_labels["class"], labels)
    for batch in take(one, 0, 3):
        assert batch.samples.max() < len(labels)
        assert np.array_equal(batch.labels["class"], labels[batch.samples])


def test_no_patient_is_taken_in_part():
    patients = np.array([4, 4, 9, 9, 9, 1 << 40, (1 << 40) + 1])
    for percent in (1, 30, 50, 80):
        places = some_patients(patients, percent)
        chosen = set(patients[places])
        assert len(chosen) == max(1, round(4 * percent / 100))
        assert places.tolist() == np.flatnonzero(np.isin(patients, list(chosen))).tolist()


def test_a_batch_larger_than_the_fraction_names_it(both):
    with pytest.raises(UserError, match=r"samples of split 'train' \(data.fraction=20\)"):
        Mixture.open(both, fraction=20.0).order("train", seed=0, global_batch=60)
