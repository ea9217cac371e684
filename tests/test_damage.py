"""Damaged files: told by their checksum, never another network without a word."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from file_tools import CONFIG, WEIGHTS, edit_config, metadata_of, old_file, reseal
from safetensors.torch import load_file, save_file

import sharefold
from sharefold.checksum import checksum, not_finite
from sharefold.convert import convert_
from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.plans import Plan

X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    network = sharefold.open_source("timm:digits_resnet").model
    plan = sharefold.plan(network, budget="80%", calibration=X.repeat(4, 1, 1, 1), method="svd", exclude="layer2|layer3")
    convert_(network, plan, calibration=X.repeat(4, 1, 1, 1), repair=False)
    return network


@pytest.fixture
def file(model: torch.nn.Module, tmp_path: Path) -> Path:
    return sharefold.save(model, tmp_path / "net.safetensors")


def one_line(error: pytest.ExceptionInfo[SharefoldError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_any_flipped_bit_of_the_tensors_is_refused(file: Path) -> None:
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    places = torch.randint(start, len(data), (40,), generator=torch.Generator().manual_seed(1)).tolist()
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        file.write_bytes(damaged)
        with pytest.raises(SharefoldError, match="checksum does not hold") as error:
            sharefold.load(file)
        one_line(error)


def test_a_changed_configuration_or_swapped_tensors_are_refused(file: Path) -> None:
    text = metadata_of(file)["sharefold"]
    tensors = load_file(file)
    first = checksum(text, tensors)
    norms = [n for n in tensors if n.endswith("running_var")]
    names = next([a, b] for a in norms for b in norms if a < b and tensors[a].shape == tensors[b].shape)
    swapped = {**tensors, names[0]: tensors[names[1]], names[1]: tensors[names[0]]}
    assert checksum(text, swapped) != first and checksum(text + " ", tensors) != first
    assert checksum(text, dict(reversed(tensors.items()))) == first
    metadata = metadata_of(file)
    save_file(tensors, str(file), {**metadata, "sharefold": text.replace("digits_resnet", "digits_resnet ", 1)})
    with pytest.raises(SharefoldError):
        sharefold.load(file)
    save_file(tensors, str(file), {k: v for k, v in metadata.items() if k != "crc32"})
    with pytest.raises(SharefoldError, match="checksum does not hold"):
        sharefold.load(file)


def test_the_copy_of_the_configuration_must_agree(model: torch.nn.Module, tmp_path: Path) -> None:
    folder = sharefold.save(model, tmp_path / "net", metrics={"top1": 0.5})
    side = folder / CONFIG
    text = side.read_text()
    assert '"mean": [' in text
    side.write_text(text.replace('"mean": [', '"mean": [1e-9,', 1).replace('"input_size"', '"input"', 1))
    with pytest.raises(SharefoldError, match=f"says another pretrained_cfg than {WEIGHTS}"):
        sharefold.load(folder)
    side.write_text(json.dumps(json.loads(text), sort_keys=True))  # packed configurations have their keys in another order
    assert sharefold.load(folder).sharefold_config.metrics == {"top1": 0.5}
    side.write_text(text.replace("0.5", "0.75"))  # what was measured may be written down later
    assert sharefold.load(folder).sharefold_config.metrics == {"top1": 0.75}
    side.unlink()
    assert sharefold.load(folder).sharefold_config.metrics == {"top1": 0.5}


def test_old_files_load_with_a_note(file: Path, model: torch.nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sharefold.load(file)
    old_file(file)
    with pytest.warns(SharefoldWarning, match="has no checksum"):
        again = sharefold.load(file)
    assert torch.equal(again(X), model.eval()(X))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(file: Path, value: float, model: torch.nn.Module, tmp_path: Path) -> None:
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("running_var"))
    tensors[name][3] = value
    reseal(file, tensors)
    with pytest.raises(SharefoldError, match=f"weights hold (NaN|infinity): {name}"):
        sharefold.load(file)
    parameter = next(model.parameters())
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter.flatten()[0] = value
    with pytest.raises(SharefoldError, match="weights hold"):
        sharefold.save(model, tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()
    with torch.no_grad():
        parameter.copy_(kept)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_not_finite(kind: torch.dtype) -> None:
    values = torch.ones(7).to(kind)
    assert not_finite(values) == "" and not_finite(values[:0]) == "" and not_finite(torch.arange(3)) == ""
    values[2] = float("inf")
    assert not_finite(values) == "infinity"
    values[5] = float("nan")
    assert not_finite(values) == "NaN"
    if kind == torch.float32:
        assert not_finite(torch.tensor([1.0, float("nan")]).to(torch.float8_e5m2)) == "NaN"


def test_a_packed_file_has_its_checksum_too(tmp_path: Path) -> None:
    network = sharefold.open_source("timm:digits_resnet").model
    convert_(network, Plan([], 1, 1, store="fp16"), calibration=X)
    file = sharefold.save(network, tmp_path / "small.safetensors")
    data = bytearray(file.read_bytes())
    data[data.index(b"zlib85:") + 40] ^= 1
    file.write_bytes(data)
    with pytest.raises(SharefoldError):
        sharefold.load(file)


def test_edits_with_a_new_checksum_are_let_through(file: Path) -> None:
    """A checksum is no signature."""
    edit_config(file, lambda config: config["plan"].update(source="somebody else"))
    assert sharefold.load(file).sharefold_config.plan.source == "somebody else"
