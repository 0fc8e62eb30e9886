"""If these fail, augmentation is not what the recipe says, or not the same after a resume."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torchvision.transforms import RandomResizedCrop

from medpretrain.data.augment import apply, blur_matrix, pixel_noise
from medpretrain.data.views import Augmentation, BiasField, Blur, Jitter, Noise, Parameters, View, draw

EVERYTHING = View(
    size=32,
    count=2,
    crop=(0.2, 1.0),
    flip=0.5,
    quarter_turns=0.5,
    jitter=Jitter(p=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    grayscale=0.2,
    blur=Blur(p=0.5),
    noise=Noise(p=0.5),
    bias_field=BiasField(p=0.5),
)


def drawn(view=EVERYTHING, *, samples=range(64), epoch=0, seed=0, number=0, channels=3, size=(48, 64)) -> Parameters:
    sample = np.asarray(samples, dtype=np.int64)
    return draw(
        view,
        seed=seed,
        epoch=np.full(len(sample), epoch),
        sample=sample,
        name="crop",
        number=number,
        size=np.tile(np.asarray(size, dtype=np.int32), (len(sample), 1)),
        channels=channels,
        center=0.3,
    )


def test_a_sample_is_augmented_alike_in_any_batch():
    whole = drawn().digest()
    assert np.array_equal(drawn(samples=[40, 3, 17]).digest(), whole[[40, 3, 17]])
    halves = [drawn(samples=range(32)).digest(), drawn(samples=range(32, 64)).digest()]
    assert np.array_equal(np.concatenate(halves), whole)


@pytest.mark.parametrize("change", [{"epoch": 1}, {"seed": 1}, {"number": 1}])
def test_another_epoch_seed_or_view_is_augmented_otherwise(change):
    assert not (drawn(**change).digest() == drawn().digest()).any()


def test_crops_lie_inside_and_have_the_areas_and_ratios_asked_for():
    chosen = drawn(samples=range(5000))
    extent = chosen.end - chosen.start
    assert chosen.start.min() >= 0
    assert chosen.end.max() <= 1 + 1e-6
    area = extent.prod(axis=1)
    assert area.min() >= 0.2 - 1e-5
    assert area.max() <= 1 + 1e-5
    ratio = extent[:, 1] * 64 / (extent[:, 0] * 48)
    assert ratio.min() >= 3 / 4 - 1e-4
    assert ratio.max() <= 4 / 3 + 1e-4
    image = torch.zeros(1, 480, 640)
    peers = [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3])[2:] for _ in range(5000)]
    assert abs(area.mean() - np.mean([high * wide / 480 / 640 for high, wide in peers])) < 0.015
    assert abs(chosen.flip.mean() - 0.5) < 0.03
    assert abs((chosen.sigma > 0).mean() - 0.5) < 0.03


def test_a_view_without_augmentation_is_the_whole_image_unchanged():
    chosen = drawn(View(size=32))
    assert (chosen.start == 0).all()
    assert (chosen.end == 1).all()
    images = torch.rand(64, 3, 32, 32)
    out = apply(images.clone(), View(size=32), chosen, torch.zeros(3), torch.ones(3))
    torch.testing.assert_close(out, images)


def test_colour_is_the_affine_map_it_claims_to_be():
    view = View(size=8, jitter=Jitter(p=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1))
    chosen = drawn(view)
    images = torch.rand(64, 3, 8, 8)
    mean, std = torch.tensor([0.3, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.4])
    out = apply(images.clone(), view, chosen, mean, std)
    for n in range(64):
        matrix, offset = torch.from_numpy(chosen.colour[n, :, :3]), torch.from_numpy(chosen.colour[n, :, 3])
        expected = torch.einsum("ij,jhw->ihw", matrix, images[n]) + offset[:, None, None]
        expected = (expected.clamp(0, 1) - mean[:, None, None]) / std[:, None, None]
        torch.testing.assert_close(out[n], expected, atol=1e-5, rtol=1e-5)


def test_gray_pixels_stay_gray_under_saturation_and_hue():
    chosen = drawn(View(size=8, jitter=Jitter(p=1.0, saturation=0.9, hue=0.5)))
    gray = chosen.colour[:, :, :3].sum(axis=2) * 0.6 + chosen.colour[:, :, 3]
    np.testing.assert_allclose(gray, 0.6, atol=5e-3)  # the NTSC matrix is rounded to three digits


def test_contrast_keeps_the_datasets_mean_where_it_is():
    chosen = drawn(View(size=8, jitter=Jitter(p=1.0, contrast=0.9)), channels=1)
    np.testing.assert_allclose(chosen.colour[:, 0, 0] * 0.3 + chosen.colour[:, 0, 1], 0.3, atol=1e-6)
    assert chosen.colour[:, 0, 0].std() > 0.3


@pytest.mark.parametrize(("sigma", "kernel"), [(0.3, 3), (1.0, 23), (2.0, 23)])
def test_blur_equals_the_convolution_with_reflected_borders(sigma, kernel):
    images = torch.rand(1, 1, 32, 32, dtype=torch.float64)
    offset = torch.arange(kernel, dtype=torch.float64) - kernel // 2
    weight = torch.exp(-0.5 * (offset / sigma) ** 2)
    weight /= weight.sum()
    padded = F.pad(images, [kernel // 2] * 4, mode="reflect")
    expected = F.conv2d(padded, (weight[:, None] * weight).view(1, 1, kernel, kernel))
    matrix = blur_matrix(torch.tensor([sigma]), 32, kernel).double()
    torch.testing.assert_close(matrix @ images @ matrix.transpose(-1, -2), expected, atol=1e-6, rtol=1e-6)


def test_only_the_images_with_a_sigma_are_blurred():
    view = View(size=32, blur=Blur(p=0.5))
    chosen = drawn(view)
    images = torch.rand(64, 3, 32, 32)
    out = apply(images.clone(), view, chosen, torch.zeros(3), torch.ones(3))
    changed = (out - images).abs().amax(dim=(1, 2, 3)) > 1e-3
    assert changed.numpy()[chosen.sigma > 0.4].all()
    assert not changed.numpy()[chosen.sigma == 0].any()


def test_pixel_noise_is_normal_and_differs_from_image_to_image():
    keys = torch.tensor([5, 6, 5 + (1 << 40)])
    noise = pixel_noise(keys, (3, 64, 64)).flatten(1)
    assert torch.equal(noise, pixel_noise(keys, (3, 64, 64)).flatten(1))
    assert abs(noise.mean().item()) < 0.02
    assert abs(noise.std().item() - 1) < 0.02
    assert abs((noise**4).mean().item() - 3) < 0.1
    assert (torch.corrcoef(noise) - torch.eye(3)).abs().max() < 0.04
    neighbours = (noise[:, 1:] * noise[:, :-1]).mean()
    assert abs(neighbours.item()) < 0.03


def test_a_bias_field_is_smooth_positive_and_of_its_scale():
    view = View(size=64, bias_field=BiasField(p=1.0, scale=0.1))
    out = apply(torch.full((64, 1, 64, 64), 0.5), view, drawn(view, channels=1), torch.zeros(1), torch.ones(1)) / 0.5
    assert out.min() > 0
    assert 0.05 < out.log().std() < 0.15
    assert (out[..., 1:] - out[..., :-1]).abs().max() < 0.05


@pytest.mark.parametrize(
    "wrong", [{"crop": (0.9, 0.1)}, {"crop": (0.0, 1.0)}, {"blur": {"kernel": 4}}, {"flip": 1.5}, {"sise": 3}]
)
def test_views_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValidationError):
        View(**{"size": 32, **wrong})


def test_saturation_zero_is_the_luma():
    view = View(size=8, grayscale=1.0)
    images = torch.rand(4, 3, 8, 8)
    out = apply(images.clone(), view, drawn(view, samples=range(4)), torch.zeros(3), torch.ones(3))
    luma = (images * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=1)
    for channel in range(3):
        torch.testing.assert_close(out[:, channel], luma, atol=1e-5, rtol=1e-5)
    assert math.isclose(luma.mean().item(), out.mean().item(), rel_tol=1e-4)


def test_quarter_turns_are_as_often_as_asked_for_and_each_as_likely():
    turns = drawn(View(size=8, quarter_turns=0.6), samples=range(6000)).turns
    assert np.bincount(turns) / 6000 == pytest.approx([0.4, 0.2, 0.2, 0.2], abs=0.02)


def test_images_are_turned_by_what_was_drawn():
    images = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    view = View(size=8, quarter_turns=0.7)
    chosen = drawn(view, samples=range(16))
    assert set(chosen.turns.tolist()) == {0, 1, 2, 3}
    seen = apply(images.clone(), view, chosen, torch.zeros(3), torch.ones(3))
    for image, turns, found in zip(images, chosen.turns.tolist(), seen, strict=True):
        assert torch.allclose(found, torch.from_numpy(np.rot90(image.numpy(), turns, axes=(1, 2)).copy()), atol=1e-6)


def test_the_second_view_may_be_augmented_otherwise_and_takes_nothing_over():
    view = EVERYTHING.model_copy(update={"count": 3, "second": Augmentation(flip=1.0)})
    assert [view.of(number) is view for number in range(3)] == [True, False, True]
    second = drawn(view.of(1), number=1)
    assert second.flip.all()
    assert not second.sigma.any()
    assert (second.end - second.start == 1).all()
    assert np.array_equal(drawn(view.of(0)).digest(), drawn().digest())


def test_a_second_view_needs_two_views():
    with pytest.raises(ValidationError, match="second is of the second view, and count is 1"):
        View(size=32, second=Augmentation())
