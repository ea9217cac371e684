"""Large images lie channels last: whatever looks at a layer's inputs and outputs finds the same numbers."""

from __future__ import annotations

from weakref import WeakSet

import pytest
import timm
import torch
from networks import images, net
from torch import Tensor, nn

import sharefold
from sharefold import running
from sharefold.measure import agreement
from sharefold.plans import GroupPlan, Plan
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
    monkeypatch.setattr(running, "PACKAGES", ("networks",))
    last: list[bool] = []
    again, other = converted(kind, method, last)
    assert sum(last) > 0.9 * len(last)
    assert {(g.name, g.method) for g in other.groups} == {(g.name, g.method) for g in plan.groups}
    assert agreement(model, again, NEW).kl < 2e-2


def test_large_images_of_libraries_networks_alone_change_their_order() -> None:
    model = timm.create_model("resnet20_cifar").eval()
    side = int(running.LARGE_IMAGE**0.5)
    for network, size, order in (
        (model, side, torch.channels_last), (model, side - 1, torch.contiguous_format), (net(), side, torch.contiguous_format),
    ):  # fmt: skip
        given = torch.rand(2, 3, size, size)
        made = running.as_input(network, given)
        assert torch.equal(made, given) and made.is_contiguous(memory_format=order) and given.is_contiguous()


class Viewed(nn.Module):
    """Calls ``view`` on a map, which has to lie in the plain order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, 4), nn.Conv2d(4, 4, 3, 4)
        self.head = nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(torch.relu(self.conv1(x)))
        return self.head(x.view(x.size(0), -1))


@pytest.mark.parametrize("library", [False, True])
def test_networks_that_view_their_maps_get_them_in_the_plain_order(library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if library:
        monkeypatch.setattr(running, "PACKAGES", (Viewed.__module__,))
    monkeypatch.setattr(running, "_PLAIN", WeakSet())
    model, given = Viewed().eval(), torch.rand(12, 3, 96, 96)
    plan = Plan([GroupPlan("a", "svd", ("head",), {"rank": 3})], 0, 0)
    done = sharefold.convert_(model, plan, given)
    assert done.plan.groups and (Viewed in running._PLAIN) == library


@pytest.mark.parametrize("half", [True, False])
def test_a_file_keeps_the_order(half: bool) -> None:
    shelf = Shelf(half, file_bytes=1 << 16)
    first, last = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    values: dict[str, Tensor] = {"last": last, "first": first}
    shelf.put(0, values)  # type: ignore[arg-type]
    for name, value in shelf.get(0).items():
        assert torch.allclose(value, values[str(name)], atol=2e-3) and value.stride() == values[str(name)].stride()
