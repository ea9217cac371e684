"""Exported files compute what the network computes, hold shared tensors once, and need no sharefold."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import timm
import torch
from networks import answers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sharefold
import sharefold.models
from sharefold.errors import SharefoldError
from sharefold.export import _apart, export
from sharefold.layers import shared_layers
from sharefold.options import ExportOptions

IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def stock() -> nn.Module:
    return timm.create_model("digits_resnet", blocks=2, width=24).eval()


def converted(method: str, budget: str = "60%") -> nn.Module:
    model = stock()
    images = torch.randn(40, 1, 8, 8)
    plan = sharefold.plan(model, budget=budget, method=method, calibration=images)
    sharefold.convert_(model, plan, calibration=images, repair=False)
    return model


def run_onnx(path: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def stored_once(path: Path, model: nn.Module) -> None:
    """The file holds no more floats than the network, and is no larger than the safetensors file plus 10 % and 1 KiB."""
    plain = path.with_suffix(".safetensors")
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, plain)
    assert path.stat().st_size <= 1.1 * plain.stat().st_size + 1024
    floats = sum(
        len(tensor.raw_data) for tensor in onnx.load(path).graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    )  # fmt: skip
    assert floats <= 4 * sum(t.numel() for t in model.state_dict().values() if t.is_floating_point()) + 1024


@pytest.fixture(scope="module")
def shared() -> nn.Module:
    torch.manual_seed(0)
    return converted("basis", "40%")


@pytest.fixture(scope="module")
def onnx_file(shared: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    done = export(shared, path)
    assert done.format == "onnx" and done.path == path and done.bytes == path.stat().st_size
    assert done.inputs == ("images",) and done.outputs == ("logits",) and done.dynamic_batch
    assert done.max_difference < ExportOptions.tolerance
    return path


def test_onnx_computes_the_same_at_any_batch_size(shared: nn.Module, onnx_file: Path) -> None:
    for count in (1, 2, 5):
        assert torch.allclose(run_onnx(onnx_file, IMAGES[:count]), answers(shared, IMAGES[:count]), atol=1e-4)
    batch = onnx.load(onnx_file).graph.input[0].type.tensor_type.shape.dim[0]
    assert batch.dim_param == "batch"


def test_onnx_holds_the_bank_once_and_composes_in_the_graph(shared: nn.Module, onnx_file: Path) -> None:
    stored_once(onnx_file, shared)
    graph = onnx.load(onnx_file)
    onnx.checker.check_model(graph, full_check=True)
    bank = next(name for name, _ in shared.named_parameters() if name.startswith("sharefold_banks"))
    users = [node for node in graph.graph.node if bank in node.input]
    members = [layer for layer in shared_layers(shared).values() if layer.bank is not None]
    assert bank in {tensor.name for tensor in graph.graph.initializer} and len(members) > 1
    assert 1 <= len(users) <= len(members)
    text = onnx_file.read_bytes()
    assert str(Path(sharefold.__file__).parent).encode() not in text, "source paths of this machine are in the file"


@pytest.mark.parametrize("method", ["average", "cluster", "hybrid", "spatial"])
def test_onnx_of_other_methods(method: str, tmp_path: Path) -> None:
    model = converted(method, "75%")
    export(model, tmp_path / "net.onnx")
    assert torch.allclose(run_onnx(tmp_path / "net.onnx", IMAGES), answers(model, IMAGES), atol=1e-4)
    stored_once(tmp_path / "net.onnx", model)


def test_a_fixed_batch(shared: nn.Module, tmp_path: Path) -> None:
    done = export(shared, tmp_path / "one.onnx", example_input=IMAGES[:1], dynamic_batch=False)
    assert not done.dynamic_batch
    assert run_onnx(done.path, IMAGES[:1]).shape == (1, 10)
    with pytest.raises(Exception, match=r"(?i)dimension|shape"):
        run_onnx(done.path, IMAGES)


ALONE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("sharefold", "sharefold_cli", "timm"):
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
import torch
program = torch.export.load(sys.argv[1])
model = program.module()
images = torch.load(sys.argv[2], weights_only=True)
torch.save({"logits": model(images).detach(), "one": model(images[:1]).detach()}, sys.argv[3])
assert not any(name.partition(".")[0] in ("sharefold", "timm") for name in sys.modules)
"""


def test_an_archive_runs_where_sharefold_is_not_installed(shared: nn.Module, tmp_path: Path) -> None:
    done = export(shared, tmp_path / "net.pt2")
    assert done.format == "pt2" and done.dynamic_batch and done.max_difference < ExportOptions.tolerance
    torch.save(IMAGES, tmp_path / "images.pt")
    files = [str(tmp_path / name) for name in ("net.pt2", "images.pt", "out.pt")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", ALONE, *files], check=True, cwd=tmp_path, env=environment, timeout=120)
    result = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.allclose(result["logits"], answers(shared, IMAGES), atol=1e-5)
    assert torch.allclose(result["one"], answers(shared, IMAGES[:1]), atol=1e-5)
    stored = torch.export.load(tmp_path / "net.pt2").state_dict
    assert sum(t.numel() for t in stored.values()) <= sum(t.numel() for t in shared.state_dict().values())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_dense_is_a_stock_state_dict(shared: nn.Module, tmp_path: Path, suffix: str) -> None:
    done = export(shared, tmp_path / f"net{suffix}")
    assert done.format == "dense" and done.max_difference < ExportOptions.tolerance
    state = load_file(done.path) if suffix == ".safetensors" else torch.load(done.path, weights_only=True)
    dense = stock()
    dense.load_state_dict(state)
    assert torch.allclose(answers(dense, IMAGES), answers(shared, IMAGES), atol=1e-4)


def test_modes_caches_and_results_stay(shared: nn.Module, tmp_path: Path) -> None:
    before = answers(shared, IMAGES)
    shared.train()
    shared.layer1.eval()
    modes = {name: module.training for name, module in shared.named_modules()}
    export(shared, tmp_path / "net.pt2")
    assert {name: module.training for name, module in shared.named_modules()} == modes
    assert torch.equal(answers(shared, IMAGES), before)


def test_a_difference_is_refused_and_leaves_nothing(shared: nn.Module, tmp_path: Path) -> None:
    for name in ("net.onnx", "net.pt2", "net.safetensors"):
        with pytest.raises(SharefoldError, match=r"differs from the network by .* more than -1"):
            export(shared, tmp_path / name, tolerance=-1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("ours", "theirs", "apart"),
    [
        ([1e8, -2e8], [1e8 + 20, -2e8], 1e-7), ([1e-8, 0.0], [2e-8, 0.0], 1.0), ([0.0, 0.0], [0.0, 1e-3], 1e-3),
        ([-math.inf, 2.0], [-math.inf, 2.0], 0.0), ([math.nan, 2.0], [math.nan, 1.0], 0.5),
        ([-math.inf, 2.0], [-1e9, 2.0], math.inf), ([1.0, 2.0], [math.nan, 2.0], math.inf),
    ],
)  # fmt: skip
def test_differences_are_shares_of_the_largest_output(ours: list[float], theirs: list[float], apart: float) -> None:
    found = _apart(torch.tensor(ours, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64))
    assert found == pytest.approx(apart, rel=1e-6)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if float(x.sum()) > 0 else x - 1


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.conv(x)
        return {"map": y, "mean": y.mean((2, 3))}


class WindowAttention(nn.Module):
    """Attention over five axes, (batch, windows, heads, positions, channels), as in Twins."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Conv2d(3, 24, 1), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        windows = self.qkv(x).unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)  # (B, 24, 2, 2, 16)
        q, k, v = windows.flatten(2, 3).movedim(1, -1).unflatten(-1, (3, 2, 4)).permute(3, 0, 1, 4, 2, 5)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(y.movedim(2, -1).flatten(-2).movedim(-1, 1)).mean((2, 3))


def test_attention_over_windows_goes_through_onnx(tmp_path: Path) -> None:
    model, images = WindowAttention().eval(), torch.randn(3, 3, 8, 8)
    done = export(model, tmp_path / "windows.onnx", example_input=images[:2])
    assert done.max_difference < ExportOptions.tolerance and done.dynamic_batch
    assert torch.allclose(run_onnx(done.path, images), answers(model, images), atol=1e-5)


def test_several_outputs(tmp_path: Path) -> None:
    done = export(TwoOutputs(), tmp_path / "two.onnx", example_input=torch.randn(2, 3, 9, 9))
    assert done.outputs == ("output_0", "output_1")


@pytest.mark.parametrize(
    ("name", "format", "words"),
    [
        ("net.bin", None, "unknown kind '.bin'"),
        ("net.onnx", "pt2", "format pt2 ends in .pt2"),
        ("net.onnx", "tflite", "'tflite' is not known"),
        ("missing/net.onnx", None, "does not exist"),
    ],
)
def test_bad_requests(shared: nn.Module, tmp_path: Path, name: str, format: str | None, words: str) -> None:
    with pytest.raises(SharefoldError, match=words):
        export(shared, tmp_path / name, format)


@dataclass
class Said:
    logits: Tensor


Pair = namedtuple("Pair", "logits more")


class Returning(nn.Module):
    """Returns what ``wrap`` makes of its logits."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.wrap = nn.Conv2d(3, 4, 3), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("wrap", "suffix", "words"),
    [(Said, "onnx", "an object of the class Said, which torch.export does not know: return tensors, in a tuple, list or dict"),
     (lambda y: [Said(y)], "pt2", "an object of the class Said, which torch.export does not know"),
     (lambda y: (y, 3), "onnx", "the constant 3, and ONNX holds tensors alone: leave it out .* or use --format pt2"),
     (lambda y: {"logits": y, "kind": "cat"}, "onnx", "the constant 'cat', and ONNX holds tensors alone: .* forward returns$"),
     (lambda y: (y, "cat"), "pt2", "cannot be written as a torch.export archive .* return tensors in a tuple, list or dict"),
     (lambda y: Pair(y, y), "pt2", "cannot be written as a torch.export archive .* namedtuple .* return tensors in a tuple"),
     (lambda y: None, "onnx", "returns no tensor: there is nothing to export")],
)  # fmt: skip
def test_outputs_that_a_file_cannot_hold(wrap: Callable[[Tensor], Any], suffix: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(SharefoldError, match=words):
        export(Returning(wrap).eval(), tmp_path / f"net.{suffix}", example_input=torch.randn(2, 3, 5, 5))
    assert list(tmp_path.iterdir()) == []


def test_numbers_go_into_archives_and_nothing_into_graphs(tmp_path: Path) -> None:
    example = torch.randn(2, 3, 5, 5)
    assert export(Returning(lambda y: (y, 3)).eval(), tmp_path / "net.pt2", example_input=example).max_difference == 0
    assert export(Returning(lambda y: (y, None)).eval(), tmp_path / "net.onnx", example_input=example).outputs == ("logits",)


def test_networks_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = torch.randn(2, 3, 9, 9)
    with pytest.raises(SharefoldError, match="cannot be traced"):
        export(Branches(), tmp_path / "net.pt2", example_input=example)
    with pytest.raises(SharefoldError, match="dense already"):
        export(TwoOutputs(), tmp_path / "net.pt", example_input=example)
    export(TwoOutputs(), tmp_path / "net.pt2", example_input=example)
    with pytest.raises(SharefoldError, match="--force"):
        export(TwoOutputs(), tmp_path / "net.pt2", example_input=example)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SharefoldError, match=r"package onnxruntime: pip install 'sharefold\[onnx\]'"):
        export(TwoOutputs(), tmp_path / "net.onnx", example_input=example)
