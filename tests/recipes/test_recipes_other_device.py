"""The published systems on a device that is not the CPU, as tests/test_other_device.py does for what `auto` tries and
for repairs."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from nets import CASES, small
from other_device import Elsewhere, other_device
from torch import nn

from sharefold.convert import Conversion, convert_
from sharefold.methods import grouped
from sharefold.methods.surrogate import descend
from sharefold.recipes import build_plan


@pytest.mark.parametrize("recipe", CASES)
def test_same_network_as_on_the_cpu(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "descend", partial(descend, steps=20))
    here, size = small(recipe)
    there, images = copy.deepcopy(here), torch.randn(8, 3, size, size)

    def run(model: nn.Module) -> Conversion:
        return convert_(model, build_plan(recipe, model, images[:1]), calibration=images, repair=False, config={"base": None})

    done = run(here)
    with other_device() as device:
        again = run(there.to(device))
        state = there.state_dict()
        assert state and all(isinstance(tensor, Elsewhere) for tensor in state.values())
        with torch.no_grad():
            got = there(images.to(device)).cpu()
        values = {name: tensor.cpu() for name, tensor in state.items()}
    assert again.steps.keys() == done.steps.keys()
    assert {name: (t.shape, t.dtype) for name, t in values.items()} == {
        name: (t.shape, t.dtype) for name, t in here.state_dict().items()
    }
    with torch.no_grad():
        wanted = here(images)
    # Sums are not added up in the same order everywhere.
    assert float((got - wanted).norm() / wanted.norm()) < 0.05
