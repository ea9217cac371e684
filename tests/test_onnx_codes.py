"""ONNX files of rounded networks hold codes, compute the same bits' worth, and are as small as the codes are."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from command_line import call, refused, reported
from networks import answers
from torch import Tensor, nn

import sharefold
import sharefold.models
from sharefold.errors import SharefoldError
from sharefold.export import export

IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
# A tensor's bytes a number.
STORES = {"int8": 1.0, "int4": 0.5, "int3": 0.5, "kmeans4": 0.5, "kmeans6": 1.0, "fp16": 2.0, "mixed:step=0.01": 2.0}


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("digits_resnet", blocks=2, width=32, num_classes=7).eval()  # an odd number of rows
    images = torch.randn(40, 1, 8, 8)
    sharefold.convert_(model, sharefold.plan(model, "60%", images, method="basis", objective="error"), images, repair=False)
    return model


@pytest.fixture(scope="module")
def whole(plain: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Bytes of the file in float32; rounding changes nothing about it."""
    return export(plain, tmp_path_factory.mktemp("whole") / "net.onnx").bytes


def run(path: Path) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": IMAGES.numpy()})[0])


@pytest.mark.parametrize("store", STORES)
def test_the_file_is_as_small_as_its_codes(plain: nn.Module, whole: int, store: str, tmp_path: Path) -> None:
    from sharefold.store import quantize_

    model = copy.deepcopy(plain)
    quantize_(model, store, torch.randn(40, 1, 8, 8))
    small = export(model, tmp_path / "small.onnx", store_codes=True)
    numbers = sum(t.numel() for t in model.state_dict().values() if t.is_floating_point())
    graph = whole - 4 * numbers  # nodes and names
    # Scales are a float a row; vectors are halves, and every tensor has a name and some nodes more.
    matrices = [t for t in model.state_dict().values() if t.is_floating_point() and t.ndim > 1]
    codes = STORES[store] * sum(t.numel() for t in matrices) + 4 * sum(len(t) for t in matrices)
    vectors = 2 * (numbers - sum(t.numel() for t in matrices))
    assert small.bytes < 1.15 * (codes + vectors + graph) < whole
    assert torch.allclose(run(tmp_path / "small.onnx"), answers(model, IMAGES), atol=1e-5)
    assert small.max_difference < 1e-5
    stored = {tensor.name: tensor for tensor in onnx.load(tmp_path / "small.onnx").graph.initializer}
    floats = sum(np.prod(t.dims) for t in stored.values() if t.data_type == onnx.TensorProto.FLOAT)
    assert floats < 0.1 * numbers and len(stored) == len(set(stored))
    onnx.checker.check_model(tmp_path / "small.onnx", full_check=True)


def test_the_numbers_are_those_of_the_network(plain: nn.Module, tmp_path: Path) -> None:
    """Code times scale, in the shape of the tensor: not merely near it."""
    from sharefold.store import quantize_

    model = copy.deepcopy(plain)
    quantize_(model, "int8", torch.randn(40, 1, 8, 8))
    export(model, tmp_path / "net.onnx", store_codes=True)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "net.onnx").graph.initializer}
    found = 0
    for name, tensor in model.state_dict().items():
        if f"{name}.codes" in stored:
            codes, scale = stored[f"{name}.codes"], stored[f"{name}.scale"]
            assert codes.dtype == np.int8 and codes.shape == tuple(tensor.shape) and scale.shape == (len(tensor),)
            numbers = codes.astype(np.float32) * scale.reshape(-1, *[1] * (codes.ndim - 1))
            assert np.array_equal(numbers, tensor.numpy())
            found += 1
    assert found > 10


def test_a_network_that_was_changed_after_rounding_has_nothing_to_store(plain: nn.Module, tmp_path: Path) -> None:
    from sharefold.store import quantize_

    model = copy.deepcopy(plain)
    quantize_(model, "int8", torch.randn(40, 1, 8, 8))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(1e-3 * torch.randn_like(tensor))
    with pytest.raises(SharefoldError, match="no float32 tensor of the graph lies on the grid"):
        export(model, tmp_path / "net.onnx", store_codes=True)


def test_refusals(plain: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(SharefoldError, match="was not rounded: convert it with --store int8"):
        export(plain, tmp_path / "net.onnx", store_codes=True)
    with pytest.raises(SharefoldError, match="the format pt2 holds plain numbers: export to a file ending in .onnx"):
        export(plain, tmp_path / "net.pt2", store_codes=True)
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path) -> None:
    options = ("--no-pretrained", "--calib-count", 40, "--no-repair", "--budget", "60%", "--method", "basis", "--store", "int4")
    reported("convert", "timm:digits_resnet:blocks=2,width=16", *options, "-o", tmp_path / "net")
    whole = reported("export", tmp_path / "net", "-o", tmp_path / "whole.onnx")
    small = reported("export", tmp_path / "net", "-o", tmp_path / "small.onnx", "--store-codes")
    assert small["bytes"] < 0.6 * whole["bytes"] and small["max_difference"] < 1e-5
    assert whole["codes"] == 0 and small["codes"] > 10
    refused(call("export", tmp_path / "net", "-o", tmp_path / "small.pt2", "--store-codes"), "holds plain numbers")
