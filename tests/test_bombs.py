"""Files that claim more than they hold: refused before anything is allocated. Networks that are built without weights."""

from __future__ import annotations

import base64
import json
import resource
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from file_tools import edit_config, metadata_of, reseal
from safetensors.torch import load_file, save_file

import sharefold
from sharefold import checkpoint
from sharefold.blank import real_network
from sharefold.convert import convert_
from sharefold.errors import SharefoldError
from sharefold.format import FileConfig, carry_config
from sharefold.plans import Plan
from sharefold.sources import build_base, open_source
from sharefold.untrusted import JSON_LIMIT, parse_json

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def saved(base: dict[str, Any], path: Path, seed: int = 0) -> tuple[torch.nn.Module, Path]:
    """A network as it is, with values that no builder gives."""
    torch.manual_seed(seed)
    model = build_base(base).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    carry_config(model, FileConfig(Plan([], 0, 0), base))
    return model, sharefold.save(model, path)


def base_of(name: str, **kwargs: Any) -> dict[str, Any]:
    return {"library": "timm", "name": name, "kwargs": kwargs}


def squeezed(head: bytes, megabytes: int = 256) -> bytes:
    squeeze = zlib.compressobj(1)
    chunk = b" " * (1 << 20)
    return squeeze.compress(head) + b"".join(squeeze.compress(chunk) for _ in range(megabytes)) + squeeze.flush()


@pytest.fixture
def frugal() -> Iterator[None]:
    """No use of 200 MB or 15 seconds more."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    assert time.process_time() - start < 15


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return saved(base_of("digits_resnet"), tmp_path / "net.safetensors")[1]


BASES = {
    "classes": (base_of("digits_resnet", num_classes=16_000_000), "does not fit its own plan"),
    "more classes": (base_of("digits_resnet", num_classes=60_000_000), "out of range"),
    "depth": (base_of("vit_base_patch16_224", depth=400), "far more layers|does not fit its own plan"),
    "deeper": (base_of("vit_base_patch16_224", depth=130_000), "far more layers than the file has tensors"),
    "deepest": (base_of("vit_base_patch16_224", depth=10_000_000), "out of range"),
    "list": (base_of("digits_resnet", block_args=[0] * 100_000), "out of range"),
    "width": (base_of("vit_base_patch16_224", embed_dim=120_000), "does not fit its own plan|cannot be built"),
}


@pytest.mark.parametrize("kind", BASES)
def test_architectures_that_the_file_does_not_explain(file: Path, kind: str, frugal: None) -> None:
    base, words = BASES[kind]
    edit_config(file, lambda config: config.update(base=base))
    with pytest.raises(SharefoldError, match=words) as error:
        sharefold.load(file)
    assert "\n" not in str(error.value)


def test_packed_weights_that_unpack_to_far_more(tmp_path: Path, frugal: None) -> None:
    model = sharefold.open_source("timm:digits_resnet").model
    convert_(model, Plan([], 1, 1, store="fp16"), calibration=X)
    file = sharefold.save(model, tmp_path / "net.safetensors")
    config = checkpoint.read_config(file).to_dict()
    config["base"]["kwargs"]["num_classes"] = 10_000_000
    reseal(file, text=json.dumps(config))
    with pytest.raises(SharefoldError, match="far more than its"):
        sharefold.load(file)


def test_side_streams_and_configurations_are_unpacked_within_bounds(tmp_path: Path, file: Path, frugal: None) -> None:
    bomb = squeezed(b'{"plan": ')
    reseal(file, text="zlib85:" + base64.b85encode(bomb).decode())
    with pytest.raises(SharefoldError, match="its configuration is damaged"):
        sharefold.load(file)
    with pytest.raises(SharefoldError, match="has more than 4 MB"):
        parse_json("[" * (JSON_LIMIT + 1), "text")
    with pytest.raises(SharefoldError, match="nested too deeply"):
        parse_json("[" * 1_000_000, "text")
    with pytest.raises(SharefoldError, match="thousands of digits"):
        parse_json("9" * 5000, "text")

    model = sharefold.open_source("timm:digits_resnet").model
    convert_(model, Plan([], 1, 1, store="fp16"), calibration=X)
    small = sharefold.save(model, tmp_path / "small.safetensors")
    blob = bytes(load_file(small)["blob"].numpy())
    side = squeezed(b"")
    rest = side + blob[17:]
    head = blob[:1] + zlib.crc32(rest).to_bytes(4, "little") + len(side).to_bytes(4, "little") + blob[9:17]
    packed = torch.frombuffer(bytearray(head + rest), dtype=torch.uint8)
    reseal(small, {"blob": packed})
    with pytest.raises(SharefoldError, match="packed weights"):
        sharefold.load(small)


def test_a_folder_of_timms_layout_is_compared_first(tmp_path: Path, frugal: None) -> None:
    model = timm.create_model("test_resnet")
    save_file(model.state_dict(), str(tmp_path / "model.safetensors"))
    for arguments in ({"num_classes": 16_000_000}, {"num_classes": 1 << 40}, {"layers": [1 << 17] * 4}):
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet", "model_args": arguments}))
        with pytest.raises(SharefoldError) as error:
            open_source(tmp_path)
        assert "\n" not in str(error.value)


SMALL = [
    *(base_of(name) for name in ("test_vit3", "test_convnext", "test_nfnet", "test_efficientnet")),
    base_of("swin_tiny_patch4_window7_224", embed_dim=12, depths=[2, 2], num_heads=[2, 2], img_size=56),
    base_of("vit_tiny_patch16_224", depth=1, num_classes=3),
    {"library": "torchvision", "name": "regnet_y_400mf", "kwargs": {"num_classes": 5}},
]


@pytest.mark.parametrize("base", SMALL, ids=lambda base: base["name"])
def test_networks_built_without_weights_are_the_same(base: dict[str, Any], tmp_path: Path) -> None:
    model, path = saved(base, tmp_path / "net.safetensors")
    again = sharefold.load(path)
    size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 64, 64))
    x = torch.randn(1, 3, *(base["kwargs"].get("img_size", size[1]),) * 2)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))
    assert type(again) is type(model) and again.training == model.training


def test_weights_that_a_builder_calculates_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is built for real then."""
    model, path = saved(base_of("digits_resnet"), tmp_path / "net.safetensors")
    real: list[FileConfig] = []

    def refuse(base: dict[str, Any]) -> torch.nn.Module:
        built = build_base(base)
        if next(built.parameters()).is_meta:
            raise RuntimeError("no values")
        return built

    monkeypatch.setattr("sharefold.blank.build_base", refuse)
    monkeypatch.setattr("sharefold.blank.real_network", lambda config: (real.append(config), real_network(config))[1])
    assert torch.equal(sharefold.load(path)(X), model(X)) and len(real) == 1


def test_metadata_is_what_the_reader_checks(file: Path) -> None:
    assert set(metadata_of(file)) == {"sharefold", "crc32", "format"}
