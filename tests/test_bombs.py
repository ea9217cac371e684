"""Files that claim more than they hold: refused before anything is allocated. Networks that are built without weights."""

from __future__ import annotations

import base64
import json
import resource
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from file_tools import config_text, edit_config, is_one_tensor, metadata_of, parts_of, reseal
from safetensors.torch import load_file, save_file

import sharefold
from sharefold import checkpoint
from sharefold.architectures.build import _timm_model as timm_model
from sharefold.architectures.build import build_on_meta, check_arguments
from sharefold.blank import real_network
from sharefold.convert import convert_
from sharefold.errors import SharefoldError
from sharefold.format import FileConfig, carry_config
from sharefold.plans import Plan
from sharefold.sources import build_base, open_source
from sharefold.store import container
from sharefold.untrusted import JSON_LIMIT, parse_json

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def saved(base: dict[str, Any], path: Path, seed: int = 0, plain: bool = True) -> tuple[torch.nn.Module, Path]:
    """A network as it is, with values that no builder gives; its tensors under their names, or all in one."""
    torch.manual_seed(seed)
    model = build_base(base).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    carry_config(model, FileConfig(Plan([], 0, 0), base))
    return model, sharefold.save(model, path, plain=plain)


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
    "deeper": (base_of("vit_base_patch16_224", depth=1_000), "far more layers than the file has tensors"),
    "rates of 39 million blocks": (base_of("starnet_s1", depths=[1 << 17] * 300), "out of range"),
    "many stages": (base_of("starnet_s1", depths=[1000] * 64), "out of range"),
    "multiplied blocks": (base_of("mixnet_l", depth_multiplier=100_000), "out of range"),
    "multiplied blocks within the bound": (base_of("mixnet_l", depth_multiplier=1000), "far more layers"),
    "heads": (base_of("convit_tiny", num_heads=100_000), "out of range"),
    "heads within the bound": (base_of("convit_tiny", num_heads=1000), "does not fit its own plan|cannot be built"),
    "depths of hierarchies": (base_of("convnext_atto", depths=[1 << 17] * 300), "out of range"),
    "nested": (base_of("digits_resnet", block_args=[[[i] * 60] * 60 for i in range(60)]), "out of range"),
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


@pytest.mark.parametrize("kind", ["classes", "more classes", "rates of 39 million blocks", "deepest", "width"])
def test_architectures_that_a_file_of_one_tensor_does_not_explain(tmp_path: Path, kind: str, frugal: None) -> None:
    file = saved(base_of("digits_resnet"), tmp_path / "net.safetensors", plain=False)[1]
    assert is_one_tensor(file)
    edit_config(file, lambda config: config.update(base=BASES[kind][0]))
    with pytest.raises(SharefoldError, match="far more than its|another structure|out of range|cannot be built") as error:
        sharefold.load(file)
    assert "\n" not in str(error.value)


def test_configurations_of_one_tensor_are_unpacked_within_bounds(tmp_path: Path, frugal: None) -> None:
    file = saved(base_of("digits_resnet"), tmp_path / "net.safetensors", plain=False)[1]
    _, weights = parts_of(file)
    squeeze = zlib.compressobj(1, zlib.DEFLATED, -15)
    bomb = squeeze.compress(b'{"plan": ') + b"".join(squeeze.compress(b" " * (1 << 20)) for _ in range(256)) + squeeze.flush()
    save_file({container.NAME: container.packed(bomb, weights)}, file)
    for read in (sharefold.load, checkpoint.read_config):
        with pytest.raises(SharefoldError, match="damaged or cut off"):
            read(file)


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
    with pytest.raises(SharefoldError, match="more than 300 digits"):
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


WINDOWS = dict(img_size=256, window_size=64, embed_dim=8, depths=[8], num_heads=[1], num_classes=2)


@pytest.fixture
def windows(tmp_path: Path) -> Path:
    """What would be 1.4 GB of tables of positions beside 0.5 MB of weights: a file, and a folder of timm's layout."""
    base = base_of("swin_tiny_patch4_window7_224", **{**WINDOWS, "img_size": 32, "window_size": 4})
    file = saved(base, tmp_path / "net.safetensors")[1]
    large = build_on_meta(base_of("swin_tiny_patch4_window7_224", **WINDOWS))
    state = {name: torch.zeros(like.shape) for name, like in large.state_dict().items()}
    config = json.loads(config_text(file))
    config["base"]["kwargs"].update(WINDOWS)
    reseal(file, state, json.dumps(config))
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(state, str(folder / "model.safetensors"))
    text = json.dumps({"architecture": "swin_tiny_patch4_window7_224", "model_args": WINDOWS})
    (folder / "config.json").write_text(text)
    return tmp_path


def test_buffers_that_no_file_holds(windows: Path, frugal: None) -> None:
    for opened in (lambda: sharefold.load(windows / "net.safetensors"), lambda: open_source(windows / "folder")):
        with pytest.raises(SharefoldError, match="bytes of buffers, far more than the") as error:
            opened()
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    """By its buffers, and by how far it unpacks; networks of the user's own are loaded into what the user built."""
    model, _ = saved(base_of("digits_resnet"), tmp_path / "net.safetensors")
    model.register_buffer("table", torch.zeros(1 << 25, dtype=torch.int8).expand(3, -1), persistent=False)
    with pytest.raises(SharefoldError, match="bytes of buffers, far more than the"):
        sharefold.save(model, tmp_path / "more.safetensors")
    carry_config(model, FileConfig(Plan([], 0, 0)))
    sharefold.save(model, tmp_path / "own.safetensors")
    assert not (tmp_path / "more.safetensors").exists() and (tmp_path / "own.safetensors").exists()


def test_builders_that_fail_on_meta_are_not_tried_with_values() -> None:
    """Unless it is values that they lack: what else makes them fail comes after tables of any size."""
    tried: list[bool] = []

    def builder(name: str, kwargs: dict[str, Any]) -> torch.nn.Module:
        real = not torch.zeros(2).is_meta
        tried.append(not torch.arange(2).is_meta)
        if kwargs:
            return torch.nn.Linear(int(torch.arange(3)[2]), 4 if not real else 5)
        raise ValueError("no such pooling")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sharefold.architectures.build._timm_model", builder)
        with pytest.raises(SharefoldError, match="no such pooling"):
            build_on_meta(base_of("digits_resnet"))
        assert tried == [False]
        model = build_on_meta(base_of("digits_resnet", num_classes=3))
        assert tried == [False, False, True] and model.weight.shape == (4, 2) and model.weight.is_meta
        patch.setattr("sharefold.architectures.build._timm_model", lambda name, kwargs: torch.arange(1 << 23)[0].item())
        with pytest.raises(SharefoldError, match="a table of 8,388,608 numbers"):
            build_on_meta(base_of("digits_resnet"))


def test_arguments_of_the_registries_are_within_the_bounds() -> None:
    """What our own networks and timm's largest take."""
    for arguments in (
        {"img_size": [1024, 1024], "window_size": [64, 64]}, {"depths": [3, 3, 27, 3], "dims": [384, 768, 1536, 3072]},
        {"layers": [3, 30, 48, 8], "groups": 32, "width_per_group": 64}, {"num_classes": 21_843, "embed_dim": 6144},
        {"channels": [1024, 2048, 4096, 8192]}, {"depth": 64, "num_heads": 48}, {"depth_multiplier": 3.6},
    ):
        check_arguments("net", arguments)


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


def with_table(place: str) -> Callable[..., Any]:
    """A builder whose networks hold a tensor that no file holds."""

    def build(name: str, kwargs: dict[str, Any]) -> torch.nn.Module:
        model: Any = timm_model(name, kwargs)
        table = torch.arange(4.0)
        within: list[Any] = [table]
        within.append(within)
        if place == "buffer":
            model.register_buffer("table", table, persistent=False)
        else:
            places: dict[str, Any] = {
                "attribute": table, "list": {"all": [table]}, "closure": lambda x: x + table,
                "partial": partial(torch.add, table), "itself": within,
            }  # fmt: skip
            model.table = places[place]
        return model

    return build


@pytest.mark.parametrize("place", ["buffer", "attribute", "list", "closure", "partial", "itself"])
def test_what_no_file_holds_is_built_for_real(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(base_of("digits_resnet"), tmp_path / "net.safetensors")[1]
    monkeypatch.setattr("sharefold.architectures.build._timm_model", with_table(place))
    found: Any = sharefold.load(path).table
    if place in ("closure", "partial"):
        found = found(torch.zeros(4))
    tables = {"list": lambda: found["all"][0], "itself": lambda: found[0]}
    assert torch.equal(tables.get(place, lambda: found)(), torch.arange(4.0))


def test_weights_that_a_builder_calculates_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is built for real then."""
    model, path = saved(base_of("digits_resnet"), tmp_path / "net.safetensors")
    real: list[FileConfig] = []

    def refuse(base: dict[str, Any]) -> torch.nn.Module:
        built = build_base(base)
        if next(built.parameters()).is_meta:
            raise RuntimeError("no values")
        return built

    monkeypatch.setattr("sharefold.architectures.build._timm_model", with_table("attribute"))
    monkeypatch.setattr("sharefold.blank.build_base", refuse)
    monkeypatch.setattr("sharefold.blank.real_network", lambda config: (real.append(config), real_network(config))[1])
    assert torch.equal(sharefold.load(path)(X), model(X)) and len(real) == 1


def test_metadata_is_what_the_reader_checks(file: Path) -> None:
    assert set(metadata_of(file)) == {"sharefold", "crc32", "format"}
