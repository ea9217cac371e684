"""What each part of fine-tuning brings: the same short run with one part changed at a time, over several seeds.

    python benchmarks/finetune_ablation.py --source resnet20.th --data npz:cifar10.npz --limit 10000 --seeds 3

Prints a table and writes results/finetune_ablation.json, after every row; rows of an earlier run with the same settings
stay unless they are measured again. The network is converted once, with one bank a stage (method ``basis``), so that the
parts that concern banks have something to act on; without pivots unless ``--pivots``. Top-1 is of the test images.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from finetune_cifar import RESULTS, converted, hardware
from torch import Tensor, nn

from sharefold.data import open_data
from sharefold.finetune.loaders import limited
from sharefold.finetune.loop import finetune
from sharefold.layers import shared_layers
from sharefold.sources import open_source

SGD = {"optimizer": "momentum", "lr": 0.01, "weight_decay": 5e-4}
PARTS: dict[str, dict[str, Any]] = {
    "all defaults": {},
    "no distillation (labels alone)": {"distill": 0.0},
    "no labels (distillation alone)": {"labels": False},
    "block outputs matched too, b = 0.3": {"block_match": 0.3},
    "no orthogonality": {"orthogonality": 0.0},
    "no weight average": {"ema": 0.0},
    "weight decay on coefficients and norms too": {"decay": "all"},
    "bank step 1/K": {"bank_step": "1/K"},
    "BatchNorm statistics kept": {"freeze_norm": True},
    "gradual: blend from dense to shared": {"gradual": True},
    "SGD, bank step 1/K": {**SGD, "bank_step": "1/K"},
    "SGD, bank step 1": {**SGD, "bank_step": "1.0"},
}


@contextmanager
def blended(model: nn.Module, dense: nn.Module, updates: int) -> Iterator[None]:
    """Gradual conversion: each shared layer uses (1 - s) W_dense + s W_shared, s from 0 to 1 over ``updates``.

    Only training passes count; outside of training, and afterwards, the network is the shared one.
    """
    passed = 0
    layers = dict(shared_layers(model))

    def count(module: nn.Module, inputs: Any) -> None:
        nonlocal passed
        passed += module.training

    def mixed(layer: Any, target: Tensor) -> Any:
        own = type(layer).compose

        def compose() -> Tensor:
            share = min(1.0, passed / updates)
            weight = own(layer)
            return weight if share == 1 or not layer.training else (1 - share) * target + share * weight

        return compose

    hook = model.register_forward_pre_hook(count)
    for name, layer in layers.items():
        weight = dense.get_submodule(name).weight.detach()
        layer.__dict__["compose"] = mixed(layer, weight.reshape(layer.form.weight_shape))
        layer.runtime = "composed"
    try:
        yield
    finally:
        hook.remove()
        for layer in layers.values():
            del layer.__dict__["compose"]
            layer.runtime = "auto"


def run(start: nn.Module, dense: nn.Module, train: Any, test: Any, settings: dict[str, Any]) -> float:
    model, settings = copy.deepcopy(start), dict(settings)
    gradual = settings.pop("gradual", False)
    if gradual:
        settings["ema"] = 0.0  # the average deep-copies the network, patched layers and all
        updates = settings["epochs"] * (len(train) // settings["batch_size"])
        with blended(model, dense, updates // 2):
            report = finetune(model, train, test, teacher=dense, quiet=True, **settings)
    else:
        report = finetune(model, train, test, teacher=dense, quiet=True, **settings)
    assert report.top1_after is not None
    return report.top1_after


def earlier(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the record at ``path``, if it was made with these ``settings``."""
    record = json.loads(path.read_text()) if path.exists() else {}
    return record["rows"] if all(record.get(key) == value for key, value in settings.items()) else []


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--random", action="store_true", help="random weights (to try the script)")
    parser.add_argument("--params", type=int, default=94_400)
    parser.add_argument("--limit", type=int, help="training images, evenly spaced")
    parser.add_argument("--test-limit", type=int, help="test images, evenly spaced")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--amp", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--parts", nargs="*", help="only rows whose name holds one of these words")
    parser.add_argument("--pivots", action="store_true", help="plan with pivoted banks: more filters at the same size")
    parser.add_argument("--out", type=Path, default=RESULTS / "finetune_ablation.json")
    options = parser.parse_args(arguments)
    opened = open_source(options.source, pretrained=not options.random)
    dense, cfg = opened.model, opened.pretrained_cfg
    train = open_data(options.data, "train", transform_cfg=cfg)
    test = open_data(options.data, "test", transform_cfg=cfg)
    train = limited(train, options.limit) if options.limit else train
    test = limited(test, options.test_limit) if options.test_limit else test
    start = converted(dense, options.data, cfg, options.params, "basis", 0, options.pivots)
    common = {"epochs": options.epochs, "batch_size": options.batch_size, "amp": options.amp, "device": options.device}
    settings = {
        "source": opened.name, "params_after": sum(p.numel() for p in start.parameters()), "train_images": len(train),
        "test_images": len(test), **common, "seeds": options.seeds, **({"pivots": True} if options.pivots else {}),
        "hardware": hardware(),
    }  # fmt: skip
    rows = earlier(options.out, settings)
    record = {**settings, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name, part in PARTS.items():
        if options.parts and not any(word in name for word in options.parts):
            continue
        top1 = [run(start, dense, train, test, {**common, **part, "seed": seed}) for seed in range(options.seeds)]
        spread = statistics.stdev(top1) if len(top1) > 1 else None
        row = {"part": name, "settings": part, "top1": statistics.mean(top1), "stdev": spread, "runs": top1}
        rows[:] = sorted([r for r in rows if r["part"] != name] + [row], key=lambda r: list(PARTS).index(r["part"]))
        print(f"{name:45} {row['top1']:.2%}  {row['top1'] - rows[0]['top1']:+.2%}", flush=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
