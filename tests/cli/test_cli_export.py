"""``sharefold export`` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
import torch
from command_line import call

import sharefold


def test_onnx_from_a_saved_network(shared_digits: Path, tmp_path: Path) -> None:
    target = tmp_path / "net.onnx"
    result = call("export", shared_digits, "-o", target, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["format"] == "onnx" and report["output"] == str(target) and report["bytes"] == target.stat().st_size
    assert report["max_difference"] < 1e-4 and report["input_shape"] == [None, 1, 8, 8]
    assert report["bytes"] <= 1.1 * (shared_digits / "model.safetensors").stat().st_size
    images = torch.randn(3, 1, 8, 8)
    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(logits), sharefold.load(shared_digits)(images), atol=1e-4)
    again = call("export", shared_digits, "-o", target)
    assert again.exit_code == 2 and "--force" in again.stderr


def test_dense_and_a_fixed_archive(shared_digits: Path, tmp_path: Path) -> None:
    dense = json.loads(call("export", shared_digits, "-o", tmp_path / "d.safetensors", "--json").stdout)
    assert dense["format"] == "dense" and dense["bytes"] > dense["tensor_bytes"]
    result = call("export", shared_digits, "-o", tmp_path / "n.pt2", "--batch", 2)
    assert result.exit_code == 0 and "batches of 2" in result.stdout
    program = torch.export.load(tmp_path / "n.pt2")
    assert program.module()(torch.randn(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "net.onnx", "--batch", "many"], "write dynamic"),
        (["-o", "net.onnx", "--batch", "0"], "write dynamic"),
        (["-o", "net.xyz"], "unknown kind '.xyz'"),
        (["-o", "net.pt", "--format", "onnx"], "ends in .onnx"),
        (["-o", "nowhere/net.onnx"], "does not exist"),
        (["-o", "net.onnx", "--tolerance", "0"], "differs from the network"),
    ],
)
def test_refusals(
    shared_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("export", shared_digits, *arguments)
    assert result.exit_code == 2 and words in result.stderr and result.stdout == ""
    assert not list(tmp_path.iterdir())
