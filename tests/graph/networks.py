"""Small hand-written networks for the graph tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OptionABlock(nn.Module):
    """Basic block of the CIFAR ResNets: the shortcut subsamples and pads channels, without parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.extra = (outputs - inputs) // 2
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.extra:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(y + x)


class OptionANet(nn.Module):
    """ResNet-(6n+2) for 3 x 32 x 32 with widths 8, 16, 32."""

    def __init__(self, n: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        widths = (8, 8, 16, 32)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(OptionABlock(widths[s] if b == 0 else widths[s + 1], widths[s + 1], 2 if s and b == 0 else 1)
                  for b in range(n))
            )
            for s in range(3)
        )  # fmt: skip
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = stage(x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Branching(nn.Module):
    """Forward code that depends on values, which no symbolic trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList(OptionABlock(8, 8, 1) for _ in range(3))
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.unused = nn.Conv2d(16, 16, 3)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if float(x.abs().sum()) >= 0:
                x = block(x)
        return self.fc(self.down(x).mean((2, 3)))


class Oddities(nn.Module):
    """One layer of every kind that is not shared, next to ordinary ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.borrowed = nn.Conv2d(8, 8, 3, padding=1)
        self.tied_a = nn.Conv2d(8, 8, 1)
        self.tied_b = nn.Conv2d(8, 8, 1)
        self.tied_b.weight = self.tied_a.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.line = nn.ConvTranspose1d(8, 8, 3, padding=1)
        self.tokens = nn.Linear(64, 64)
        self.unused = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(1, 8, 1, 1))
        self.embedding = nn.Parameter(torch.zeros(1, 8, 64))
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.borrowed(x) + F.conv2d(x, self.borrowed.weight, padding=1)
        x = self.up(self.normed(self.tied_b(self.tied_a(x)))) * self.scale
        x = F.avg_pool2d(x, 2).flatten(2)
        x = self.line(self.tokens(x) + self.embedding)
        return self.last(x.unflatten(2, (8, 8)))


class Recurrent(nn.Module):
    """One convolution run three times, each time with a BatchNorm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm in self.norms:
            x = norm(self.conv(x))
        return x


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter and running statistic a random value, so that no symmetry of the initial state is left."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_((2 / parameter[0].numel()) ** 0.5 * noise)
            else:
                parameter.copy_(1 + 0.3 * noise if name.endswith("weight") else 0.3 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
            elif name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model
