"""Scaffolding common to the CIFAR-sized networks: timm's classifier interface over a pooled feature map."""

from __future__ import annotations

from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SelectAdaptivePool2d
from torch import nn


class CifarNet(nn.Module):
    """Feature extractor + global pooling + one linear classifier, with timm's method names.

    Subclasses build their layers, call :meth:`build_head` last and implement :meth:`forward_features`.
    ``classifier_name`` is the attribute that holds the final ``nn.Linear``; it follows the layout of the
    public checkpoints where there are any.
    """

    classifier_name = "fc"

    num_classes: int
    num_features: int
    head_hidden_size: int

    def build_head(self, num_features: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        self.num_features = num_features
        self.head_drop = nn.Dropout(drop_rate)
        self.set_head(num_classes, global_pool)

    def set_head(self, num_classes: int, global_pool: str) -> None:
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        head = nn.Linear(self.head_hidden_size, num_classes) if num_classes > 0 else nn.Identity()
        setattr(self, self.classifier_name, head)

    def get_classifier(self) -> nn.Module:
        return getattr(self, self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one (0 classes: identity); keeps device, dtype and train/eval mode."""
        parameter = next(self.parameters())
        self.set_head(num_classes, self.global_pool.pool_type if global_pool is None else global_pool)
        self.get_classifier().to(device=parameter.device, dtype=parameter.dtype)
        self.train(self.training)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def init_he(module: nn.Module) -> None:
    """He initialisation over the fan-out for convolutions, 1/0 for BatchNorm (https://arxiv.org/abs/1502.01852)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            if not layer.weight.is_meta:  # where drawing takes longer than with memory
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


def cifar_cfg(url: str = "", **overrides: Any) -> dict[str, Any]:
    """timm pretrained_cfg of a 32 x 32 network: no resizing, no cropping, ImageNet mean and std unless given."""
    return {
        "url": url,
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        **overrides,
    }


def unwrap_checkpoint(state: dict[str, Any], model: nn.Module | None = None) -> dict[str, torch.Tensor]:
    """Tensors of a public training checkpoint under this package's names.

    Takes the ``state_dict`` or ``net`` entry where the file has one and drops DataParallel's ``module.`` prefix.
    ``model`` is unused; timm passes it to every checkpoint filter.
    """
    for wrapper in ("state_dict", "net"):
        if isinstance(state.get(wrapper), dict):
            state = state[wrapper]
            break
    return {name.removeprefix("module."): value for name, value in state.items()}
