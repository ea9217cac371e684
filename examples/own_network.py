"""A network that no library knows: any nn.Module works, `load` just needs its dense module to start from.

python examples/own_network.py
"""

import sys

import torch
from torch import nn

import sharefold


class Net(nn.Module):
    def __init__(self, width: int = 32, depth: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()) for _ in range(depth)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


output = sys.argv[1] if len(sys.argv) > 1 else "own-shared"
model, images = Net().eval(), torch.randn(100, 3, 32, 32)  # your network and your images, normalised
cal = sharefold.calibrate(model, images)
result = sharefold.convert_(model, sharefold.plan(model, "40%", cal), cal)
print(result.plan)
sharefold.save(model, output, force=True)
loaded = sharefold.load(output, model=Net())
print("logits identical:", torch.equal(loaded(images[:4]), model(images[:4])))
