"""Freed memory stays with the process where that is wanted."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
from click.testing import CliRunner

from sharefold_cli import heap, main

FAULTS = """
import resource
import torch
from sharefold_cli.heap import keep_freed_memory
def faults():
    for _ in range(8):
        torch.ones(8 << 20)  # 32 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(8 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
system = faults()
assert keep_freed_memory()
print(faults(), system)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc")
def test_blocks_are_reused_instead_of_taken_anew() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    kept, system = map(int, done.stdout.split())
    assert kept < 0.5 * system


@pytest.mark.parametrize(
    ("arguments", "variable", "calls"),
    [((), "", 1), (("--heap", "system"), "", 0), ((), "system", 0), (("--heap", "keep"), "system", 1)],
)
def test_an_option_and_a_variable_turn_it_off(
    arguments: tuple[str, ...], variable: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[None] = []
    monkeypatch.setattr(main, "keep_freed_memory", lambda: seen.append(None))
    done = CliRunner(env={heap.VARIABLE: variable or None}).invoke(main.cli, [*arguments])
    assert done.exit_code == 0 and "convert" in done.output
    assert len(seen) == calls


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.sys, "platform", "darwin")
    assert heap.keep_freed_memory() is False
