"""Code blocks of the documentation, and a way to run them as a reader would, but without downloads."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
from command_line import call
from PIL import Image

ROOT = Path(__file__).parent.parent
# Four of the layers that can share are enough to see what a method does.
FEW = "--exclude ^(layer2|layer1.[23])"
# What needs a download or files of the reader's -> a stand-in that a test can make.
STAND_INS = (
    ("timm:resnet50 ", "timm:resnet20_cifar --no-pretrained --calib-count 20 --method svd "),
    (
        "tv:resnet18 --budget 5M",
        "tv:mobilenet_v3_small --no-pretrained --method svd --calib-count 4 --input-size 3,64,64 --budget 2M",
    ),
    ("tv:resnet18", "tv:resnet18 --no-pretrained --method svd --calib-count 4 --input-size 3,32,32"),
    ("tv:resnet50 --recipe sharesnet -o resnet50-shares", "tv:resnet50 --recipe sharesnet --dry-run"),  # minutes
    ("imagefolder:/data/imagenet", "imagefolder:pictures"),
    ("--keep-agreement 97%", "--keep-agreement 1% --method svd --no-repair --calib-count 200"),
    # Seconds instead of a fraction of a minute, each.
    ('--keep "agreement 97%" --method basis', '--keep "agreement 50%" --method svd --no-repair --calib-count 200'),
    ("cluster-kernel --budget 60%", f"cluster-kernel --budget 95% {FEW}"),
    ("cluster-filter --budget 60%", f"cluster-filter --budget 95% {FEW}"),
    ("hybrid --budget 30%", f"hybrid --budget 95% {FEW}"),
    ("spatial --budget 30%", f"spatial --budget 95% {FEW}"),
    ("method tied --budget 25%", f"method tied --budget 95% {FEW}"),
    ("digits --budget 20% --dry-run", f"digits --budget 95% {FEW} --dry-run"),
    ("method basis --budget 20%", f"method basis --budget 95% {FEW}"),
    ("method basis --budget 15%", f"method basis --budget 95% {FEW}"),
    ("tied-kernels --budget 25%", f"tied-kernels --budget 95% {FEW}"),
    ("tucker --budget 15%", f"tucker --budget 95% {FEW}"),
    ("--budgets 20%,40% --method basis", "--budgets 20%,40% --method basis --no-repair"),
    ("--budget 40k", "--budget 40k --method svd"),
    ("--budget 9%", "--budget 9% --method basis"),
    ("--budget 50% -o digits-no-data", "--budget 50% --method svd --calib-count 60 -o digits-no-data"),
    ("timm:resnet56_cifar", "timm:resnet20_cifar"),
    ("--budget 60kB", "--budget 150kB --method svd"),
    ("--epochs 4", "--epochs 1"),
)
# Where a line leaves them open, of the methods that compete the two quick ones do; what all four make of the network is seen in
# tests/test_demo.py.
IN_SHORT = {
    "sharefold.planner.candidates.AUTO": ("basis", "svd"),
    "sharefold.planner.decide.AUTO": ("basis", "svd"),
}

# Any other pretrained network gets random weights and a small input, so that no test depends on the network.
DOWNLOADED = re.compile(r"\b(?:timm|tv):(?!digits_resnet)\w+")


def blocks(path: Path, language: str) -> list[str]:
    """Fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), flags=re.M | re.S)


def commands(path: Path) -> list[str]:
    """Command lines of the bash blocks, continuations joined, comments dropped."""
    text = "\n".join(blocks(path, "bash")).replace("\\\n", " ")
    lines = (line.split("  #")[0].strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def run_command(line: str) -> None:
    """Runs a ``sharefold ...`` line in this process and the current folder; fails unless it exits 0."""
    for wanted, stand_in in STAND_INS:
        line = line.replace(wanted, stand_in)
    if DOWNLOADED.search(line) and "--no-pretrained" not in line:
        line = DOWNLOADED.sub(r"\g<0> --no-pretrained --calib-count 10 --input-size 3,32,32", line)
    line, _, target = line.partition(" > ")
    words = shlex.split(line)
    assert words[0] == "sharefold", line
    result = call(*words[1:])
    assert result.exit_code == 0, f"{line}\n{result.output}"
    if target:
        Path(target.strip()).write_text(result.stdout)


@contextmanager
def in_short(count: int = 200) -> Iterator[None]:
    """``count``: of images where nothing says how many; from 200 on some of them are reported on."""
    with ExitStack() as stack:
        stack.enter_context(patch("sharefold.calibration.images.COUNT", count))
        for place, value in IN_SHORT.items():
            stack.enter_context(patch(place, value))
        yield


def run_document(path: Path) -> None:
    """Runs all sharefold lines and all Python blocks of a document, each kind in order of appearance."""
    text = path.read_text()
    names: dict[str, object] = {}
    with in_short(count=60):
        for match in re.finditer(r"^```(bash|python)\n(.*?)^```", text, flags=re.M | re.S):
            if match[1] == "python":
                exec(compile(match[2], f"{path.name}:{text[: match.start()].count(chr(10)) + 2}", "exec"), names)
                continue
            for line in match[2].replace("\\\n", " ").splitlines():
                if line.startswith("sharefold "):
                    run_command(line)


def make_files(folder: Path) -> None:
    """The reader's files that documents speak of: a folder of pictures, a checkpoint, an npz."""
    import timm
    import torch

    import sharefold.models  # noqa: F401

    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "pictures" / "train" / name).mkdir(parents=True)
        for index in range(10):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / "train" / name / f"{index}.png")
    torch.save(timm.create_model("resnet20_cifar").state_dict(), folder / "my-resnet20.pt")
    np.savez(folder / "cifar10.npz", train_x=rng.integers(0, 256, (200, 32, 32, 3), dtype=np.uint8))
