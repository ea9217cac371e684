"""Networks with channels that only their own block reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(i: int, o: int, k: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, groups=groups)


class Head(nn.Module):
    """Runs ``body`` between a stem and a classifier of 8 channels."""

    def __init__(self, body: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv(3, 8, 3), body, nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class Excited(nn.Module):
    """Expand, depthwise, squeeze and excite, project, with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm, self.act = conv(8, 12), nn.BatchNorm2d(12), nn.PReLU(12)
        self.depthwise, self.reduce, self.excite, self.project = conv(12, 12, 3, 12), conv(12, 3), conv(3, 12), conv(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.act(self.norm(self.expand(x))))
        y = y * torch.sigmoid(self.excite(F.relu(self.reduce(y.mean((2, 3), keepdim=True)))))
        return x + self.project(y)


VGG = nn.Sequential(
    conv(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), conv(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 16, 3),
    nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4),
)  # fmt: skip
