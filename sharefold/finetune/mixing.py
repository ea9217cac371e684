"""Augmentations that work on a finished batch: random erasing, mixup and cutmix, all timm's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sharefold.errors import SharefoldError
from sharefold.finetune.config import FinetuneConfig


class Mixing:
    """Erases, then mixes. Draws from the global generators, which the loop seeds for each step."""

    def __init__(self, config: FinetuneConfig, classes: int, device: str) -> None:
        from timm.data import Mixup
        from timm.data.random_erasing import RandomErasing

        self.erase = self.mix = None
        if config.random_erase:
            self.erase = RandomErasing(config.random_erase, mode="pixel", device=device)
        if config.mixup or config.cutmix:
            smoothing, kinds = (config.label_smoothing, classes) if config.labels else (0.0, 1)
            self.mix = Mixup(config.mixup, config.cutmix, label_smoothing=smoothing, num_classes=kinds)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W), changed in place; labels (B,) or shares (B, classes), as which they come back once mixed."""
        if self.erase is not None:
            self.erase(images)
        if self.mix is not None:
            if len(images) % 2:
                raise SharefoldError(f"finetune: mixup pairs images: {len(images)} at a time: use an even batch size")
            if labels.ndim == 2:
                return self._mixed_shares(self.mix, images, labels)
            images, labels = self.mix(images, labels.clamp_min(0) if self.mix.num_classes > 1 else labels * 0)
        return images, labels

    @staticmethod
    def _mixed_shares(mix: Any, images: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """timm mixes classes alone: with every image as a class of its own it says how much of which image is in each. Shares
        are not smoothed, as without mixing."""
        mix.num_classes, mix.label_smoothing = len(images), 0.0
        images, parts = mix(images, torch.arange(len(images), device=images.device))
        return images, parts @ shares
