"""Augmentations that work on a finished batch: random erasing, mixup and cutmix, all timm's."""

from __future__ import annotations

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
        """Images (B, C, H, W), changed in place; labels (B,), or (B, classes) once mixed."""
        if self.erase is not None:
            self.erase(images)
        if self.mix is not None:
            if len(images) % 2:
                raise SharefoldError(f"finetune: mixup pairs images: {len(images)} at a time: use an even batch size")
            images, labels = self.mix(images, labels.clamp_min(0) if self.mix.num_classes > 1 else labels * 0)
        return images, labels
