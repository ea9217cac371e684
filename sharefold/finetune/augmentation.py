"""Augmentation of a whole batch of small images at once, on whatever device they lie.

A chain is written ``crop4+flip``, ``crop4r+flip`` (reflected border), ``crop4+rotate10+flip``,
``rotate20+shift0.3+shear0.2+zoom0.3+flip``. The numbers are pixels (crop), degrees (rotate), fractions of the side
(shift), tangent-free shear angles in radians (shear) and the relative range of the scale (zoom).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sharefold.errors import SharefoldError


@dataclass(frozen=True)
class Augment:
    """A parsed chain. The chain's order does not matter: crop and flip come first, one affine map follows."""

    crop: int = 0
    reflect: bool = False
    flip: bool = False
    rotate: float = 0.0
    shift: float = 0.0
    shear: float = 0.0
    zoom: float = 0.0

    @classmethod
    def parse(cls, chain: str) -> Augment:
        """Reads a chain; ``none`` or an empty one changes nothing. Raises SharefoldError on an unknown part."""
        result = cls()
        for part in filter(None, (p.strip() for p in chain.split("+"))):
            if part == "none":
                continue
            if part == "flip":
                result = replace(result, flip=True)
            elif found := re.fullmatch(r"crop(\d+)(r?)", part):
                result = replace(result, crop=int(found[1]), reflect=bool(found[2]))
            elif found := re.fullmatch(r"(rotate|shift|shear|zoom)(\d+(?:\.\d+)?)", part):
                values: dict[str, Any] = {found[1]: float(found[2])}
                result = replace(result, **values)
            else:
                known = "flip, cropN, cropNr, rotateN, shiftN, shearN, zoomN"
                raise SharefoldError(f"finetune: augment={chain!r}: unknown part {part!r}: use {known}, joined by +")
        return result

    @property
    def affine(self) -> bool:
        return any((self.rotate, self.shift, self.shear, self.zoom))

    def draw(self, count: int, generator: torch.Generator) -> Draw:
        """Random numbers for ``count`` images, drawn on the CPU so that every device and rank agrees on them."""

        def uniform() -> Tensor:
            return torch.rand(count, generator=generator)

        reach = 2 * self.crop + 1
        dy, dx = ((uniform() * reach).long().clamp_max(reach - 1) - self.crop for _ in range(2))
        flip = (uniform() < 0.5) & self.flip
        theta = None
        if self.affine:
            angle = (2 * uniform() - 1) * math.radians(self.rotate)
            slant = (2 * uniform() - 1) * self.shear
            sx, sy = (1 + (2 * uniform() - 1) * self.zoom for _ in range(2))
            tx, ty = ((2 * uniform() - 1) * 2 * self.shift for _ in range(2))
            row1 = torch.stack([sx * angle.cos(), -sy * (angle + slant).sin(), tx], 1)
            row2 = torch.stack([sx * angle.sin(), sy * (angle + slant).cos(), ty], 1)
            theta = torch.stack([row1, row2], 1)
        return Draw(dy, dx, flip, theta)

    def apply(self, images: Tensor, index: Tensor, draw: Draw) -> Tensor:
        """Images ``index`` (B,) of ``images`` (N, H, W, C), cropped and flipped: (B, H, W, C), still of that dtype."""
        if not self.crop and not self.flip:
            return images[index]
        height, width = images.shape[1:3]
        device = images.device
        draw = draw.to(device)
        rows = torch.arange(height, device=device) + draw.dy[:, None]
        cols = torch.arange(width, device=device) + draw.dx[:, None]
        cols = torch.where(draw.flip[:, None], cols.flip(1), cols)
        if self.reflect:
            rows, cols = _reflected(rows, height), _reflected(cols, width)
            return images[index[:, None, None], rows[:, :, None], cols[:, None, :]]
        row_in, col_in = (rows >= 0) & (rows < height), (cols >= 0) & (cols < width)
        rows, cols = rows.clamp(0, height - 1), cols.clamp(0, width - 1)
        picked = images[index[:, None, None], rows[:, :, None], cols[:, None, :]]
        inside = row_in[:, :, None] & col_in[:, None, :]
        return picked * inside[..., None].to(picked.dtype)

    def warp(self, images: Tensor, draw: Draw) -> Tensor:
        """The affine part on float images (B, C, H, W); outside is 0."""
        if draw.theta is None:
            return images
        grid = F.affine_grid(sent(draw.theta, images.device), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


def shrunk(images: Tensor) -> Tensor:
    """Images (B, C, H, W) at 3/4 of their height and width, rounded to multiples of 4, at least 8."""
    sides = [max(8, round(side * 3 / 16) * 4) for side in images.shape[-2:]]
    return F.interpolate(images, sides, mode="bilinear", antialias=True)


@dataclass(frozen=True)
class Draw:
    """Random numbers of a batch: row and column offsets (B,) int64, flips (B,) bool, affine maps (B, 2, 3) or None."""

    dy: Tensor
    dx: Tensor
    flip: Tensor
    theta: Tensor | None

    def part(self, where: slice) -> Draw:
        """The numbers of some of the images."""
        theta = None if self.theta is None else self.theta[where]
        return Draw(self.dy[where], self.dx[where], self.flip[where], theta)

    def to(self, device: torch.device) -> Draw:
        """The same numbers on a device."""
        theta = None if self.theta is None else sent(self.theta, device)
        return Draw(sent(self.dy, device), sent(self.dx, device), sent(self.flip, device), theta)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU on ``device``. CUDA copies it aside at once, so nobody waits for the work before it."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def _reflected(index: Tensor, size: int) -> Tensor:
    """Indices below 0 or above size - 1 mirrored back, the border pixel not repeated."""
    index = index.abs()
    return (size - 1) - ((size - 1) - index).abs()
