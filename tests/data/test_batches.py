"""What arrives at a method is what order and views say, decoded from the dataset's own bytes."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.dataset import Dataset
from data_prep.errors import UserError
from data_prep.images import prepare
from medpretrain.data.batches import Share, Stream, plain_batches, prefetched
from medpretrain.data.mixture import Mixture
from medpretrain.data.views import Blur, Jitter, View

CPU = torch.device("cpu")
AUGMENTED = {
    "crop": View(size=24, count=2, crop=(0.3, 1.0), flip=0.5, jitter=Jitter(brightness=0.4, contrast=0.4), blur=Blur()),
    "small": View(size=16, crop=(0.1, 0.4)),
}


def stream(folder, views=AUGMENTED, **options):
    settings = {
        "split": "train",
        "seed": 3,
        "global_batch": 12,
        "channels": 1,
        "mean": [0.4],
        "std": [0.3],
        "threads": 1,
    }
    return Stream(
        Mixture.open([folder]), views, **settings | {"device": CPU, "labels": ["class", "modality"]} | options
    )


def take(one, start, count):
    batches = one.batches(start)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        for x, y in zip(a[name], b[name], strict=True):
            assert torch.equal(x, y)


def test_a_stream_that_starts_later_goes_on_alike(small_dataset):
    whole = take(stream(small_dataset), 0, 6)
    later = take(stream(small_dataset), 3, 3)
    for a, b in zip(whole[3:], later, strict=True):
        assert a.step == b.step
        equal(a.micro[0], b.micro[0])
        assert torch.equal(a.labels["class"], b.labels["class"])


@pytest.mark.parametrize(("world", "micro_batches"), [(2, 1), (1, 3), (2, 2), (3, 2)])
def test_ranks_and_micro_batches_share_the_same_global_batch(world, micro_batches, small_dataset):
    whole = take(stream(small_dataset), 2, 2)
    parts = [take(stream(small_dataset, share=Share(rank, world, micro_batches)), 2, 2) for rank in range(world)]
    for turn in range(2):
        for name, group in whole[turn].micro[0].items():
            for number, images in enumerate(group):
                shared = [micro[name][number] for part in parts for micro in part[turn].micro]
                assert torch.equal(torch.cat(shared), images)
        assert [part[turn].first for part in parts] == [rank * 12 // world for rank in range(world)]


def test_views_have_their_shapes_and_differ_from_each_other(small_dataset):
    (batch,) = take(stream(small_dataset), 0, 1)
    assert [tuple(images.shape) for images in batch.micro[0]["crop"]] == [(12, 1, 24, 24)] * 2
    assert [tuple(images.shape) for images in batch.micro[0]["small"]] == [(12, 1, 16, 16)]
    assert not torch.equal(*batch.micro[0]["crop"])
    assert batch.labels["class"].shape == (12,)


def test_labels_belong_to_their_images(small_dataset):
    dataset = Dataset.open(small_dataset)
    plain = stream(small_dataset, {"crop": View(size=32)}, mean=[0.0], std=[1.0])
    for batch in take(plain, 0, 5):
        names = [dataset.label_names("class")[label] for label in batch.labels["class"]]
        brightness = batch.micro[0]["crop"][0].mean(dim=(1, 2, 3))
        for name, mean in zip(names, brightness, strict=True):  # the classes are 70 gray levels apart
            expected = {"chest": 0.15, "head": 0.43, "hand": 0.70}[name]
            assert abs(mean.item() - expected) < 0.13


def test_plain_images_are_the_decoded_resized_and_normalised_ones_in_order(small_dataset):
    dataset = Dataset.open(small_dataset)
    rows = dataset.rows("test")[::-1].copy()
    options = {"size": 32, "channels": 1, "mean": [0.4], "std": [0.2], "batch": 8, "device": CPU}
    images = torch.cat(list(plain_batches(dataset, rows, **options)))
    assert images.shape == (len(rows), 1, 32, 32)
    for image, data in zip(images, dataset.read(rows), strict=True):
        pil = Image.open(io.BytesIO(data.tobytes())).resize((32, 32), Image.Resampling.BILINEAR)
        expected = (torch.from_numpy(np.asarray(pil).copy()) / 255 - 0.4) / 0.2
        levels = (image[0] - expected).abs() * 0.2 * 255
        assert levels.max() < 2.01  # both round after each of two passes
        assert levels.mean() < 0.5


def test_a_crop_is_the_part_of_the_image_it_says(small_dataset):
    one = stream(small_dataset, {"crop": View(size=16, crop=(0.2, 0.6), flip=0.5)}, mean=[0.0], std=[1.0])
    (batch,) = take(one, 4, 1)
    dataset = Dataset.open(small_dataset)
    places = one.order.step(4, 12)
    rows = dataset.rows("train")[places.sample]
    ((_, chosen),) = one.parameters(places, rows)
    for n, data in enumerate(dataset.read(rows)):
        image = Image.open(io.BytesIO(data.tobytes()))
        (top, left), (bottom, right) = chosen.start[n], chosen.end[n]
        box = (left * image.width, top * image.height, right * image.width, bottom * image.height)
        expected = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR, box=box)).astype(float)
        expected = expected[:, ::-1] if chosen.flip[n] else expected
        found = batch.micro[0]["crop"][0][n, 0].numpy() * 255
        assert np.abs(found - expected).mean() < 1.5


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_kept(channels, tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    ramp = np.linspace(20000, 20400, 32 * 32).reshape(32, 32).astype(np.uint16)  # two gray levels of 8 bits
    for number in range(4):
        Image.fromarray(ramp + number).save(tmp_path / "images" / "a" / f"{number}.png")
    prepare(tmp_path / "images", tmp_path / "shards", split={"train": 1.0})
    dataset = Dataset.open(tmp_path / "shards")
    options = {"size": 32, "channels": channels, "mean": [0.0] * channels, "std": [1.0] * channels}
    images = torch.cat(list(plain_batches(dataset, np.arange(4), batch=4, device=CPU, **options)))
    assert images.shape == (4, channels, 32, 32)
    spread = images[0, 0].unique()
    assert len(spread) > 300
    assert abs((images[0, -1, -1, -1] * 65535).item() - 20402) < 4


def test_the_normalisation_of_a_dataset_fits_the_channels_asked_for(small_dataset):
    dataset = Mixture.open([small_dataset])
    mean, std = dataset.normalisation("train", 1)
    assert dataset.normalisation("train", 3) == (mean * 3, std * 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch": 1000}, r"global_batch=1000 is more than the \d+ samples"),
        ({"share": Share(0, 5, 1)}, "not divisible by 5 processes"),
        ({"split": "trian"}, "trian"),
        ({"labels": ["modalty"]}, "modality"),
    ],
)
def test_streams_that_cannot_be_are_refused(options, message, small_dataset):
    with pytest.raises(UserError, match=message):
        stream(small_dataset, **options)


def test_an_error_in_the_background_is_raised_where_the_item_was_due():
    def items():
        yield 1
        raise OSError("gone")

    made = prefetched(items(), 2)
    assert next(made) == 1
    with pytest.raises(OSError, match="gone"):
        next(made)
    assert list(prefetched(iter(range(5)), 2)) == [0, 1, 2, 3, 4]
