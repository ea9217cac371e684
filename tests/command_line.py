"""The command ``sharefold`` in this process, and what it is given to read."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result

from sharefold_cli.main import cli


def runner() -> CliRunner:
    """One that keeps stdout and stderr apart, as click's own does from 8.2 on."""
    apart = "mix_stderr" in inspect.signature(CliRunner).parameters
    return CliRunner(mix_stderr=False) if apart else CliRunner()  # type: ignore[call-arg]


def call(*arguments: object) -> Result:
    """Runs ``sharefold ARGUMENTS``."""
    return runner().invoke(cli, [str(argument) for argument in arguments])


def reported(*arguments: object) -> dict[str, Any]:
    """The JSON of ``sharefold ARGUMENTS --json``, which must succeed."""
    result = call(*arguments, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


def refused(result: Result, words: str) -> None:
    """Exit 2, a last line on stderr that holds ``words``, nothing on stdout, no traceback."""
    assert result.exit_code == 2, result.output
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and words in last, result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr


def npz_file(path: Path, side: int, channels: int, train: int, test: int, *, train_labels: bool = True) -> Path:
    """Noise in uint8, (n, side, side, channels), with labels of ten classes; ``test`` of the images are the test images."""
    rng = np.random.default_rng(0)
    count = max(train, test)
    images, labels = rng.integers(0, 256, (count, side, side, channels), dtype=np.uint8), rng.integers(0, 10, count)
    arrays = {"train_x": images[:train], "test_x": images[:test], "test_y": labels[:test]}
    np.savez(path, **arrays, **({"train_y": labels[:train]} if train_labels else {}))
    return path
