"""Modules that ask a state dict for its version, as torchvision's MNASNet does."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from networks import images, net
from torch import nn

import sharefold
from sharefold.state_dicts import load_tensors, trial


class Versioned(nn.Module):
    """Refuses tensors without a version."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):  # type: ignore[no-untyped-def]
        if local_metadata.get("version") != 2:
            raise ValueError(f"version should be 2 instead of {local_metadata.get('version')}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_a_plain_dictionary_gets_the_versions_of_the_model() -> None:
    model, other = Versioned(), Versioned()
    with torch.no_grad():
        other.net.fc.weight.add_(1)
    tensors = dict(other.state_dict())
    with pytest.raises(ValueError, match="version"):
        model.load_state_dict(tensors)
    load_tensors(model, tensors)
    assert torch.equal(model.net.fc.weight, other.net.fc.weight)
    with pytest.raises(RuntimeError, match="Missing"):
        load_tensors(model, {})
    load_tensors(model, {}, strict=False)


def test_a_network_with_versions_is_refined_saved_and_loaded(tmp_path: Path) -> None:
    model = Versioned().eval()
    plan = sharefold.plan(model, budget="60%", calibration=images(), method=("basis", "svd"))
    sharefold.convert_(model, plan, calibration=images(), refine=1)
    path = sharefold.save(model, tmp_path / "net.safetensors")
    loaded = sharefold.load(path, model=Versioned())
    assert torch.equal(loaded(images()), model.eval()(images()))


class Named(nn.Module):
    """Keeps the names of its classes in the state dict, as a dictionary."""

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.net, self.names = net(), names

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def get_extra_state(self) -> dict[str, list[str]]:
        return {"names": list(self.names)}

    def set_extra_state(self, state: dict[str, list[str]]) -> None:
        self.names = tuple(state["names"])


def test_extra_state_stays_with_the_network(tmp_path: Path) -> None:
    model = Named(("cat", "dog")).eval()
    plan = sharefold.plan(model, budget="60%", calibration=images(), method="basis")
    sharefold.convert_(model, plan, calibration=images())
    assert model.names == ("cat", "dog")
    with pytest.warns(sharefold.SharefoldWarning, match="_extra_state is no tensor and not in the file: the network that"):
        path = sharefold.save(model, tmp_path / "net.safetensors")
    loaded = sharefold.load(path, model=Named(("dog", "cat")))
    assert torch.equal(loaded(images()), model(images())) and loaded.names == ("dog", "cat")


def test_extra_state_is_part_of_a_trial() -> None:
    model = Named(("cat",))
    with trial(model):
        model.names = ("dog",)
    assert model.names == ("cat",)


@pytest.mark.filterwarnings("ignore")
def test_quantised_weights_are_converted_around_and_not_saved(tmp_path: Path) -> None:
    body = [part for _ in range(3) for part in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    dense = nn.Sequential(nn.Conv2d(3, 8, 3), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    model = torch.ao.quantization.quantize_dynamic(dense, {nn.Linear}, dtype=torch.qint8)
    few = torch.randn(20, 3, 8, 8)
    sharefold.convert_(model, sharefold.plan(model, "70%", few, method="basis"), few)
    with pytest.raises(sharefold.SharefoldError, match="holds tensors alone: dequantise its layer"):
        sharefold.save(model, tmp_path / "net")
    assert not any(tmp_path.iterdir())


def test_a_trial_leaves_what_was_kept_last() -> None:
    model = nn.Linear(1, 1, bias=False)

    def run(*states: float, kept: int | None, error: bool = False, drop: bool = False) -> float:
        with torch.no_grad():
            model.weight.fill_(1.0)
        with contextlib.suppress(KeyError), trial(model) as tried:
            for index, state in enumerate(states):
                with torch.no_grad():
                    model.weight.fill_(state)
                if index == kept:
                    tried.keep(going_on=index + 1 < len(states))
            if drop:
                tried.drop()
            assert tried.kept == (kept is not None and not drop)
            if error:
                raise KeyError
        return float(model.weight.detach())

    assert run(2.0, 3.0, kept=None) == 1.0 and run(2.0, 3.0, kept=1) == 3.0
    assert run(2.0, 3.0, kept=0) == 2.0 == run(2.0, 3.0, kept=0, error=True)
    assert run(2.0, kept=None, error=True) == 1.0 == run(2.0, 3.0, kept=0, drop=True)
