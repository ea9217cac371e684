"""Large images lie channels last: whatever looks at a layer's inputs and outputs finds the same numbers."""

from __future__ import annotations

import pytest
import torch
from networks import images, net
from torch import Tensor, nn

import sharefold
from sharefold import running
from sharefold.measure import agreement
from sharefold.repair.boundary import Shelf

IMAGES, NEW = images(30, 3), images(100, 9)


def converted(kind: str, method: tuple[str, ...], seen: list[bool]) -> tuple[nn.Module, sharefold.Plan]:
    model = net(kind, blocks=2)
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_pre_hook(lambda _, inputs: seen.append(not inputs[0].is_contiguous()))
    cal = sharefold.calibrate(model, IMAGES)
    plan = sharefold.plan(model, "70%", cal, method=method)
    sharefold.convert_(model, plan, cal, refine=1)
    return model, plan


@pytest.mark.parametrize(
    ("kind", "method"),
    [("residual", ("hybrid", "fold")), ("grouped", ("basis",)), ("depthwise", ("svd", "fold")), ("std", ("spatial",))],
)
def test_the_order_of_channels_changes_nothing(kind: str, method: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    plain: list[bool] = []
    model, plan = converted(kind, method, plain)
    assert plain and not any(plain)
    monkeypatch.setattr(running, "LARGE_IMAGE", 1)
    last: list[bool] = []
    again, other = converted(kind, method, last)
    assert sum(last) > 0.9 * len(last)
    assert {(g.name, g.method) for g in other.groups} == {(g.name, g.method) for g in plan.groups}
    assert agreement(model, again, NEW).kl < 2e-2


def test_large_images_alone_change_their_order() -> None:
    model = net("residual")
    side = int(running.LARGE_IMAGE**0.5)
    for size, order in ((side, torch.channels_last), (side - 1, torch.contiguous_format)):
        given = torch.rand(2, 3, size, size)
        made = running.as_input(model, given)
        assert torch.equal(made, given) and made.is_contiguous(memory_format=order) and given.is_contiguous()


@pytest.mark.parametrize("half", [True, False])
def test_a_file_keeps_the_order(half: bool) -> None:
    shelf = Shelf(half, file_bytes=1 << 16)
    first, last = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    values: dict[str, Tensor] = {"last": last, "first": first}
    shelf.put(0, values)  # type: ignore[arg-type]
    for name, value in shelf.get(0).items():
        assert torch.allclose(value, values[str(name)], atol=2e-3) and value.stride() == values[str(name)].stride()
