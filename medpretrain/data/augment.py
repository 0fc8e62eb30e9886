"""What is done to decoded crops: blur, colour, bias field, noise and normalisation, batched, alike on CPU and GPU."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from medpretrain.data.views import Augmentation, Parameters


def apply(images_NCSS: Tensor, view: Augmentation, parameters: Parameters, mean: Tensor, std: Tensor) -> Tensor:
    """Apply the parameters to cropped images in 0..1 and normalise them.

    The order is: quarter turns, blur, colour, clamp to 0..1, bias field, noise, normalisation.

    Args:
        images_NCSS: float32 in 0..1, changed in place.
        parameters: one entry an image.
        mean, std: (C,), of intensities in 0..1.
    """
    device = images_NCSS.device
    x = images_NCSS
    if view.quarter_turns > 0:
        _turn(x, torch.from_numpy(parameters.turns))
    if view.blur is not None:
        x = _blur(x, torch.from_numpy(parameters.sigma), view.blur.kernel)
    colour = torch.from_numpy(parameters.colour).to(device)
    bare = view.bias_field is None and view.noise is None
    if not bare:
        x = _affine(x, colour).clamp_(0, 1)
        if view.bias_field is not None:
            grid = torch.from_numpy(parameters.bias).to(device)[:, None]
            x = x * F.interpolate(grid, size=x.shape[-2:], mode="bicubic", align_corners=True).exp_()
        if view.noise is not None:
            _add_noise(x, torch.from_numpy(parameters.noise), torch.from_numpy(parameters.noise_key))
        return x.sub_(mean[:, None, None]).div_(std[:, None, None])
    # With nothing in between, normalisation joins the colour map and the clamp keeps its bounds: two passes less.
    joined = torch.cat([colour[..., :-1], colour[..., -1:] - mean[:, None]], dim=2) / std[:, None]
    low, high = -mean / std, (1 - mean) / std
    x = _affine(x, joined)
    return torch.clamp(x, low[:, None, None], high[:, None, None], out=x)


def _turn(x_NCSS: Tensor, turns_N: Tensor) -> None:
    """Turn images by multiples of 90 degrees, in place."""
    for turns in (1, 2, 3):
        rows = (turns_N == turns).nonzero().flatten().to(x_NCSS.device)
        x_NCSS[rows] = x_NCSS[rows].rot90(turns, dims=(-2, -1))


def _affine(x_NCSS: Tensor, map_NCD: Tensor) -> Tensor:
    """Intensities through one affine map an image; D = C + 1."""
    n, channels, height, width = x_NCSS.shape
    if channels == 1:
        return x_NCSS.mul_(map_NCD[:, :, 0, None, None]).add_(map_NCD[:, :, 1, None, None])
    flat = x_NCSS.reshape(n, channels, height * width)
    return torch.baddbmm(map_NCD[..., -1:], map_NCD[..., :-1], flat).view_as(x_NCSS)


def _blur(x_NCSS: Tensor, sigma_N: Tensor, kernel: int) -> Tensor:
    """Gaussian blur of the images whose sigma is positive, in place.

    A blur along one axis is a banded matrix, its border reflected; two matrix products are faster than the
    convolution, on CPU and GPU, at the sizes views have.
    """
    blurred = sigma_N.nonzero().flatten()
    if blurred.numel() == 0:
        return x_NCSS
    size = x_NCSS.shape[-1]
    matrix = blur_matrix(sigma_N[blurred], size, kernel).to(x_NCSS.device)[:, None]
    rows = blurred.to(x_NCSS.device)
    x_NCSS[rows] = matrix @ x_NCSS[rows] @ matrix.transpose(-1, -2)
    return x_NCSS


def blur_matrix(sigma_N: Tensor, size: int, kernel: int) -> Tensor:
    """The (N, size, size) matrices that blur along one axis, borders reflected without repeating the edge."""
    reach = min(kernel // 2, size - 1)
    offset = torch.arange(-reach, reach + 1, dtype=torch.float32)
    weight = torch.exp(-0.5 * (offset / sigma_N[:, None]) ** 2)
    weight /= weight.sum(dim=1, keepdim=True)
    at = torch.arange(size)[:, None] + torch.arange(-reach, reach + 1)
    at = at.abs()
    at = torch.where(at >= size, 2 * (size - 1) - at, at)
    matrix = torch.zeros(len(sigma_N), size, size)
    return matrix.scatter_add_(2, at.expand(len(sigma_N), -1, -1), weight[:, None].expand(-1, size, -1))


def _add_noise(x_NCSS: Tensor, level_N: Tensor, key_N: Tensor) -> None:
    """Add noise to the images whose level is positive; on CPU one at a time, so that the hashes stay in the cache."""
    noisy = level_N.nonzero().flatten()
    for rows in noisy.split(1 if x_NCSS.device.type == "cpu" else max(1, len(noisy))):
        key, level = key_N[rows].to(x_NCSS.device), level_N[rows].to(x_NCSS.device)
        x_NCSS[rows.to(x_NCSS.device)] += pixel_noise(key, x_NCSS.shape[1:]) * level[:, None, None, None]


def pixel_noise(key_N: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Standard normal noise, (N, *shape) float32, a hash of each image's key and the pixel's number.

    Integer arithmetic and a table, so CPU and GPU make the same noise: each half of a 32-bit hash (the finaliser of
    MurmurHash3) picks one of 65,536 equally likely normal quantiles (which end at 4.3 standard deviations).
    """
    pixels = math.prod(shape)
    pair = torch.arange((pixels + 1) // 2, device=key_N.device, dtype=torch.int32)
    # The halves of the key enter one after the other, so that close keys share no stretch of noise.
    low, high = (key_N & 0x7FFFFFFF).int(), (key_N >> 31 & 0x7FFFFFFF).int()
    mixed = _hash32(_hash32(pair + low[:, None]) ^ high[:, None])
    halves = torch.cat([mixed & 0xFFFF, _shift_right(mixed, 16)], dim=1)[:, :pixels]
    return _normal_quantiles(key_N.device)[halves].reshape(len(key_N), *shape)


def _hash32(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser; int32 multiplication wraps, as it must."""
    x = (x ^ _shift_right(x, 16)) * (0x85EBCA6B - 2**32)
    x = (x ^ _shift_right(x, 13)) * (0xC2B2AE35 - 2**32)
    return x ^ _shift_right(x, 16)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """A shift that brings zeros in; torch's own copies the sign."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


@cache
def _normal_quantiles(device: torch.device) -> Tensor:
    middle = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    return torch.special.ndtri(middle).float().to(device)
