"""Repeated blocks: every iteration has norms of its own, also where backward runs parts of a block again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sharefold.errors import SharefoldError
from sharefold.layers import repeat_blocks


class Block(nn.Module):
    """Two norms, computed again in backward by the variant of checkpointing, or not at all (None)."""

    reentrant: bool | None = None

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        nn.init.normal_(self.norm1.weight), nn.init.normal_(self.norm2.weight)

    def inner(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant))


def gradients(blocks: nn.Sequential, reentrant: bool | None, outer: bool | None, times: int) -> dict[str, Tensor]:
    """Of a network of ``blocks``, which may be computed again as a whole, too, after so many passes back through one graph."""
    blocks[0].block.reentrant = reentrant
    blocks.zero_grad()
    x = torch.linspace(-1, 1, 2 * 4 * 5 * 5).reshape(2, 4, 5, 5).sin().requires_grad_()
    y = blocks(x) if outer is None else checkpoint(blocks, x, use_reentrant=outer)
    for number in range(times):
        y.square().sum().backward(retain_graph=number + 1 < times)
    assert x.grad is not None
    return {"x": x.grad} | {name: p.grad.clone() for name, p in blocks.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("outer", "times"), [(None, 1), (None, 2), (False, 1), (True, 1)])
def test_activation_checkpointing_gives_equal_gradients(reentrant: bool, outer: bool | None, times: int) -> None:
    blocks = nn.Sequential(*repeat_blocks([Block() for _ in range(3)]))
    wanted = gradients(blocks, None, None, times)
    for _ in range(2):
        found = gradients(blocks, reentrant, outer, times)
        assert wanted.keys() == found.keys() and len(wanted) == 1 + 2 + 3 * 4
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_a_part_alone_is_refused() -> None:
    first = repeat_blocks([Block(), Block()])[0]
    with pytest.raises(SharefoldError, match="outside of its iterations"):
        first.block.inner(torch.zeros(2, 4, 5, 5))
