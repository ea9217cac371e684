"""Networks of other tasks than classes, trained here on real images and converted: what each is for, before and after.

    python benchmarks/tasks.py --data cifar10.npz --tasks denoiser super-resolver segmenter two-tasks

Every network is trained from scratch for ``--minutes`` by one thread on CIFAR-10's training images, and converted with a thousand
other ones of those, without their targets, on default settings. Measured are the task's own figure on 2,000 test images (PSNR
against the clean images, share of pixels decided alike, relative error of every output, of pictures also that against the truth)
and what the conversion says by itself.
One row a task in ``benchmarks/results/tasks.json``, beside the loss that it should not exceed; with ``--refine 2m`` what is lost
after refinement, too.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cifar import hardware
from finetune_cifar import write
from torch import Tensor, nn

import sharefold
from sharefold.running import evaluating

RESULTS = Path(__file__).parent / "results" / "tasks.json"
NOISE, TESTED, CALIBRATION = 25 / 255, 2000, 1000


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Denoiser(nn.Module):
    """Takes away the noise that it sees (Zhang et al., https://arxiv.org/abs/1608.03981)."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Sequential(block(1, 48), *[block(48, 48) for _ in range(6)], nn.Conv2d(48, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.noise(x)


class SuperResolver(nn.Module):
    """Adds detail to a bilinear enlargement (Shi et al., https://arxiv.org/abs/1609.05158)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU()]
        for _ in range(5):
            layers += [nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
        self.detail = nn.Sequential(*layers, nn.Conv2d(64, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return enlarged(x) + self.detail(x)


class UNet(nn.Module):
    """Three sizes with connections across (Ronneberger et al., https://arxiv.org/abs/1505.04597); one channel of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(block(3, 24), block(24, 24)), nn.Sequential(block(24, 48, 2), block(48, 48))
        self.bottom = nn.Sequential(block(48, 96, 2), block(96, 96), block(96, 96))
        self.up2, self.up1 = nn.Sequential(block(144, 48), block(48, 48)), nn.Sequential(block(72, 24), block(24, 24))
        self.head = nn.Conv2d(24, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.second(first)
        low = F.interpolate(self.bottom(second), scale_factor=2.0)
        middle = F.interpolate(self.up2(torch.cat([low, second], 1)), scale_factor=2.0)
        return self.head(self.up1(torch.cat([middle, first], 1)))


class TwoTasks(nn.Module):
    """A class and a small picture from one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            block(3, 32), block(32, 32), block(32, 64, 2), *[block(64, 64) for _ in range(3)], block(64, 96, 2), block(96, 96)
        )
        self.classes, self.picture = nn.Linear(96, 10), nn.Conv2d(96, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.trunk(x)
        return {"classes": self.classes(maps.mean((2, 3))), "picture": self.picture(maps)}


Batch = tuple[Tensor, Any]


def grey(images: Tensor) -> Tensor:
    return images.mean(1, keepdim=True)


def noisy_grey(images: Tensor, labels: Tensor, random: torch.Generator) -> Batch:
    clean = grey(images)
    return clean + NOISE * torch.randn(clean.shape, generator=random), clean


def halved(images: Tensor, labels: Tensor, random: torch.Generator) -> Batch:
    return F.avg_pool2d(images, 2), images


def enlarged(images: Tensor) -> Tensor:
    return F.interpolate(images, scale_factor=2.0, mode="bilinear")


def bright(images: Tensor, labels: Tensor, random: torch.Generator) -> Batch:
    """The smoothed image brighter than its mean, told from a noisy one."""
    smooth = F.avg_pool2d(F.pad(grey(images), (3, 3, 3, 3), mode="reflect"), 7, 1)
    return images + NOISE * torch.randn(images.shape, generator=random), (smooth > smooth.mean((2, 3), keepdim=True)).float()


def both(images: Tensor, labels: Tensor, random: torch.Generator) -> Batch:
    return images, (labels, F.adaptive_avg_pool2d(images, 8))


def psnr(output: Tensor, target: Tensor) -> float:
    """dB, of each image, on average."""
    return float((-10 * (output - target).square().mean((1, 2, 3)).log10()).mean())


def both_losses(output: dict[str, Tensor], target: Any) -> Tensor:
    return F.cross_entropy(output["classes"], target[0]) + 10 * F.mse_loss(output["picture"], target[1])


def relative(a: Tensor, b: Tensor) -> float:
    """Root of the squared error of ``b`` over the variance of ``a``, a channel."""
    axes = [axis for axis in range(a.ndim) if axis != 1]
    spread = a.var(axes, keepdim=True).clamp_min(1e-12)
    return float(((a - b).square() / spread).mean().sqrt())


@dataclass(frozen=True)
class Task:
    """A network, what it learns, to which size it is converted, and how much it may lose there."""

    network: Callable[[], nn.Module]
    batch: Callable[[Tensor, Tensor, torch.Generator], Batch]
    loss: Callable[[Any, Any], Tensor]
    budget: str
    unit: str
    most: float
    outputs: str | None = None
    crop: int = 32  # side of what it learns from
    without: Callable[[Tensor], Tensor] | None = None  # what there is without a network


TASKS = {
    "denoiser": Task(Denoiser, noisy_grey, F.mse_loss, "50%", "dB lost", 0.15, crop=16, without=lambda x: x),
    "super-resolver": Task(SuperResolver, halved, F.mse_loss, "25%", "dB lost", 0.05, crop=16, without=enlarged),
    "segmenter": Task(UNet, bright, F.binary_cross_entropy_with_logits, "16%", "% of pixels decided otherwise", 1.0, "binary"),
    "two-tasks": Task(TwoTasks, both, both_losses, "50%", "% relative error of the worse output", 2.0),
}  # fmt: skip


def train(net: nn.Module, batch_loss: Callable[[int], Tensor], minutes: float) -> int:
    """So many minutes of AdamW with a step that falls to 2 %; gives the number of updates.

    Args:
        batch_loss: the loss of the next batch, of the update of this number.
    """
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    start, updates, seconds = time.perf_counter(), 0, 60 * minutes
    while (spent := time.perf_counter() - start) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * max(0.02, 1 - spent / seconds)
        optimizer.zero_grad()
        batch_loss(updates).backward()
        optimizer.step()
        updates += 1
    net.eval()
    return updates


def trained(task: Task, images: Tensor, labels: Tensor, minutes: float) -> tuple[nn.Module, int]:
    """The network after so many minutes, and the number of updates."""
    torch.manual_seed(0)
    net, random = task.network(), torch.Generator().manual_seed(0)

    def batch_loss(update: int) -> Tensor:
        pick = torch.randint(0, len(images), (64,), generator=random)
        top, left = torch.randint(0, 33 - task.crop, (2,), generator=random).tolist()
        some = images[pick][:, :, top : top + task.crop, left : left + task.crop]
        inputs, target = task.batch(some.flip(3) if update % 2 else some, labels[pick], random)
        return task.loss(net(inputs), target)

    return net, train(net, batch_loss, minutes)


@torch.no_grad()
def lost(task: Task, before: nn.Module, after: nn.Module, inputs: Tensor, target: Any) -> dict[str, Any]:
    """The task's figure of both networks, and what was lost."""
    with evaluating(before, after):
        pairs = [(before(part), after(part)) for part in inputs.split(200)]
    if isinstance(pairs[0][0], dict):
        found = {key: relative(*(torch.cat([pair[i][key] for pair in pairs]) for i in (0, 1))) for key in pairs[0][0]}
        right = [float((torch.cat([p[i]["classes"] for p in pairs]).argmax(1) == target[0]).float().mean()) for i in (0, 1)]
        truth = [relative(target[1], torch.cat([p[i]["picture"] for p in pairs])) for i in (0, 1)]
        return {"before": right[0], "after": right[1], "truth": truth, "errors": found, "lost": 100 * max(found.values())}
    first, second = (torch.cat([pair[i] for pair in pairs]) for i in (0, 1))
    if task.outputs == "binary":
        right = [float(((output > 0) == (target > 0.5)).float().mean()) for output in (first, second)]
        return {"before": right[0], "after": right[1], "lost": 100 * float(((first > 0) != (second > 0)).float().mean())}
    assert task.without is not None
    without, start, end = (psnr(output, target) for output in (task.without(inputs), first, second))
    return {"without": without, "before": start, "after": end, "lost": start - end}


def converted(
    net: nn.Module, seen: Tensor, budget: str, lost: Callable[[nn.Module], dict[str, Any]], *, most: float, seed: int = 0,
    refine: str | None = None, outputs: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What a conversion of ``net`` by images ``seen`` loses, for a row of the table.

    Args:
        lost: figures of a converted network, ``lost`` among them, which should be ``most``.
        refine: also refined so long.
    """
    model, start = copy.deepcopy(net), time.process_time()
    cal = sharefold.calibrate(model, seen, seed=seed, outputs=outputs)
    plan = sharefold.plan(model, budget, cal)
    done = sharefold.convert_(model, plan, cal)
    seconds = time.process_time() - start
    sizes = [sum(p.numel() for p in m.parameters()) for m in (net, model)]
    found, refined = lost(model), None
    if refine:
        model = copy.deepcopy(net)
        sharefold.convert_(model, plan, cal, refine=refine)
        refined = {"effort": refine, **lost(model)}
    return {
        "budget": budget, "seed": seed, "params": sizes, **found, "most": most, "reached": found["lost"] <= most,
        "refined": refined, "said": [f"{figure.name} {figure.metric} {figure.text()}" for figure in done.outputs],
        "cpu_seconds": round(seconds, 1), "methods": sorted({group.method for group in plan.groups}), "hardware": hardware(),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def measure(name: str, data: dict[str, Tensor], minutes: float, seed: int, refine: str | None) -> dict[str, Any]:
    task, random = TASKS[name], torch.Generator().manual_seed(1)
    used = len(data["train_x"]) - CALIBRATION
    net, updates = trained(task, data["train_x"][:used], data["train_y"][:used], minutes)
    inputs, target = task.batch(data["test_x"], data["test_y"], random)
    seen = task.batch(data["train_x"][used:], data["train_y"][used:], random)[0]
    found = converted(
        net, seen, task.budget, lambda model: lost(task, net, model, inputs, target), most=task.most, seed=seed, refine=refine,
        outputs=task.outputs,
    )  # fmt: skip
    return {"task": name, "updates": updates, "minutes": minutes, "unit": task.unit, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="npz with train_x, train_y, test_x, test_y")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--minutes", type=float, default=4.0, help="of training a network")
    parser.add_argument("--refine", metavar="EFFORT", help="also refined so long: 2m, or so many epochs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with np.load(options.data) as file:
        data: dict[str, Tensor] = {}
        for split, count in (("train", None), ("test", TESTED)):
            pixels = torch.from_numpy(file[f"{split}_x"][:count]).permute(0, 3, 1, 2)
            data[f"{split}_x"] = pixels.float().div_(255)
            data[f"{split}_y"] = torch.from_numpy(file[f"{split}_y"][:count]).long()
    for name in options.tasks:
        row = measure(name, data, options.minutes, options.seed, options.refine)
        print(json.dumps(row), flush=True)
        write(options.out, row, ("task", "seed"))


if __name__ == "__main__":
    main()
