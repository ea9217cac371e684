"""The promised figures, on CIFAR-10 and public weights: no labels, no fine-tuning; all test images where it takes so many."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import reported
from script_loader import load_script

import sharefold
from sharefold.measure import count_parameters

pytestmark = pytest.mark.realdata
NET20, NET56 = "resnet20-12fca82f.th", "resnet56-4bfd9763.th"


@pytest.fixture(scope="session")
def npz(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5,000 training and all test images as DATA ``npz:FILE``."""
    out = tmp_path_factory.mktemp("cifar") / "cifar10.npz"
    return load_script("benchmarks/cifar.py").write_npz(shared_data, out, train_sprites=5)


def top1(source: Path, npz: Path, images: int = 10_000) -> float:
    report = reported("eval", source, "--data", f"npz:{npz}", "--limit", images, "--quiet")
    assert report["images"] == images
    return report["top1"]


def test_original_resnet20(shared_data: Path, npz: Path) -> None:
    assert top1(shared_data / "weights" / NET20, npz) == pytest.approx(0.9173, abs=1e-4)


def test_original_resnet56_on_2000_images(shared_data: Path, npz: Path) -> None:
    report = reported("eval", shared_data / "weights" / NET56, "--data", f"npz:{npz}", "--limit", 2000, "--quiet")
    assert report["top1"] == pytest.approx(0.9339, abs=0.012)  # two standard errors of 2,000 images


@pytest.mark.parametrize(
    ("weights", "budget", "calibrated", "least", "images"),
    [
        # These do so much better that five standard errors of fewer images lie between.
        (NET20, "50%", True, 0.870, 2_500),
        (NET20, "65%", False, 0.880, 2_500),
        # Minutes each: with `pytest -m "realdata and sweep"`.
        pytest.param(NET56, "50%", True, 0.922, 10_000, marks=pytest.mark.sweep),
        pytest.param(NET56, "35%", True, 0.885, 10_000, marks=pytest.mark.sweep),
    ],
)
def test_converted(
    shared_data: Path, npz: Path, tmp_path: Path, weights: str, budget: str, calibrated: bool, least: float, images: int
) -> None:
    out = tmp_path / "net"
    calib = ["--calib", f"npz:{npz}"] if calibrated else []
    report = reported("convert", shared_data / "weights" / weights, *calib, "--budget", budget, "-o", out, "--quiet")
    allowed = float(budget[:-1]) / 100 * report["params"]["before"]
    model = sharefold.load(out)
    assert count_parameters(model) == report["params"]["after"] <= allowed
    assert top1(out, npz, images) >= least
