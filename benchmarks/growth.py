"""How time and memory of a conversion grow with the network: CIFAR ResNets of 20 to 218 layers, and large ones for 224 x 224.

    SHAREFOLD_DATA=../shared/data python benchmarks/growth.py
    python benchmarks/growth.py --networks resnet152 wide_resnet50_2

Random weights by a fixed seed, BatchNorm statistics of the images (without them signals would grow from block to block): shapes,
time and memory, no accuracy. The CIFAR ResNets are converted to half their parameters on 500 images of CIFAR-10, the large ones
(torchvision's) on 64 random images; repairs included, by one thread, each network in a process of its own. CPU seconds are
given a layer, beside the peak memory of the process and that of a plain pass. Writes ``benchmarks/results/growth.json``; rows of
other networks stay.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "growth.json"
DEPTHS = {"resnet20": 3, "resnet56": 9, "resnet110": 18, "resnet218": 36}  # blocks a stage
LARGE = ("resnet152", "wide_resnet50_2")
IMAGES, LARGE_IMAGES = 500, 64


def opened(name: str) -> tuple[Any, Any]:
    """The network and its normalised calibration images."""
    import torch

    torch.manual_seed(0)
    if name in LARGE:
        import torchvision

        images = torch.randn(LARGE_IMAGES, 3, 224, 224)
        return settled(getattr(torchvision.models, name)(weights=None), images), images
    from cifar import data_folder, read_split

    from sharefold.data import Preprocess
    from sharefold.models.cifar_resnet import CifarResNet

    pixels, _ = read_split(data_folder(), "train", 1)
    images = Preprocess.from_cfg({"input_size": (3, 32, 32)}).normalize(torch.from_numpy(pixels[:IMAGES]).permute(0, 3, 1, 2))
    return settled(CifarResNet(DEPTHS[name]), images), images


def settled(model: Any, images: Any) -> Any:
    """The network in eval mode, its BatchNorms with the statistics of ``images``."""
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            norm.momentum = None  # the mean over all batches
    with torch.no_grad():
        for batch in images.split(32):
            model.train()(batch)
    return model.eval()


def one(name: str) -> dict[str, Any]:
    """A row, measured in this process."""
    import torch
    from cifar import hardware
    from speed import converted, cpu_of, look

    from sharefold.graph.layers import find_layers
    from sharefold.measure import count_parameters, peak_memory
    from sharefold_cli.heap import keep_freed_memory

    keep_freed_memory()  # as the command line does
    torch.set_num_threads(1)
    model, images = opened(name)

    look(model, images)
    plain, _ = cpu_of(lambda: look(model, images))
    before, layers = peak_memory(), len(find_layers(model)[0])
    times, network, _ = converted(model, images, "50%")
    return {
        "network": name, "layers": layers, "parameters": count_parameters(model), "images": len(images),
        "pass_cpu_seconds": round(plain, 2), "cpu_seconds": {key: round(value, 1) for key, value in times.items()},
        "seconds_a_layer": round(times["whole"] / layers, 2), "kept": count_parameters(network) / count_parameters(model),
        "peak_memory_bytes": {"pass": before, "whole": peak_memory()},
        "date": time.strftime("%Y-%m-%d"), "hardware": hardware(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=(*DEPTHS, *LARGE), default=list(DEPTHS))
    parser.add_argument("--one", action="store_true", help="measure in this process and print the row")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.networks[0])))
        return
    from speed import apart

    for name in options.networks:
        row = apart(__file__, "--one", "--networks", name)
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
        known["rows"] = [other for other in known["rows"] if other["network"] != name] + [row]
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
        print({key: row[key] for key in ("network", "layers", "cpu_seconds", "seconds_a_layer", "peak_memory_bytes")}, flush=True)


if __name__ == "__main__":
    main()
