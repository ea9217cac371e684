"""Which tensors a kept weight is compared with: all that torch would list, without its walk where there are no children."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sharefold.layers.bank import Bank
from sharefold.layers.weight_cache import Kept, own_tensors


class Plain(nn.Module):
    def __init__(self, child: bool) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.ones(2))
        self.register_parameter("none", None)
        self.register_buffer("second", torch.zeros(3))
        self.register_buffer("absent", None)
        if child:
            self.norm = nn.BatchNorm2d(4)


@pytest.mark.parametrize("child", [False, True])
def test_the_same_tensors_as_torch_lists(child: bool) -> None:
    module, bank = Plain(child), Bank({"basis": torch.ones(2, 2)}, uses=1)
    listed = [*module.parameters(), *module.buffers(), *bank.parameters(), *bank.buffers()]
    assert {id(tensor) for tensor in own_tensors(module, None, bank)} == {id(tensor) for tensor in listed}
    assert len(list(own_tensors(module, bank))) == len(listed)


@torch.no_grad()
def test_a_value_is_made_again_when_any_of_its_sources_changes() -> None:
    module, kept, x, made = Plain(False), Kept(), torch.ones(1), []

    def value() -> Tensor:
        made.append(len(made))
        return torch.tensor(float(len(made)))

    def get() -> float:
        return float(kept.get(x, own_tensors(module), value))

    assert get() == get() == 1
    module.first.add_(1)
    assert get() == get() == 2
    module.second = torch.zeros(3)  # another tensor with the same numbers
    assert get() == get() == 3
    module.first.data = torch.full((2,), 5.0)  # which torch does not count
    assert get() == get() == 4
    module.register_buffer("absent", torch.zeros(1))
    assert get() == get() == 5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert get() == get() == 6
    assert get() == 7
