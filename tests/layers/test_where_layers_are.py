"""Layers that a network holds in plain lists, looks into, or runs by another way than by calling them where they stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharefold
from sharefold.errors import SharefoldError
from sharefold.layers import BasisConv, replace_module, shared_layers
from sharefold.plans import GroupPlan, Plan

NAMES = tuple(f"conv{i}" for i in range(3))
PLAN = Plan([GroupPlan("g", "basis", NAMES, {"rank": 12})], 0, 0)
IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Holder:
    """An object of the user's that nobody looks into."""

    def __init__(self, layers: list[nn.Conv2d]) -> None:
        self.layers = layers


class Net(nn.Module):
    """Three layers, run from wherever ``place`` puts them."""

    def __init__(self, place: str, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.place = place
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        layers = [nn.Conv2d(8, 8, 3, **options) for _ in NAMES]
        for name, layer in zip(NAMES, layers, strict=True):
            self.add_module(name, layer)
        held: dict[str, Callable[[], Any]] = {
            "list": lambda: layers, "tuple": lambda: tuple(layers),
            "nested": lambda: {"all": [(layer, "relu") for layer in layers]},
            "object": lambda: Holder(layers), "names": lambda: NAMES,
        }  # fmt: skip
        self.held = held[place]()

    def run(self) -> list[Any]:
        if self.place == "nested":
            return [layer for layer, _ in self.held["all"]]
        if self.place == "names":
            return [getattr(self, name) for name in self.held]
        return self.held.layers if self.place == "object" else [*self.held]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.run():
            # As those do who pad by themselves.
            reach = [side for size, dilation in zip(layer.kernel_size, layer.dilation, strict=True) for side in (
                dilation * (size - 1) // 2,) * 2]  # fmt: skip
            x = torch.relu(layer(F.pad(x, reach) if layer.padding == (0, 0) else x))
            if hasattr(layer, "act"):
                x = layer.factor * layer.act(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("place", ["list", "tuple", "nested", "names"])
@pytest.mark.parametrize("options", [{"padding": 1}, {"dilation": 2}], ids=str)
def test_every_place_of_a_layer_is_taken(place: str, options: dict[str, Any], tmp_path: Any) -> None:
    model = Net(place, **options).eval()
    before = model(IMAGES)
    done = sharefold.convert_(model, PLAN, IMAGES, repair=False)
    assert done.plan.groups[0].error > 0.01
    after = model(IMAGES).detach()
    assert not torch.allclose(after, before, rtol=1e-3) and all(type(layer) is BasisConv for layer in model.run())
    sharefold.save(model, tmp_path / "net.safetensors")
    assert torch.equal(sharefold.load(tmp_path / "net.safetensors", model=Net(place, **options))(IMAGES), after)
    torch.testing.assert_close(sharefold.expand(model)(IMAGES), after, rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_run_from_an_unknown_place_is_refused() -> None:
    model = Net("object", padding=1).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(SharefoldError, match="layer 'conv0': the network does not run it from there"):
        sharefold.convert_(model, PLAN, IMAGES, repair=False)
    assert not shared_layers(model) and all(torch.equal(model.state_dict()[name], t) for name, t in before.items())


def test_a_network_that_asks_layers_for_what_shared_ones_do_not_have_is_refused() -> None:
    class Asks(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + len(self.conv1._reversed_padding_repeated_twice)

    with pytest.raises(SharefoldError, match="the network fails once its layers are shared .*_reversed_padding"):
        sharefold.convert_(Asks("names", padding=1).eval(), PLAN, IMAGES, repair=False)


@pytest.mark.parametrize("last", [False, True])
def test_a_network_that_asks_layers_for_their_class_is_refused(last: bool) -> None:
    class Asks(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for layer in (self.conv0, self.conv1, self.conv2):
                x = layer(x)
                if isinstance(layer, nn.Conv2d) or layer is self.conv2 or last:
                    x = torch.relu(x)
            return self.head(x.mean((2, 3))) * (isinstance(self.conv2, nn.Conv2d) or not last)

    model = Asks("names", padding=1).eval()
    where = "on the way to its outputs" if last else "on the way to layer 'conv1'"
    with pytest.raises(SharefoldError, match=f"something else with shared layers than with stock ones {where}: it asks layers"):
        sharefold.convert_(model, PLAN, IMAGES, repair=False)
    assert not shared_layers(model)


@pytest.mark.parametrize("way", ["sign", "sorted", "random", "half"])
def test_rounding_and_chance_are_not_taken_for_questions_of_class(way: str) -> None:
    class Unsteady(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            if way == "random":
                return F.dropout(x, 0.5)
            return x.sign() if way == "sign" else x.flatten().sort().values if way == "sorted" else x

    model = Unsteady("names", padding=1).eval()
    model, images = (model.bfloat16(), IMAGES.bfloat16()) if way == "half" else (model, IMAGES)
    sharefold.convert_(model, PLAN, images, repair=False)
    assert len(shared_layers(model)) == len(NAMES)


def test_what_users_put_on_a_layer_goes_along(tmp_path: Any) -> None:
    def made() -> Net:
        model = Net("names", padding=1)
        for name in NAMES:
            layer: Any = model.get_submodule(name)
            layer.act, layer.factor = nn.PReLU(8), 1.5
        return model.eval()

    model = made()
    with torch.no_grad():
        model.get_submodule("conv1").act.weight.fill_(0.7)
    sharefold.convert_(model, PLAN, IMAGES, repair=False)
    after = model(IMAGES).detach()
    assert model.get_submodule("conv1").factor == 1.5
    sharefold.save(model, tmp_path / "net.safetensors")
    assert torch.equal(sharefold.load(tmp_path / "net.safetensors", model=made())(IMAGES), after)
    dense = sharefold.expand(model)
    assert dense.state_dict().keys() == made().state_dict().keys()
    torch.testing.assert_close(dense(IMAGES), after, rtol=1e-4, atol=1e-4)


def test_shared_layers_tell_what_stock_ones_do() -> None:
    stock = [
        nn.Conv1d(4, 8, 3, padding=2, dilation=2), nn.Conv2d(4, 8, (1, 3), padding=(0, 1), padding_mode="reflect"),
        nn.Conv2d(4, 8, 3, padding="same"), nn.ConvTranspose2d(4, 8, 3, stride=2, padding=1, output_padding=1),
        nn.Conv3d(4, 8, 3),
    ]  # fmt: skip
    x = {1: (2, 4, 9), 2: (2, 4, 9, 9), 3: (2, 4, 5, 5, 5)}
    for layer in stock:
        model = nn.Sequential(layer, nn.ReLU())
        rank = len(layer.kernel_size)
        sharefold.convert_(
            model, Plan([GroupPlan("g", "svd", ("0",), {"rank": 2})], 0, 0), torch.randn(x[rank]), repair=False
        )
        for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode", "output_padding", "transposed", "groups"):
            assert getattr(model[0], name) == getattr(layer, name), (layer, name)


def test_replacing_leaves_other_containers_as_they_are() -> None:
    model = Net("list", padding=1)
    model.numbers = numbers = [1, 2, (3, None)]
    other = nn.Conv2d(8, 8, 3, padding=1)
    replace_module(model, "conv0", other)
    assert model.numbers is numbers and model.held[0] is other and model.held[1] is model.get_submodule("conv1")
