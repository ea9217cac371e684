"""Networks and buffers of every number type: they run, are rounded and saved as what they are, or are refused in one line."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call, refused, reported
from torch import Tensor, nn

import sharefold
from sharefold.convert import convert_
from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.export import export
from sharefold.format import FileConfig, carry_config
from sharefold.options import RunOptions
from sharefold.plans import Plan
from sharefold.running import dtype_of, run_on
from sharefold.sources import build_base

BASE = {"library": "timm", "name": "digits_resnet", "kwargs": {}}
KINDS = (torch.float64, torch.bfloat16, torch.float16)


def network(base: dict[str, Any] = BASE) -> nn.Module:
    torch.manual_seed(0)
    return build_base(base).eval()


@pytest.fixture(params=KINDS, ids=lambda kind: str(kind)[6:])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Of few layers, which are soon exported."""
    base = {**BASE, "kwargs": {"blocks": 1, "width": 8}}
    model = network(base).to(request.param)
    carry_config(model, FileConfig(Plan([], 0, 0), base))
    return sharefold.save(model, tmp_path / "net.safetensors")


def test_images_take_the_type_of_the_network() -> None:
    images = torch.randn(2, 1, 8, 8)
    for kind in KINDS:
        model = network().to(kind)
        assert dtype_of(model) == kind
        assert torch.equal(run_on(model, images), model(images.to(kind)))
    assert dtype_of(nn.Identity()) == torch.float32
    tokens, model = torch.tensor([[1, 2]]), nn.Embedding(3, 2).half()
    assert torch.equal(run_on(model, tokens), model.weight[1:][None])


@pytest.mark.filterwarnings("ignore:.*opened in float32")
def test_verbs_take_networks_of_every_type(saved: Path) -> None:
    out = saved.parent
    kind = dtype_of(sharefold.load(saved))
    exact = reported("eval", saved, "--data", "digits", "--limit", "40")
    assert exact["images"] == 40 and 0 <= exact["top1"] <= 1
    for words in (["inspect", saved], ["report", saved, "-o", out / "r.html"], ["bench", saved, "--repeats", "1"],
                  ["export", saved, "--format", "dense", "-o", out / "d.safetensors"]):  # fmt: skip
        done = call(*words)
        assert done.exit_code == 0, done.output
    dense = sharefold.open_source(out / "d.safetensors", arch="digits_resnet:blocks=1,width=8").model
    assert dtype_of(dense) == (kind if kind == torch.float64 else torch.float32)
    found = reported("finetune", saved, "--data", "digits", "--limit", "16", "--val-limit", "8", "--epochs", "1",
                     "--batch-size", "8", "-o", out / "tuned.safetensors")  # fmt: skip
    assert found["top1_after"] is not None and dtype_of(sharefold.load(out / "tuned.safetensors")) == torch.float32
    with pytest.raises(SharefoldError, match=r"finetune: the model computes in \w+: pass it in float32"):
        sharefold.finetune(sharefold.load(saved), "digits", run=RunOptions(quiet=True))


def test_programs_of_every_type(saved: Path) -> None:
    kind = dtype_of(sharefold.load(saved))
    program = export(sharefold.load(saved), saved.parent / "a.pt2")
    assert program.max_difference == 0
    x = torch.randn(3, 1, 8, 8).to(kind)
    found = torch.export.load(program.path).module()(x)
    assert found.dtype == kind and torch.equal(found, sharefold.load(saved)(x))
    if kind == torch.float16:
        done = export(sharefold.load(saved), saved.parent / "a.onnx", tolerance=0.01)
        assert 0 < done.max_difference < 0.01
        return
    done = call("export", saved, "--format", "onnx", "-o", saved.parent / "a.onnx")
    refused(done, f"the network computes in {str(kind)[6:]}")
    assert len(done.stderr.strip().splitlines()) == 1 and not (saved.parent / "a.onnx").exists()


def test_conversion_in_float64() -> None:
    """From float32 images, and the same as from the images in float64."""
    images = torch.randn(48, 1, 8, 8)
    found = []
    for given in (images, images.double()):
        model = network({**BASE, "kwargs": {"blocks": 2, "width": 12}}).double()
        cal = sharefold.calibrate(model, given)
        convert_(model, sharefold.plan(model, "60%", cal, method="svd"), cal)
        found.append(model)
    assert {p.dtype for p in found[0].parameters() if p.is_floating_point()} == {torch.float64}
    assert torch.equal(found[0](images.double()), found[1](images.double()))


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_checkpoints_of_every_type(tmp_path: Path, kind: torch.dtype) -> None:
    state = {n: t.to(kind) if t.is_floating_point() else t for n, t in network().state_dict().items()}
    state = {n: t + t.abs() * 1e-9 if t.dtype == torch.float64 else t for n, t in state.items()}  # not in float32
    torch.save(state, tmp_path / "w.pt")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", SharefoldWarning)
        model = sharefold.open_source(tmp_path / "w.pt").model
    words = [str(w.message) for w in told if issubclass(w.category, SharefoldWarning)]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.to(torch.float64), state[name].to(torch.float64)), name  # no value changes
    if kind == torch.float64:
        assert dtype_of(model) == kind and words == []
    else:
        assert dtype_of(model) == torch.float32 and len(words) == 1 and str(kind)[6:] in words[0]


def test_float64_beside_other_types_is_rounded_with_a_word(tmp_path: Path) -> None:
    state = network().state_dict()
    state["fc.bias"] = state["fc.bias"].double() + 1e-12
    torch.save(state, tmp_path / "w.pt")
    with pytest.warns(SharefoldWarning, match="rounds 1 tensors, first fc.bias"):
        sharefold.open_source(tmp_path / "w.pt")


class Buffered(nn.Module):
    def __init__(self, buffer: Tensor) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 8, 3), nn.Linear(8, 10)
        self.register_buffer("kept", buffer)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))


BUFFERS = {
    "int64": torch.tensor([0, 70_000]), "largest int64": torch.tensor([-(2**63), 2**63 - 1]),
    "17 bits": torch.tensor([0, 1 << 16]), "16 bits": torch.tensor([-5, (1 << 16) - 6]), "bool": torch.tensor([True, False]),
    "uint16": torch.tensor([65_535, 1], dtype=torch.uint16), "uint32": torch.tensor([2**32 - 1, 1], dtype=torch.uint32),
    "uint64": torch.tensor([2**64 - 1, 1], dtype=torch.uint64), "one uint64": torch.tensor([2**63], dtype=torch.uint64),
    "int8": torch.tensor([-128, 127], dtype=torch.int8), "int32": torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32),
    "complex64": torch.tensor([1 + 2j, 3 - 1j]), "complex128": torch.tensor([1 / 3 + 2j, 3 - 1j], dtype=torch.complex128),
    "float64": torch.tensor([1 / 3, 1e300], dtype=torch.float64), "float16": torch.tensor([1.5, 6e-8], dtype=torch.float16),
    "float8": torch.tensor([1.5, 2.0]).to(torch.float8_e4m3fn), "empty": torch.zeros(0, 3), "zeros": torch.tensor([0.0, -0.0]),
}  # fmt: skip


@pytest.mark.parametrize("store", ["", "fp16"])
@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_of_every_type(tmp_path: Path, name: str, store: str) -> None:
    buffer = BUFFERS[name]
    torch.manual_seed(0)
    model = Buffered(buffer.clone()).eval()
    path, start = tmp_path / "net.safetensors", copy.deepcopy(model.state_dict())
    carry_config(model, FileConfig(Plan([], 0, 0)))
    unknown = (name, store) in (("complex128", ""), ("float8", "fp16"))
    try:
        if store:
            sharefold.store.quantize_(model, store)
        sharefold.save(model, path)
    except SharefoldError as error:
        assert unknown and "kept" in str(error) and "\n" not in str(error)
        assert not path.exists() and torch.equal(model.conv.weight, start["conv.weight"])
        return
    assert not unknown
    found = sharefold.load(path, model=Buffered(torch.zeros_like(buffer))).kept
    assert found.dtype == buffer.dtype and found.shape == buffer.shape
    assert bytes(found.reshape(-1).view(torch.uint8).tolist()) == bytes(buffer.reshape(-1).view(torch.uint8).tolist())
