"""Calibration images out of nothing: dead leaves.

Discs and rectangles with power-law sizes that occlude one another share the edge and scale statistics of natural
images (Lee, Mumford & Huang, "Occlusion models for natural images", IJCV 2001; Baradad et al., "Learning to see by
looking at noise", NeurIPS 2021, https://arxiv.org/abs/2106.05963). A network's covariances measured on them stand in
for those on its training data.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sharefold.errors import SharefoldError

_COVER = 4.0  # total leaf area over image area: exp(-4), 2 %, of the background stays visible
_SMALLEST = 4.0  # radius in pixels of the smallest leaf; less makes images busier than photographs
_MEAN = 0.46
# Colours of natural images spread along brightness, then blue to yellow, then green to magenta.
_COLOUR_AXES = np.array([[1, 1, 1], [1, 0, -1], [-1, 2, -1]], dtype=np.float32)
_COLOUR_SPREAD = np.array([0.20, 0.05, 0.02], dtype=np.float32)
_NOISE_SPREAD = 0.02
# Photographs differ in exposure, tint and contrast (a factor exp(N(0, 0.4))).
_EXPOSURE, _TINT, _CONTRAST = 0.1, 0.03, 0.4


def dead_leaves(count: int, size: tuple[int, int] = (32, 32), channels: int = 3, seed: int = 0) -> Tensor:
    """``count`` dead-leaves images, float32 (count, channels, H, W) in [0, 1], the same for the same seed.

    Radii follow p(r) ~ r^-3, the scale-invariant law, between four pixels and half the image; a quarter of the leaves
    are rectangles. Colours are correlated over channels; noise with a 1/f amplitude spectrum lies on top.

    Args:
        count: images, at least 1.
        size: (H, W) in pixels.
        channels: 3 gives natural-image colour statistics; any other number a shared brightness and small
            independent channels.
        seed: of everything random here.

    Raises:
        SharefoldError: a count, size or channel number below 1.
    """
    height, width = size
    if min(count, height, width, channels) < 1:
        raise SharefoldError(f"dead leaves: {count} images of {channels}x{height}x{width}: all must be at least 1")
    images = np.empty((count, channels, height, width), dtype=np.float32)
    # A bounded working set (index maps, FFTs) whatever the count; also kinder to the cache.
    step = max(1, 2_000_000 // (height * width))
    rng = np.random.default_rng(seed)
    for start in range(0, count, step):
        stop = min(start + step, count)
        images[start:stop] = _render(rng, stop - start, height, width, channels)
    return torch.from_numpy(images)


def _radii(rng: np.random.Generator, largest: float, area: float) -> np.ndarray:
    """Radii with density r^-3 whose summed disc area is about ``area``, in random order of depth."""
    smallest = min(_SMALLEST, largest / 4)
    ratio = (smallest / largest) ** 2
    mean_area = np.pi * 2 * smallest**2 * np.log(largest / smallest) / (1 - ratio)
    number = max(8, round(area / mean_area))
    # One leaf a quantile: the same size mix in every image, so that few images already have the right statistics.
    quantiles = (np.arange(number) + rng.random(number)) / number
    return rng.permutation(smallest / np.sqrt(1 - quantiles * (1 - ratio)))


def _render(rng: np.random.Generator, count: int, height: int, width: int, channels: int) -> np.ndarray:
    largest = max(height, width) / 2
    padded_h, padded_w = height + 2, width + 2  # whatever falls outside the image is drawn on a ring around it
    # Centres also fall outside, where only a part of the leaf shows.
    reach_h, reach_w = height + 2 * largest, width + 2 * largest
    radii = _radii(rng, largest, _COVER * reach_h * reach_w)
    owner = np.zeros(count * padded_h * padded_w, dtype=np.int32)  # index of the leaf seen at a pixel, 0 = ground
    image_start = np.arange(count, dtype=np.int64) * (padded_h * padded_w)
    for leaf, radius in enumerate(radii, start=1):
        # All images draw their leaf-th leaf together: one size, but a place, shape and aspect of their own.
        centre_y = 1 - largest + reach_h * rng.random(count, dtype=np.float32)
        centre_x = 1 - largest + reach_w * rng.random(count, dtype=np.float32)
        extent = int(np.ceil(radius * 1.26)) + 1
        offsets = np.arange(-extent, extent + 1)
        base_y, base_x = np.floor(centre_y).astype(np.int64), np.floor(centre_x).astype(np.int64)
        dy = offsets[None, :] - (centre_y - base_y)[:, None]
        dx = offsets[None, :] - (centre_x - base_x)[:, None]
        dy, dx = dy.astype(np.float32), dx.astype(np.float32)
        rectangle = rng.random(count) < 0.25
        inside = np.empty((count, len(offsets), len(offsets)), dtype=bool)
        discs = ~rectangle
        inside[discs] = (dy[discs] ** 2)[:, :, None] + (dx[discs] ** 2)[:, None, :] <= radius**2
        # Sides of equal-area rectangles, aspect up to two to one.
        aspect = np.exp2(rng.uniform(-0.5, 0.5, count)).astype(np.float32)
        half = np.float32(radius * np.sqrt(np.pi) / 2)
        tall = np.abs(dy[rectangle]) <= (half * aspect[rectangle])[:, None]
        wide = np.abs(dx[rectangle]) <= (half / aspect[rectangle])[:, None]
        inside[rectangle] = tall[:, :, None] & wide[:, None, :]
        rows = np.clip(base_y[:, None] + offsets, 0, padded_h - 1)
        columns = np.clip(base_x[:, None] + offsets, 0, padded_w - 1)
        place = (rows * padded_w)[:, :, None] + columns[:, None, :]
        owner[(place + image_start[:, None, None])[inside]] = leaf
    seen = owner.reshape(count, padded_h, padded_w)[:, 1:-1, 1:-1]
    palette = _colours(rng, count, len(radii) + 1, channels)
    images = np.stack([palette[i][:, seen[i]] for i in range(count)])
    images += _pink_noise(rng, count, height, width, channels)
    return np.clip(images, 0, 1, out=images)


def _colours(rng: np.random.Generator, count: int, number: int, channels: int) -> np.ndarray:
    """(count, channels, number) colours around mid grey, each image with its own exposure, tint and contrast."""
    if channels == 3:
        mix = rng.standard_normal((count, number, 3), dtype=np.float32) * _COLOUR_SPREAD
        colours = np.ascontiguousarray((mix @ _COLOUR_AXES).transpose(0, 2, 1))
    else:
        colours = _COLOUR_SPREAD[0] * rng.standard_normal((count, 1, number), dtype=np.float32)
        if channels > 1:
            own = rng.standard_normal((count, channels, number), dtype=np.float32)
            colours = colours + _COLOUR_SPREAD[1] * own
    colours *= np.exp(_CONTRAST * rng.standard_normal((count, 1, 1), dtype=np.float32))
    colours += _EXPOSURE * rng.standard_normal((count, 1, 1), dtype=np.float32)
    colours += _TINT * rng.standard_normal((count, channels, 1), dtype=np.float32)
    return _MEAN + colours


def _pink_noise(rng: np.random.Generator, count: int, height: int, width: int, channels: int) -> np.ndarray:
    """(count, channels, H, W) noise, amplitude 1/f, no mean, standard deviation ``_NOISE_SPREAD``."""
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :]
    frequency = np.hypot(fy, fx)
    frequency[0, 0] = np.inf
    white = rng.standard_normal((count, channels, height, width), dtype=np.float32)
    if channels > 1:  # mostly brightness, as in the leaves
        white = 0.9 * white[:, :1] + 0.43 * white
    spectrum = torch.fft.rfft2(torch.from_numpy(white)) * torch.from_numpy((1 / frequency).astype(np.float32))
    noise = torch.fft.irfft2(spectrum, s=(height, width)).numpy()
    spread = noise.std(axis=(-2, -1), keepdims=True)
    return noise * (_NOISE_SPREAD / np.maximum(spread, 1e-6))
