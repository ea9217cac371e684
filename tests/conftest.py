"""Fixtures shared by every test, and two options for continuous integration."""

from __future__ import annotations

import os
import zlib
from collections.abc import Generator
from pathlib import Path

import pytest
import torch


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
def shared_data() -> Path:
    """Folder with real CIFAR-10 images and public weights; tests that use it carry the ``realdata`` mark."""
    folder = os.environ.get("SHAREFOLD_DATA")
    if not folder:
        pytest.skip("SHAREFOLD_DATA is not set")
    return Path(folder).resolve()
