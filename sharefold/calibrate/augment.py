"""Endless new views of a few unlabelled images: shifts, flips, and mixtures of pairs.

Nothing here needs a label to stay valid: the original network says what every view means. Aggressive mixing over a long
schedule is what lets a student follow a teacher's function from few images (Beyer et al., "Knowledge distillation: a
good teacher is patient and consistent", CVPR 2022, https://arxiv.org/abs/2106.05237; mixup: Zhang et al.,
https://arxiv.org/abs/1710.09412).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def random_views(images: Tensor, generator: torch.Generator, *, shift: float = 1 / 8, mix: float = 0.5) -> Tensor:
    """One random view of each image of a batch (B, C, H, W); same shape, dtype and device.

    Args:
        generator: a CPU generator; the same state gives the same views on every device.
        shift: largest shift as a share of each side; what comes in is 0, the mean colour of a normalised image.
        mix: share of the images that another image of the batch is blended into, with at most half of the weight.
    """
    moved = _shifted(images, generator, shift)
    partner = torch.randperm(len(images), generator=generator)
    chosen = torch.rand(len(images), generator=generator) < mix
    weight = 0.5 * torch.rand(len(images), generator=generator) * chosen
    weight = weight.to(images)[:, None, None, None]
    return torch.lerp(moved, moved[partner.to(images.device)], weight)


def _shifted(images: Tensor, generator: torch.Generator, shift: float) -> Tensor:
    """Every image moved by its own whole number of pixels, and mirrored with probability 1/2."""
    count, _, height, width = images.shape
    reach_y, reach_x = round(shift * height), round(shift * width)
    down = torch.randint(0, 2 * reach_y + 1, (count, 1), generator=generator)
    right = torch.randint(0, 2 * reach_x + 1, (count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    rows = down + torch.arange(height)
    columns = right + torch.arange(width)
    columns = torch.where(mirrored, columns.flip(1), columns)
    device = images.device
    padded = F.pad(images, (reach_x, reach_x, reach_y, reach_y)).movedim(1, -1)
    index = torch.arange(count, device=device)[:, None, None]
    return padded[index, rows.to(device)[:, :, None], columns.to(device)[:, None, :]].movedim(-1, 1).contiguous()
