"""The training schedules that the five systems were published with, for training their networks from random weights.

Each entry is the difference from :class:`FinetuneConfig`'s defaults, with the source of the numbers. All are "from
scratch": no teacher, full weight decay, no average of weights. What the published code does beyond a schedule (picking
the best epoch by its accuracy on test images) is left to the user: ``--keep best``.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from sharefold.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from sharefold.errors import SharefoldError
from sharefold.finetune.config import FinetuneConfig

_SCRATCH: dict[str, Any] = {
    "distill": 0.0, "block_match": 0.0, "orthogonality": 0.0, "ema": 0.0, "decay": "all", "bank_step": "1.0",
    "warmup_epochs": 0.0, "momentum": 0.9, "optimizer": "momentum", "lr": 0.1,
}  # fmt: skip
_IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
_RMSPROP = {"optimizer": "rmsprop", "weight_decay": 0.0, "eps": 1e-7, "momentum": 0.0, "batch_size": 64}


@dataclass(frozen=True)
class Published:
    """One published schedule: where it is from, what it trains, and its settings."""

    source: str
    trains: str
    settings: dict[str, Any]

    def config(self) -> FinetuneConfig:
        return FinetuneConfig.build(None, **{**_SCRATCH, **self.settings})


SCHEDULES: dict[str, Published] = {
    "kernel-sharing-convmixer": Published(
        "https://arxiv.org/abs/2210.14151", "ConvMixer-256/16 on CIFAR-10 and CIFAR-100",
        {"optimizer": "adamw", "lr": 1e-2, "min_lr": 1e-6, "schedule": "cosine", "epochs": 200, "batch_size": 128,
         "weight_decay": 0.01, "decay": "filters", "eps": 1e-3, "clip": 1.0, "auto_augment": "rand-m9-mstd0.5-inc1",
         "mixup": 0.5, "cutmix": 0.5, "label_smoothing": 0.1, "random_erase": 0.25, "augment": "crop4+flip",
         **_IMAGENET},
    ),
    "kernel-sharing-se-resnet": Published(
        "https://arxiv.org/abs/2210.14151", "SE-ResNet on CIFAR-10 and CIFAR-100",
        {"epochs": 256, "schedule": "multistep", "milestones": (85, 130, 180), "batch_size": 128, "weight_decay": 1e-4,
         "augment": "crop4+flip", "mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)},
    ),
    "lrunet": Published(
        "https://arxiv.org/abs/1901.09615", "LruNet on CIFAR-10, CIFAR-100 and Fashion-MNIST, pixels not normalised",
        {"epochs": 300, "schedule": "multistep", "milestones": (200, 250), "batch_size": 256, "weight_decay": 5e-4,
         "augment": "crop4+rotate10+flip", "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
    ),
    "keffnet-cifar10": Published(
        "https://doi.org/10.3233/FAIA210112", "kEffNet on CIFAR-10 enlarged to 224 pixels",
        {**_RMSPROP, "epochs": 50, "lr": 0.003, "schedule": "exponential", "gamma": (0.99,),
         "augment": "rotate15+shift0.1+shear0.2+zoom0.3+flip", "mean": (0.0,) * 3, "std": (1 / 255,) * 3},
    ),
    "keffnet-plantdoc": Published(
        "https://doi.org/10.3233/FAIA210112", "kEffNet on cropped PlantDoc (there with a channel shift too)",
        {**_RMSPROP, "epochs": 75, "batch_size": 32, "lr": 0.01, "schedule": "exponential", "gamma": (0.97,),
         "augment": "rotate20+shift0.3"},
    ),
    "keffnet-pet": Published(
        "https://doi.org/10.3233/FAIA210112", "kEffNet on Oxford-IIIT Pet (there with a channel shift too)",
        {**_RMSPROP, "epochs": 150, "batch_size": 32, "lr": 0.001, "schedule": "cyclical",
         "augment": "rotate20+shift0.3"},
    ),
    "keffnet-cyclical": Published(
        "kEffNetV1 (MENDEL 2022), kEffNetV2 (Entropy 2022)", "kEffNet V1 and V2 on CIFAR-10 and CIFAR-100",
        {**_RMSPROP, "epochs": 50, "lr": 0.001, "schedule": "cyclical",
         "augment": "rotate20+shift0.3+shear0.2+zoom0.3+flip"},
    ),
    "filter-bases-cifar10": Published(
        "https://arxiv.org/abs/2006.05066", "ResNet-32 and ResNet-56 with shared filter bases on CIFAR-10",
        {"epochs": 300, "schedule": "multistep", "milestones": (150, 225), "batch_size": 256, "weight_decay": 5e-4,
         "augment": "crop4+flip", "orthogonality": 10.0, "orthogonality_form": "with-unique",
         "orthogonality_joint": True, **_IMAGENET},
    ),
    "filter-bases-cifar100": Published(
        "https://arxiv.org/abs/2006.05066", "ResNet-34, DenseNet-121, ResNeXt-50, MobileNetV2 on CIFAR-100",
        {"epochs": 300, "schedule": "multistep", "milestones": (150, 225), "batch_size": 256, "weight_decay": 5e-4,
         "augment": "crop4+flip", "orthogonality": 10.0, "orthogonality_joint": True, "mean": (0.507, 0.487, 0.441),
         "std": (0.267, 0.256, 0.276)},
    ),
    "filter-bases-imagenet": Published(
        "https://arxiv.org/abs/2006.05066", "ResNets on ImageNet (weight decay 4e-5 for ResNet-50-Shared)",
        {"epochs": 150, "schedule": "multistep", "milestones": (60, 100, 140), "batch_size": 256, "weight_decay": 1e-4,
         "orthogonality": 10.0, "orthogonality_joint": True, **_IMAGENET},
    ),
    "filter-bases-imagenet-mobilenet": Published(
        "https://arxiv.org/abs/2006.05066", "MobileNetV2 on ImageNet",
        {"epochs": 300, "schedule": "multistep", "milestones": (150, 225, 285), "gamma": (0.1, 0.1, 0.5),
         "batch_size": 256, "weight_decay": 1e-5, "orthogonality": 10.0, "orthogonality_form": "separate", **_IMAGENET},
    ),
    "sharesnet-cifar": Published(
        "https://arxiv.org/abs/1702.08782", "pre-activation ResNet-164 and wide ResNets on CIFAR",
        {"optimizer": "sgd", "epochs": 200, "schedule": "multistep", "milestones": (60, 120, 160), "gamma": (0.2,),
         "batch_size": 128, "weight_decay": 5e-4, "augment": "crop4r+flip",
         "mean": (125.3 / 255, 123.0 / 255, 113.9 / 255), "std": (63.0 / 255, 62.1 / 255, 66.7 / 255)},
    ),
    "sharesnet-imagenet": Published(
        "https://arxiv.org/abs/1702.08782", "ResNet-34 to -152 on ImageNet, the schedule of fb.resnet.torch",
        {"optimizer": "sgd", "epochs": 90, "schedule": "multistep", "milestones": (30, 60), "batch_size": 256,
         "weight_decay": 1e-4, **_IMAGENET},
    ),
}  # fmt: skip


def published(name: str) -> Published:
    """The schedule of that name. Raises SharefoldError with the nearest known names."""
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name, SCHEDULES, n=2, cutoff=0.4) or list(SCHEDULES)
        raise SharefoldError(f"recipe schedule {name!r} is not known: {', '.join(near)}")
    return SCHEDULES[name]
