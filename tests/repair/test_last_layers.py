"""The classifier is fitted to what is left of the features, and only where that helps."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import images, net
from repair_works import done_by, work_of
from torch import nn

from sharefold.measure import agreement, first_logits
from sharefold.repair import coefficients
from sharefold.repair.last_layers import LastLayers


def turned(model: nn.Module) -> nn.Module:
    """A copy whose features come in another order and scale, so that the classifier is wrong for them."""
    model = copy.deepcopy(model)

    class Turned(nn.Module):
        def __init__(self, fc: nn.Linear) -> None:
            super().__init__()
            self.fc = fc
            self.turn = torch.linspace(0.5, 2, fc.in_features)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.flip(1) * self.turn)

    model.fc = Turned(model.fc)
    return model


def test_a_classifier_of_turned_features_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coefficients, "RIDGES", (1e-8,))
    original = net("residual")
    model = turned(original)
    fitting, held_out = images(200, seed=1), images(60, seed=2)
    before = agreement(original, model, held_out).kl
    done = done_by(LastLayers(), work_of(original, model, fitting, held_out))
    assert done.kept and done.kl_before == pytest.approx(before, rel=1e-6) and done.kl_after < 1e-3 * before
    torch.testing.assert_close(first_logits(model(held_out)), first_logits(original(held_out)), rtol=1e-2, atol=1e-2)


def test_a_classifier_that_would_be_worse_is_put_back() -> None:
    original = net("residual")
    model = turned(original)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done = done_by(LastLayers(), work_of(original, model, images(40), images(20, seed=2), now=1e-9))
    assert not done.kept and done.kl_before == 1e-9 < done.kl_after
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_networks_whose_output_is_no_linear_are_left_alone() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net("residual")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.net(x)

    done = done_by(LastLayers(), work_of(Scaled().eval(), Scaled().eval(), images(8), images(8)))
    assert done.to_dict() == {"kept": False, "reason": "no output is that of a dense Linear or convolution with a bias"}
