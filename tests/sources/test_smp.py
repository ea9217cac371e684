"""Networks of segmentation_models_pytorch: by name, from the folder that it writes, from a checkpoint, and in memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
from command_line import call
from networks import count
from safetensors.torch import load_file
from torch import nn

import sharefold
from sharefold.architectures.bases import base_of
from sharefold.plans import GroupPlan, Plan

IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return smp.Unet("tu-resnet10t", encoder_weights=None, classes=2, decoder_channels=(32, 16, 8, 8, 8)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smp") / "unet"
    network().save_pretrained(path)  # type: ignore[operator]
    return path


def same(first: nn.Module, second: nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(first(IMAGES), second(IMAGES))


@pytest.mark.parametrize("prefix", ["", "smp:"])
def test_a_folder_of_save_pretrained(folder: Path, prefix: str) -> None:
    source = sharefold.open_source(f"{prefix}{folder}")
    assert source.base["library"] == "smp" and source.name == "unet"
    assert source.base["kwargs"]["num_classes"] == 2 and source.base["kwargs"]["decoder_channels"] == [32, 16, 8, 8, 8]
    assert same(source.model, network())


def test_a_checkpoint_of_a_named_architecture_has_the_classes_of_the_file(tmp_path: Path) -> None:
    torch.manual_seed(1)
    made = smp.FPN("tu-resnet10t", encoder_weights=None, classes=3, in_channels=4).eval()
    torch.save(made.state_dict(), tmp_path / "w.pth")
    source = sharefold.open_source(tmp_path / "w.pth", arch="smp:fpn:encoder_name=tu-resnet10t")
    assert source.base["kwargs"] == {"encoder_name": "tu-resnet10t", "num_classes": 3, "in_chans": 4}
    assert source.pretrained_cfg["input_size"][0] == 4
    with torch.no_grad():
        images = torch.randn(2, 4, 32, 32)
        assert torch.equal(source.model(images), made(images))


def test_a_converted_one_is_saved_loaded_and_expanded(folder: Path, tmp_path: Path) -> None:
    model = sharefold.open_source(folder).model
    group = GroupPlan("a", "svd", ("decoder.blocks.1.conv1.0",), {"rank": 8})
    sharefold.convert_(model, Plan([group], 0, 0), IMAGES, repair=False)
    sharefold.save(model, tmp_path / "out")
    loaded = sharefold.load(tmp_path / "out")
    assert type(loaded) is smp.Unet and same(loaded, model)
    assert count(loaded) < count(network())
    done = call("expand", tmp_path / "out", "-o", tmp_path / "dense.safetensors")
    assert done.exit_code == 0, done.output
    dense = network(1)
    dense.load_state_dict(load_file(tmp_path / "dense.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(dense(IMAGES), model(IMAGES), rtol=1e-3, atol=1e-4)


def test_a_network_in_memory_knows_its_base() -> None:
    base = base_of(network())
    assert base is not None and (base["library"], base["name"]) == ("smp", "unet")
    changed = network()
    changed.segmentation_head[0] = nn.Conv2d(8, 2, 1)  # type: ignore[index,operator]
    assert base_of(changed) is None


@pytest.mark.parametrize(
    ("source", "pretrained", "words"),
    [
        ("smp:unet", True, "no published weights: give the folder that save_pretrained wrote"),
        ("smp:unett", False, "unknown model smp:unett: did you mean unet"),
        ("smp:unet:encoder_name=resnet19", False, "unknown encoder resnet19 .*did you mean resnet18"),
        ("smp:unet:encoder_name=tu-hf-hub:timm/x", False, "unknown model timm:hf-hub:timm/x"),
        ("smp:unet:encoder_weights=imagenet", False, "encoder_weights of unet is not allowed"),
        ("smp:unet:encoder_depth=99", False, "unet cannot be built with encoder_depth=99"),
        ("smp:", False, "no model name"),
    ],
)
def test_requests_that_are_refused(source: str, pretrained: bool, words: str) -> None:
    with pytest.raises(sharefold.SharefoldError, match=words) as error:
        sharefold.open_source(source, pretrained=pretrained)
    assert "\n" not in str(error.value)


def test_without_the_package_one_line_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(sharefold.SharefoldError, match="pip install segmentation-models-pytorch"):
        sharefold.open_source("smp:unet", pretrained=False)
