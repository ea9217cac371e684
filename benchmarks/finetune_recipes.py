"""Which optimizer and loss a converted network is fine-tuned with, compared on the first half of the test images.

    python benchmarks/finetune_recipes.py resnet56-319k --source resnet56.th --data npz:cifar10.npz --epochs 8

A case of ``finetune_cifar.py`` is converted once (or read, ``--start``) and trained from there with each entry of RECIPES. The
public networks know all training images by heart, so that none of these can be held back; the second half of the test images
decides nothing, and ``finetune_cifar.py`` reports it by itself. One JSON record a recipe.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import finetune_cifar

from sharefold.data import open_data
from sharefold.finetune.distributed import pick_device
from sharefold.finetune.loop import finetune
from sharefold.sources import open_source

SGD: dict[str, Any] = {"optimizer": "sgd", "weight_decay": 5e-4, "decay": "all"}
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "adamw-2e-3": {"lr": 2e-3},
    "adamw-3e-3-decay": {"lr": 3e-3, "weight_decay": 0.05, "decay": "all"},
    "sgd-.02": {**SGD, "lr": 0.02},
    "sgd-.05": {**SGD, "lr": 0.05},
    "sgd-.2": {**SGD, "lr": 0.2},
    "sgd-.2-filters": {**SGD, "lr": 0.2, "decay": "filters"},
    "mixup-.4": {"mixup": 0.4},
    "temperature-2": {"temperature": 2.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=finetune_cifar.CASES)
    parser.add_argument("--source", required=True, help="the dense network")
    parser.add_argument("--start", type=Path, help="the converted network, a sharefold directory, instead of converting")
    parser.add_argument("--data", required=True, help="DATA with splits train and test")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of all recipes")
    parser.add_argument("--out", type=Path, default=finetune_cifar.RESULTS / "finetune_recipes.json")
    options = parser.parse_args()
    settings = finetune_cifar.settings_of(options.set)
    opened = open_source(options.source)
    dense, case = opened.model.to(pick_device(options.device)), finetune_cifar.CASES[options.case]
    start = finetune_cifar.start_of(dense, opened.pretrained_cfg, case, options.data, options.seed, options.start)
    train = open_data(options.data, "train", transform_cfg=opened.pretrained_cfg)
    deciding = finetune_cifar.halves(open_data(options.data, "test", transform_cfg=opened.pretrained_cfg))[0]
    for name in options.recipes:
        model, chosen = copy.deepcopy(start), {**settings, **RECIPES[name]}
        report = finetune(
            model, train, deciding, teacher=dense, quiet=True, epochs=options.epochs, eval_epochs=options.epochs,
            seed=options.seed, device=options.device, **chosen,
        )  # fmt: skip
        record = {
            "case": options.case, "recipe": name, "settings": chosen, "epochs": options.epochs, "seed": options.seed,
            "deciding_images": len(deciding),
            "top1_before": report.top1_before, "top1": report.top1_after, "top1_dense": report.teacher_top1,
            "seconds": report.seconds, "images_per_second": report.images_per_second,
            "hardware": finetune_cifar.hardware(), "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        print(json.dumps(record), flush=True)
        finetune_cifar.write(options.out, record, ("case", "recipe", "epochs", "seed"))


if __name__ == "__main__":
    main()
