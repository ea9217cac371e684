"""Whether converted networks pass through ONNX: one architecture of every family of timm and torchvision that coverage.py
converts, those that take videos and the twins that are made for quantisation among them.

    OMP_NUM_THREADS=1 python benchmarks/onnx_families.py
    OMP_NUM_THREADS=1 python benchmarks/onnx_families.py --match 'resnet|vgg' --again failed
    OMP_NUM_THREADS=1 python benchmarks/onnx_families.py --library smp -o benchmarks/results/onnx_smp.csv

Takes the smallest architecture of each family in results/coverage.csv, random weights, and shares it to half its
parameters: for real up to ``--limit-params``, above it and of networks for videos by uniform ranks with random banks and
coefficients, since the graph to be written is the same. Three things must hold: onnxruntime computes what PyTorch computes,
to 1e-4 of the largest output, for batches of two and of three; the graph takes any batch size; the file is no larger than the
safetensors file plus 10 %. Writes results/onnx.csv after every architecture, each in a process of its own.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from architectures import FAILED, guarded, missing, read, record
from coverage_check import brief, convert_blank, convert_for_real, images_for, outputs, quick, vary
from safetensors.torch import save_file
from torch import Tensor, nn

from sharefold.architectures.arguments import parse_options
from sharefold.architectures.build import build_base, make_base
from sharefold.export import export
from sharefold.graph import analyze
from sharefold.layers import shared_layers
from sharefold.options import ExportOptions

RESULTS = Path(__file__).parent / "results" / "onnx.csv"
COVERAGE = RESULTS.with_name("coverage.csv")
LIBRARIES = ("timm", "torchvision")  # those of the table
LARGEST = 150_000_000  # parameters; a family without a smaller member is left out, with that as its reason
LARGER_FILE = 1.1
SIZES = (128, 160, 192)  # last maps of several positions: BatchNorm's statistics of six numbers would mean nothing
# Frames and sides of videos, and how many of them; the size that a network wants comes last.
VIDEO_SIZES, VIDEOS = ((8, 96, 96), (16, 112, 112), (16, 192, 192), (16, 224, 224)), 2


@dataclass
class Export:
    """One line of the table; None where the job did not get that far.

    Attributes:
        parameters: of the dense network.
        mode: ``real`` (solved from images) or ``random`` (uniform ranks, random banks).
        difference: largest absolute difference of any output between onnxruntime and PyTorch.
        largest: largest absolute output.
        size_ratio: size of the ONNX file over that of the safetensors file.
        reason: why not; failures begin with ``failed``.
    """

    model: str
    library: str
    family: str
    parameters: int
    mode: str = ""
    difference: float | None = None
    largest: float | None = None
    size_ratio: float | None = None
    seconds: float | None = None
    reason: str = ""


def representatives(match: str | None = None, libraries: Collection[str] = LIBRARIES) -> list[Export]:
    """The smallest converted architecture of every family, smallest first."""
    smallest: dict[tuple[str, str], Export] = {}
    for line in read(COVERAGE).values():
        row = Export(line["model"], line["library"], line["family"], int(line["parameters"] or 0))
        key = (row.library, row.family)
        stub = row.model.startswith("test_")  # timm's own test networks: for a tenth of 0.5 MB a graph is too long
        wanted = line["reduced_to"] and row.library in libraries and not stub
        if wanted and (key not in smallest or row.parameters < smallest[key].parameters):
            smallest[key] = row
    rows = sorted(smallest.values(), key=lambda row: row.parameters)
    return [row for row in rows if match is None or re.search(match, row.model)]


def check_export(row: Export, limit: int) -> Export:
    """Fills the ``row``; whatever goes wrong becomes its reason."""
    start = time.perf_counter()
    try:
        if row.parameters > LARGEST:
            row.reason = f"too large: the smallest of its family has {row.parameters:,} parameters"
            return row
        if row.family.startswith("detection."):
            row.reason = "detection: torch.export cannot trace torchvision's detectors, whose shapes depend on values"
            return row
        torch.manual_seed(0)
        name, _, arguments = row.model.partition(":")
        model = build_base(make_base(row.library, name, parse_options(arguments, row.model))).eval()
        with tempfile.TemporaryDirectory() as folder, quick():
            _export(row, model, Path(folder), limit)
    except Exception as error:
        row.reason = f"failed: {brief(error)}"
    finally:
        row.seconds = round(time.perf_counter() - start, 1)
    return row


def _export(row: Export, model: nn.Module, folder: Path, limit: int) -> None:
    vary(model)
    videos = row.family.startswith("video.")
    images = videos_for(model) if videos else images_for(model, SIZES)
    settle(model, images)
    graph = analyze(model, images[:1])
    row.mode = "real" if row.parameters <= limit and not videos else "random"
    if row.mode == "real":
        convert_for_real(model, images, folder, graph=graph)
    else:
        convert_blank(model, images[:1], graph)
        fill(model)
        settle(model, images)
    row.largest = round(max(float(t.abs().max()) for t in outputs(model, images[:2])), 4)
    assert row.largest < float("inf"), "the outputs are not finite"
    tolerance = ExportOptions.tolerance * max(1.0, row.largest)
    done = export(model, folder / "net.onnx", example_input=images[:2], tolerance=tolerance)
    row.difference = float(f"{done.max_difference:.3g}")
    plain = folder / "plain.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, plain)
    row.size_ratio = round(done.bytes / plain.stat().st_size, 4)
    assert done.dynamic_batch
    assert row.size_ratio <= LARGER_FILE, f"the file is {row.size_ratio:.2f} times as large as the safetensors file"


@torch.no_grad()
def videos_for(model: nn.Module) -> Tensor:
    """Noise (n, 3, T, H, W) of the first of ``VIDEO_SIZES`` that ``model`` takes.

    Raises:
        AssertionError: it takes none.
    """
    for size in VIDEO_SIZES:
        videos = torch.randn(VIDEOS, 3, *size, generator=torch.Generator().manual_seed(0))
        try:
            model(videos[:1])
        except Exception:  # fixed input sizes, maps that become empty
            continue
        return videos
    raise AssertionError(f"does not run at any of {VIDEO_SIZES}")


@torch.no_grad()
def settle(model: nn.Module, images: Tensor) -> None:
    """Moves BatchNorm's statistics most of the way to those of ``images``: outputs of the usual size, as trained ones
    have. Not all the way, for the variance of a few small maps may be nothing. BatchNorms train alone where training as a whole
    takes no images of this size, as that of classifiers beside the way does not."""
    try:
        model.train()(images)
    except RuntimeError:
        model.eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
        model(images)
    for _ in range(7):
        model(images)
    model.eval()


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random filters of unit gain in the blank layers that :func:`convert_blank` put in."""
    layers = shared_layers(model).values()
    for layer in layers:
        for parameter in (*layer.parameters(), *(layer.bank.parameters() if layer.bank is not None else ())):
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.nan_to_num_(0, 0, 0).clamp_(-1, 1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", metavar="REGEX", help="only architectures whose name it is found in")
    parser.add_argument("--limit-params", type=int, default=3_000_000, help="above it: random banks and coefficients")
    parser.add_argument("--seconds", type=float, default=400, help="most time for an architecture")
    parser.add_argument("--shard", metavar="K/N", help="only every N-th architecture, from K = 0 to N-1")
    parser.add_argument("--again", nargs="?", const="all", choices=("all", "failed"), help="redo rows that are there")
    parser.add_argument("--library", action="append", metavar="NAME", help="other libraries than timm and torchvision, with -o")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.library and options.output == RESULTS:
        parser.error("--library: results/onnx.csv holds timm and torchvision: name another file with -o")
    torch.set_num_threads(1)
    part, parts = (int(number) for number in (options.shard or "0/1").split("/"))
    rows = representatives(options.match, options.library or LIBRARIES)[part::parts]
    for row in missing(rows, options.output, options.again):
        row = guarded(partial(check_export, limit=options.limit_params), row, options.seconds)
        record(options.output, row)
        ratio = "" if row.size_ratio is None else f"difference {row.difference:.1e}, file x {row.size_ratio:.3f}"
        print(f"{row.library}:{row.model} {row.seconds} s {row.mode} {ratio} {row.reason}", flush=True)
    found = [line for key, line in read(options.output).items() if key in {(row.library, row.model) for row in rows}]
    failed = [line["model"] for line in found if line["reason"].startswith(FAILED)]
    passed = sum(not line["reason"] for line in found)
    print(f"{passed} of {len(found)} families pass; failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
