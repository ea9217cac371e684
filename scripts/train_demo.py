"""Trains the network of ``sharefold demo`` on scikit-learn's digits and writes sharefold/demo/digits.safetensors.

    python scripts/train_demo.py                # 30 epochs, about a minute on two CPU cores

1,438 training images, 359 test images (the fixed split of DATA ``digits``). The result is part of the repository, so
nobody needs to run this; it is here to show where the weights come from.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

import sharefold.models  # noqa: F401  (registers the network)
from sharefold.data import open_data
from sharefold.finetune.loop import finetune
from sharefold.finetune.scratch import reinitialize
from sharefold.models.digits_resnet import WEIGHTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    model = timm.create_model("digits_resnet")
    reinitialize(model, options.seed)
    config = model.pretrained_cfg
    start = time.perf_counter()
    report = finetune(
        model, open_data("digits", "train", transform_cfg=config), open_data("digits", "test", transform_cfg=config),
        epochs=options.epochs, seed=options.seed, batch_size=64, lr=5e-3, weight_decay=0.02,
        augment="crop1+rotate10+shear0.1+zoom0.1", label_smoothing=0.05, ema=0.99, device="cpu",
    )  # fmt: skip
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, str(options.out), {"format": "pt"})
    size = options.out.stat().st_size
    print(
        f"top-1 {report.top1_after:.4f} after {time.perf_counter() - start:.0f} s; {options.out.name}: {size:,} bytes"
    )


if __name__ == "__main__":
    main()
