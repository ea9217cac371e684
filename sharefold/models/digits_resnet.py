"""``digits_resnet``: the small residual network of ``sharefold demo``, for scikit-learn's 8 x 8 digits.

He et al., https://arxiv.org/abs/1512.03385, at a size that trains in a minute on two CPU cores: two stages of
equal blocks, so that there is something to share. ``pretrained=True`` reads the weights that come with sharefold
(``scripts/train_demo.py`` made them); nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from sharefold.models._base import CifarNet, cifar_cfg, init_he
from sharefold.models.cifar_resnet import BasicBlock

__all__ = ["DigitsResNet"]

WEIGHTS = Path(__file__).parent.parent / "demo" / "digits.safetensors"
# Mean and standard deviation of the training pixels in [0, 1].
MEAN, STD = (0.305,), (0.376,)


class DigitsResNet(CifarNet):
    """3x3 stem and two stages of ``blocks`` basic blocks, ``width`` and twice ``width`` channels wide.

    Input (N, 1, 8, 8), output (N, num_classes) logits.
    """

    classifier_name = "fc"

    def __init__(
        self, blocks: int = 4, width: int = 24, num_classes: int = 10, in_chans: int = 1, global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU()
        self.layer1 = nn.Sequential(*(BasicBlock(width, width, 1) for _ in range(blocks)))
        first = BasicBlock(width, 2 * width, 2)
        self.layer2 = nn.Sequential(first, *(BasicBlock(2 * width, 2 * width, 1) for _ in range(blocks - 1)))
        self.feature_info = [
            {"num_chs": width, "reduction": 1, "module": "layer1"},
            {"num_chs": 2 * width, "reduction": 2, "module": "layer2"},
        ]
        self.build_head(2 * width, num_classes, global_pool, drop_rate)
        init_he(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"stem": r"^conv1|bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) -> (N, 2 * width, H / 2, W / 2)."""
        return self.layer2(self.layer1(self.act1(self.bn1(self.conv1(x)))))


default_cfgs = generate_default_cfgs(
    {
        "digits_resnet.digits": cifar_cfg(
            file=str(WEIGHTS), input_size=(1, 8, 8), pool_size=(4, 4), mean=MEAN, std=STD, license="apache-2.0"
        ),
    }
)


@register_model
def digits_resnet(pretrained: bool = False, **kwargs: Any) -> DigitsResNet:
    """The demo's network, 198,898 parameters at 10 classes."""
    return build_model_with_cfg(
        DigitsResNet, "digits_resnet", pretrained, feature_cfg={"out_indices": (0, 1)}, **kwargs
    )
