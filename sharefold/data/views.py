"""Endless new views of a few unlabelled images: warped, recoloured, and mixed in pairs.

Nothing here needs a label to stay valid: the original network says what every view means. A network knows the images that
it was trained on, and their shifts and mirror images; views have to go beyond those to say what it does with new ones
(aggressive views and a long schedule let a student follow a teacher's function: Beyer et al., "Knowledge distillation: a
good teacher is patient and consistent", CVPR 2022, https://arxiv.org/abs/2106.05237; mixup: Zhang et al.,
https://arxiv.org/abs/1710.09412; rectangles of other images: Yun et al., "CutMix", https://arxiv.org/abs/1905.04899).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Largest rotation, degrees; largest change of size and of the sides' ratio, as natural logarithms; largest shift, half sides.
ROTATION, SIZE, ASPECT, SHIFT = 15.0, 0.2, 0.1, 0.2
# Largest change of contrast and of colour (distance from grey), logarithms; of brightness and of a channel's, normalised values.
CONTRAST, COLOUR, BRIGHTNESS, TINT = 0.3, 0.6, 0.3, 0.1
# Share of the images that another one is blended into, with at most half of the weight, and of those that get a rectangle of
# another one; the rectangle's sides, as shares of the image's.
MIX = PASTE = 0.5
SHORTEST_SIDE, LONGEST_SIDE = 0.25, 0.75


def random_views(
    images: Tensor, generator: torch.Generator, *, strength: float = 1.0, mix: float = MIX, mirror: bool = True
) -> Tensor:
    """One random view of each image of a batch (B, C, H, W), volume of (B, C, D, H, W), or signal of (B, C, L); same shape, type
    and device.

    All slices of a volume, or frames of a video, get the same view. Signals are shifted and made louder or softer instead of
    warped and recoloured, and not mirrored.

    Args:
        images: normalised to about unit variance; the border is mirrored where a view looks outside.
        generator: a CPU generator; the same state gives the same views on every device.
        strength: factor on how far images are warped and recoloured; 0 only mirrors and mixes.
        mix: share of the images that another image of the batch is blended into, with at most half of the weight.
        mirror: whether half of the images are mirrored; a mirrored letter or digit is another one, or none.
    """
    if images.ndim == 3:
        return blended(_shifted(images, generator, strength), generator, mix)
    return blended(_recoloured(_warped(images, generator, strength, mirror), generator, strength), generator, mix)


def blended(images: Tensor, generator: torch.Generator, share: float = 1.0) -> Tensor:
    """Images (B, C, ...), a ``share`` of them with another of the batch blended in, with at most half of the weight."""
    partner = torch.randperm(len(images), generator=generator)
    chosen = torch.rand(len(images), generator=generator) < share
    weight = 0.5 * torch.rand(len(images), generator=generator) * chosen
    return torch.lerp(images, images[partner.to(images.device)], weight.to(images).view(-1, *[1] * (images.ndim - 1)))


def pasted(images: Tensor, generator: torch.Generator, share: float = 1.0) -> Tensor:
    """Images (B, C, H, W), a ``share`` of them with a rectangle of another one at its own place; of volumes in all slices.
    Signals (B, C, L) have none and stay."""
    if not share or images.ndim == 3:
        return images
    count = len(images)
    partner = torch.randperm(count, generator=generator)
    chosen = torch.rand(count, generator=generator) < share
    side = SHORTEST_SIDE + (LONGEST_SIDE - SHORTEST_SIDE) * torch.rand(2, count, generator=generator)
    start = (1 - side) * torch.rand(2, count, generator=generator)
    within = []
    for length, first, extent in zip(images.shape[-2:], start, side, strict=True):
        middle = (torch.arange(length) + 0.5) / length
        within.append((middle >= first[:, None]) & (middle < (first + extent)[:, None]))
    inside = within[0][:, :, None] & within[1][:, None, :] & chosen[:, None, None]
    inside = inside.view(count, *[1] * (images.ndim - 3), *images.shape[-2:]).to(images.device)
    return torch.where(inside, images[partner.to(images.device)], images)


def _shifted(signals: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Signals (B, C, L), or (B, L, C) where C < L, from another moment on, mirrored at their ends, at another volume."""
    if signals.shape[1] > signals.shape[2]:  # the longer axis is time
        return _shifted(signals.transpose(1, 2), generator, strength).transpose(1, 2).contiguous()
    count, length = len(signals), signals.shape[-1]
    drawn = 2 * torch.rand(2, count, generator=generator) - 1
    offset = (strength * SHIFT / 2 * length * drawn[0]).round().long()
    place = (torch.arange(length) + offset[:, None]) % (2 * length)
    place = torch.where(place < length, place, 2 * length - 1 - place).to(signals.device)
    volume = (strength * CONTRAST * drawn[1]).exp().to(signals)
    return signals.gather(2, place[:, None].expand_as(signals)) * volume[:, None, None]


def _warped(images: Tensor, generator: torch.Generator, strength: float, mirror: bool) -> Tensor:
    """Turned, scaled, stretched and shifted, and mirrored with probability 1/2."""

    def within(limit: float) -> Tensor:
        return strength * limit * (2 * torch.rand(len(images), generator=generator) - 1)

    angle, size, aspect = within(math.radians(ROTATION)), within(SIZE).exp(), within(ASPECT).exp()
    across, down = within(SHIFT), within(SHIFT)
    side = 1 - 2 * float(mirror) * (torch.rand(len(images), generator=generator) < 0.5).float()
    first = torch.stack([side * size * aspect * angle.cos(), -side * size * aspect * angle.sin(), across], 1)
    second = torch.stack([size / aspect * angle.sin(), size / aspect * angle.cos(), down], 1)
    slices = images.flatten(1, -3)
    grid = F.affine_grid(torch.stack([first, second], 1).to(images), list(slices.shape), align_corners=False)
    return F.grid_sample(slices, grid, padding_mode="reflection", align_corners=False).reshape(images.shape)


def _recoloured(images: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Other contrast, colour, brightness and tint."""

    def within(limit: float, channels: int = 1) -> Tensor:
        drawn = 2 * torch.rand(len(images), channels, 1, 1, generator=generator) - 1
        return (strength * limit * drawn).to(images).reshape(len(images), channels, *[1] * (images.ndim - 2))

    mean = images.mean(tuple(range(1, images.ndim)), keepdim=True)
    views = mean + (images - mean) * within(CONTRAST).exp()
    grey = views.mean(1, keepdim=True)
    views = grey + (views - grey) * within(COLOUR).exp()
    return views + within(BRIGHTNESS) + within(TINT, images.shape[1])
