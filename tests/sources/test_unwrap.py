"""Containers and prefixes around a state dict."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sharefold.errors import SharefoldError
from sharefold.sources.unwrap import unwrap

STATE = {"conv1.weight": torch.ones(2, 2), "fc.bias": torch.zeros(3)}


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in STATE.items()}


@pytest.mark.parametrize(
    ("content", "steps"),
    [
        (STATE, []),
        ({"state_dict": STATE}, ["state_dict"]),
        ({"model": STATE, "optimizer": {"state": {}}}, ["model"]),
        ({"net": prefixed("module."), "acc": 1.0}, ["net", "module."]),
        ({"model_ema": {"module": STATE}}, ["model_ema", "module"]),
        ({"state_dict_ema": prefixed("_orig_mod.module.")}, ["state_dict_ema", "_orig_mod.", "module."]),
        ({"ema": {"state_dict": prefixed("backbone.")}}, ["ema", "state_dict", "backbone."]),
        ({"student": STATE, "epoch": 3}, ["student"]),
        ({"state_dict": prefixed("model.")}, ["state_dict", "model."]),
    ],
)
def test_wrappings(content: Any, steps: list[str]) -> None:
    state, notes = unwrap(content, "m.pt")
    assert isinstance(state, dict) and state.keys() == STATE.keys()
    assert torch.equal(state["conv1.weight"], STATE["conv1.weight"])
    assert notes["unwrapped"] == steps


def test_plain_weights_come_before_averaged_ones() -> None:
    average = {name: tensor + 5 for name, tensor in STATE.items()}
    state, notes = unwrap({"state_dict_ema": average, "state_dict": STATE}, "m.pt")
    assert isinstance(state, dict) and torch.equal(state["fc.bias"], STATE["fc.bias"])
    assert notes["also"] == ["state_dict_ema"]


def test_prefix_stays_unless_all_share_it() -> None:
    state, notes = unwrap({"module.a": torch.ones(1), "b": torch.ones(1)}, "m.pt")
    assert isinstance(state, dict) and set(state) == {"module.a", "b"} and notes["unwrapped"] == []


def test_litter_and_numbers_are_dropped() -> None:
    content = {**STATE, "layer.total_ops": torch.ones(1), "epoch": 4, "n_averaged": torch.tensor(3)}
    state, notes = unwrap(content, "m.pt")
    assert isinstance(state, dict) and state.keys() == STATE.keys()
    assert sorted(notes["dropped"]) == ["epoch", "layer.total_ops", "n_averaged"]


def test_inner_compile_marks_and_old_densenet_names() -> None:
    name = "features.denseblock1.denselayer1.norm.1.running_mean"
    state, notes = unwrap({"layer1._orig_mod.0.weight": torch.ones(1), name: torch.ones(2)}, "m.pt")
    assert isinstance(state, dict)
    assert set(state) == {"layer1.0.weight", "features.denseblock1.denselayer1.norm1.running_mean"}
    assert notes["unwrapped"] == ["._orig_mod.", "old DenseNet names"]


def test_modules() -> None:
    inner = nn.Linear(2, 2)
    found, notes = unwrap({"model": nn.DataParallel(inner), "epoch": 1}, "m.pt")
    assert found is inner and notes["unwrapped"] == ["model", "module."]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "holds one list"),
        ({}, "keys are nothing"),
        ({"epoch": 3}, "keys are 'epoch'"),
        ({"first": STATE, "second": STATE}, r"several candidates \(first, second\)"),
        (torch.ones(3), "holds one Tensor"),
    ],
)
def test_nothing_to_find(content: Any, words: str) -> None:
    with pytest.raises(SharefoldError, match=words) as error:
        unwrap(content, "m.pt")
    assert "m.pt" in str(error.value) and "\n" not in str(error.value)
