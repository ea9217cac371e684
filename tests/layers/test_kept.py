"""What layers keep from run to run must never outlive what it was made from, wherever the next tensor comes to lie."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sharefold.layers import Bank, BasisConv, HybridConv, SharedConv, SpatialConv, form_of

RANK = 5


def layer_of(kind: str) -> SharedConv:
    """``composed`` keeps its weight, the others the filters that they put together from pivots."""
    form = form_of(nn.Conv2d(6, 8, 3, padding=1))
    size = 18 if kind == "spatial" else form.features
    pivots = torch.arange(RANK).int()
    free = torch.randn(RANK, size - RANK)
    if kind == "spatial":
        made: SharedConv = SpatialConv(form, free, torch.randn(8, RANK, 1, 3), pivots=pivots)
    elif kind == "hybrid":
        vertical = torch.randn(RANK, 18 - RANK)
        bank = Bank({"basis": torch.randn(4, 6, 3, 3)}, uses=1)
        made = HybridConv(form, torch.randn(8, 3 * RANK + 4), bank, vertical, pivots=pivots)
    elif kind == "own":
        made = BasisConv(form, torch.randn(8, RANK), unique=free, pivots=pivots)
    elif kind == "bank":
        made = BasisConv(form, torch.randn(8, RANK), Bank({"basis": free, "pivots": pivots}, uses=1))
    else:
        made = BasisConv(form, torch.randn(8, RANK), Bank({"basis": torch.randn(RANK, 6, 3, 3)}, uses=1))
    made.runtime = "composed" if kind == "composed" else "factored"
    return made.eval()


def place_of(layer: SharedConv) -> tuple[nn.Module, str]:
    if isinstance(layer, SpatialConv | HybridConv):
        return layer, "vertical"
    return (layer, "unique") if layer.bank is None else (layer.bank, "basis")


def expected(layer: SharedConv, x: torch.Tensor) -> torch.Tensor:
    """The stock layer, which keeps nothing."""
    return layer.dense()(x)


KINDS = ("composed", "own", "bank", "spatial", "hybrid")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["new parameter", "data"])
def test_a_new_tensor_at_the_address_of_the_old_one_is_not_taken_for_it(kind: str, way: str) -> None:
    layer, x = layer_of(kind), torch.randn(2, 6, 9, 7)
    owner, name = place_of(layer)
    shape = getattr(owner, name).shape
    with torch.no_grad():
        for _ in range(20):
            layer(x)
            if way == "data":
                getattr(owner, name).data = torch.empty(0)  # gives the address back
                getattr(owner, name).data = torch.randn(shape)
            else:
                delattr(owner, name)
                setattr(owner, name, nn.Parameter(torch.randn(shape)))
            torch.testing.assert_close(layer(x), expected(layer, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["eval", "train and eval", "to"])
def test_uncounted_writes_are_seen_after_a_change_of_mode_or_place(kind: str, how: str) -> None:
    layer, x = layer_of(kind), torch.randn(2, 6, 9, 7)
    owner, name = place_of(layer)
    whole = nn.ModuleList([layer, owner])
    with torch.no_grad():
        layer(x)
        getattr(owner, name).data.mul_(3)
        if how == "to":
            whole.to("cpu")
        else:
            whole.train(how != "eval").eval()
        torch.testing.assert_close(layer(x), expected(layer, x), rtol=1e-4, atol=1e-4)


def test_memory_of_the_place_left_is_not_held() -> None:
    layer = layer_of("own")
    with torch.no_grad():
        layer(torch.randn(2, 6, 9, 7))
    old = weakref.ref(layer.coefficients.untyped_storage())
    gc.collect()
    assert old() is not None
    layer.double()
    gc.collect()
    assert old() is None


def test_tensors_that_do_not_count_writes() -> None:
    with torch.inference_mode():
        layer = layer_of("composed")
        x = torch.randn(2, 6, 9, 7)
        layer(x)
        layer.coefficients.mul_(2)
        torch.testing.assert_close(layer(x), expected(layer, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_an_ensemble(kind: str) -> None:
    layers, x = [layer_of(kind) for _ in range(3)], torch.randn(2, 6, 9, 7)
    with torch.no_grad():
        wanted = torch.stack([layer(x) for layer in layers])
        parameters, buffers = torch.func.stack_module_state([nn.ModuleDict({"x": layer}) for layer in layers])
        base = nn.ModuleDict({"x": layers[0]})
        for one in parameters.values():
            one.requires_grad_(False)
        if kind in ("composed", "bank", "hybrid"):  # banks lie elsewhere; share one
            for layer in layers:
                layer.__dict__["bank"] = layers[0].bank
            wanted = torch.stack([layer(x) for layer in layers])

        def run(own: dict[str, torch.Tensor], more: dict[str, torch.Tensor]) -> torch.Tensor:
            with torch.no_grad():
                return torch.func.functional_call(_First(base), ({f"net.{k}": v for k, v in own.items()},
                                                                 {f"net.{k}": v for k, v in more.items()}), (x,))

        torch.testing.assert_close(torch.func.vmap(run)(parameters, buffers), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layers[0](x), wanted[0], rtol=1e-4, atol=1e-4)


class _First(nn.Module):
    def __init__(self, net: nn.ModuleDict) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net["x"](x)



@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("looked", [False, True], ids=["", "looked at before the step"])
def test_steps_of_fused_optimizers_are_seen(kind: str, optimizer: type[torch.optim.Optimizer], looked: bool) -> None:
    """They count no writes, and a network with fixed norms stays in eval mode while it trains."""
    layer, x = layer_of(kind), torch.randn(2, 6, 9, 7)
    owner, _ = place_of(layer)
    step = optimizer({*layer.parameters(), *owner.parameters()}, lr=0.1, fused=True)
    with torch.no_grad():
        before = layer(x)
    layer(x).square().mean().backward()
    with torch.no_grad():
        if looked:
            torch.testing.assert_close(layer(x), before)
        step.step()
        torch.testing.assert_close(layer(x), expected(layer, x), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(layer(x), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_kept_in_train_mode(kind: str) -> None:
    layer, x = layer_of(kind).train(), torch.randn(2, 6, 9, 7)
    owner, name = place_of(layer)
    with torch.no_grad():
        layer(x)
        getattr(owner, name).data.mul_(3)
        torch.testing.assert_close(layer(x), expected(layer, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_made_by_tracers_is_kept(kind: str) -> None:
    layer, x = layer_of(kind), torch.randn(2, 6, 9, 7)
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            layer(mode.from_tensor(x))
        assert type(layer(x)) is torch.Tensor
        traced = torch.jit.trace(Whole(layer).eval(), x)  # after a run that kept its weight
        for tensor in traced.parameters():
            tensor.mul_(2)
        torch.testing.assert_close(traced(x), layer(x), rtol=1e-4, atol=1e-4)


class Whole(nn.Module):
    """A layer with its bank, as in a network."""

    def __init__(self, layer: SharedConv) -> None:
        super().__init__()
        self.layer, self.owner = layer, layer.bank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@torch.no_grad()
def test_what_is_ready_is_asked_for_again_where_anything_has_changed() -> None:
    layer, x = layer_of("composed"), torch.randn(2, 6, 9, 7)
    other = layer_of("composed")
    for _ in range(2):
        torch.testing.assert_close(layer(x), expected(layer, x), rtol=1e-4, atol=1e-4)
    assert layer._kept.ready(x) is not None and layer._kept.ready(x.to(memory_format=torch.channels_last)) is None
    layer.bank.basis.mul_(2)  # counted
    assert layer._kept.ready(x) is None
    torch.testing.assert_close(layer(x), expected(layer, x), rtol=1e-4, atol=1e-4)
    assert layer._kept.ready(x) is not None
    layer.__dict__["bank"] = other.bank
    assert layer._kept.ready(x) is None
    torch.testing.assert_close(layer(x), expected(layer, x), rtol=1e-4, atol=1e-4)
    layer.own_bias = nn.Parameter(torch.randn(8))
    torch.testing.assert_close(layer(x), expected(layer, x), rtol=1e-4, atol=1e-4)
    with torch.enable_grad():
        assert layer._kept.ready(x) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert layer._kept.ready(x) is None and layer(x).dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32
    layer.runtime = "composed"
    layer(x)
    kept = layer._kept.ready(x)[0]
    for runtime in ("factored", "composed"):
        layer.runtime = runtime
        assert layer._kept.ready(x) is None
        torch.testing.assert_close(layer(x), expected(layer, x), rtol=1e-4, atol=1e-4)
    assert layer._kept.ready(x)[0] is kept  # not made anew


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "composed"])
@torch.no_grad()
def test_parts_that_are_ready_are_asked_for_again_where_anything_has_changed(kind: str) -> None:
    layer, x = layer_of(kind), torch.randn(2, 6, 9, 7)
    owner, name = place_of(layer)
    for _ in range(2):
        torch.testing.assert_close(layer(x), expected(layer, x), rtol=1e-4, atol=1e-4)
    ready = layer._kept_parts.ready
    assert ready(x) is not None and layer._kept.ready(x) is None
    pivots = owner.pivots if layer.pivots is None else layer.pivots
    changes = [
        lambda: getattr(owner, name).mul_(2),
        lambda: setattr(layer, "own_bias", nn.Parameter(torch.randn(8))),
        lambda: setattr(layer, layer.coefficients_name, nn.Parameter(torch.randn_like(getattr(layer, layer.coefficients_name)))),
        lambda: pivots.copy_(pivots.flip(0)),
    ]
    for change in changes:
        change()
        assert ready(x) is None
        torch.testing.assert_close(layer(x), expected(layer, x), rtol=1e-4, atol=1e-4)
        assert ready(x) is not None
    kept = ready(x)
    layer.runtime = "composed"
    assert ready(x) is None
    torch.testing.assert_close(layer(x), expected(layer, x), rtol=1e-4, atol=1e-4)
    assert ready(x) is None and layer._kept.ready(x) is not None
    layer.runtime = "factored"
    torch.testing.assert_close(layer(x), expected(layer, x), rtol=1e-4, atol=1e-4)
    assert ready(x) is kept and layer._kept.ready(x) is None  # not made anew
    layer.train()
    assert layer._kept_parts.ready(x) is None
    layer(x)
    assert layer._kept_parts.ready(x) is None


def test_own_filters_beside_a_bank_are_not_kept_once_more() -> None:
    """Put together they are a copy of the bank, which is there once for all layers."""
    form = form_of(nn.Conv2d(6, 8, 3, padding=1))
    bank = Bank({"basis": torch.randn(4, 6, 3, 3)}, uses=1)
    layer, x = BasisConv(form, torch.randn(8, 6), bank, unique=torch.randn(2, 6, 3, 3)).eval(), torch.randn(2, 6, 9, 7)
    layer.runtime = "factored"
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected(layer, x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer(x), expected(layer, x), rtol=1e-4, atol=1e-4)
    assert layer._kept_parts.ready(x) is None and not layer.keeps_parts


def test_a_kept_weight_lies_in_the_order_of_the_images() -> None:
    """Else every run puts it in order once more, which takes as long as a convolution of small maps."""
    layer, x = layer_of("composed"), torch.randn(2, 6, 9, 7)
    seen = []
    run = layer.form.run

    class Watching:
        def __getattr__(self, name: str) -> object:
            return getattr(form, name)

        def run(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, size: None = None) -> torch.Tensor:
            seen.append(weight)
            return run(x, weight, bias, size)

    form, layer.form = layer.form, Watching()  # type: ignore[assignment]
    orders = (torch.contiguous_format, torch.channels_last)
    with torch.no_grad():
        outputs = [layer(x.contiguous(memory_format=order)) for order in orders for _ in range(2)]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])
    assert all(weight.is_contiguous(memory_format=orders[index // 2]) for index, weight in enumerate(seen))
    assert seen[0] is seen[1] and seen[2] is seen[3]  # kept, not made anew


@pytest.mark.parametrize("kind", KINDS)
def test_layers_run_within_vmap(kind: str) -> None:
    layer, x = layer_of(kind), torch.randn(3, 2, 6, 9, 7)
    with torch.no_grad():
        found = torch.func.vmap(layer)(x)
        torch.testing.assert_close(found, torch.stack([layer(part) for part in x]))
        torch.testing.assert_close(torch.func.vmap(layer)(x), found)
