"""Fixtures shared by every test, and two options for continuous integration."""

from __future__ import annotations

import gc
import os
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

# Threads that wait sleep, as under the command line: spinning they take the cores from other tests. Read once, by torch's import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from command_line import npz_file, reported
from hypothesis import HealthCheck, settings

# The same examples every time, however slow the machine is: a failure is the change's, not the draw's.
settings.register_profile("sharefold", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sharefold")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="A skipped test counts as failed.")
    parser.addoption("--shard", metavar="K/N", help="Only every N-th test, by a hash of its name; K is 0 to N-1.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = config.getoption("--shard")
    if not chosen:
        return
    part, parts = (int(number) for number in chosen.split("/"))
    keep = [item for item in items if zlib.crc32(item.nodeid.encode()) % parts == part]
    config.hook.pytest_deselected(items=[item for item in items if item not in keep])
    items[:] = keep


def pytest_collection_finish() -> None:
    # A tenth of the time went to the garbage collector: it need not go through what is imported by now, nor so often.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.config.getoption("--no-skips"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which --no-skips forbids: {call.excinfo.value if call.excinfo else ''}"
    return report


# Parallel test processes of one thread each: with all threads in each of them they would only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def npz(tmp_path_factory: pytest.TempPathFactory) -> str:
    """DATA of 48 training images without labels and 40 test images with them, 3x32x32."""
    return f"npz:{npz_file(tmp_path_factory.mktemp('data') / 'set.npz', 32, 3, 48, 40, train_labels=False)}"


@pytest.fixture(scope="session")
def labelled_npz(tmp_path_factory: pytest.TempPathFactory) -> str:
    """DATA of 48 training images and the first 20 of them as test images, 3x32x32, all with labels."""
    return f"npz:{npz_file(tmp_path_factory.mktemp('data') / 'set.npz', 32, 3, 48, 20)}"


@pytest.fixture(scope="session")
def grey_npz(tmp_path_factory: pytest.TempPathFactory) -> str:
    """DATA of 200 images that train and 30 that test, 1x8x8, with labels."""
    return f"npz:{npz_file(tmp_path_factory.mktemp('data') / 'set.npz', 8, 1, 200, 30)}"


@pytest.fixture(scope="session")
def shared_cifar(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """ResNet-20 of random weights at 60 % with shared bases: the saved folder, and the JSON that ``convert`` printed."""
    out = tmp_path_factory.mktemp("cifar") / "net"
    options = ("--no-pretrained", "--calib-count", 20, "--no-repair", "--budget", "60%", "--method", "basis")
    return out, reported("convert", "timm:resnet20_cifar", *options, "-o", out)


@pytest.fixture(scope="session")
def shared_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow digits network of random weights at half its size with shared bases, saved."""
    out = tmp_path_factory.mktemp("digits") / "net"
    options = ("--no-pretrained", "--calib-count", 40, "--no-repair", "--budget", "50%", "--method", "basis")
    reported("convert", "timm:digits_resnet:blocks=2,width=24", *options, "-o", out)
    return out


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real CIFAR-10 images and public weights; tests that use it carry the ``realdata`` mark."""
    folder = os.environ.get("SHAREFOLD_DATA")
    if not folder:
        pytest.skip("SHAREFOLD_DATA is not set")
    return Path(folder).resolve()
