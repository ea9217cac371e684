"""Shared layers: right for every geometry, one copy of the bank, safe under everything that users do to modules."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn

from sharefold.errors import SharefoldError
from sharefold.layers import (
    Bank,
    BasisConv,
    CodebookConv,
    HybridConv,
    SpatialConv,
    TiedConv,
    TuckerConv,
    add_bank,
    banks,
    form_of,
    replace_module,
    shared_layers,
    stray_pointers,
    to_dense,
    weight_matrix,
    with_pivots,
)  # fmt: skip


def conv_variants():
    return st.builds(
        dict,
        kernel=st.sampled_from([(1, 1), (3, 3), (3, 5), (2, 2)]),
        stride=st.sampled_from([1, 2]),
        padding=st.sampled_from([0, 1, 2, (1, 2), "same", "valid"]),
        dilation=st.sampled_from([1, 2]),
        groups=st.sampled_from([1, 2, 4]),
        padding_mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
        bias=st.booleans(),
    )


def _conv(v) -> nn.Conv2d:
    stride = 1 if v["padding"] == "same" else v["stride"]
    return nn.Conv2d(8, 12, v["kernel"], stride, v["padding"], v["dilation"], v["groups"], v["bias"], v["padding_mode"])


def _full_rank(conv: nn.Module) -> BasisConv:
    """A basis layer whose basis spans every filter, so that it must compute what ``conv`` does."""
    form = form_of(conv)
    weight = form.standardized(conv.weight.detach(), None).reshape(form.weight_shape)
    features = form.features
    basis = torch.linalg.qr(torch.randn(features, features)).Q
    bank = Bank({"basis": basis.reshape(features, *form.weight_shape[1:])}, uses=1)
    return BasisConv(form, weight.reshape(form.out_channels, -1) @ basis.T, bank, bias=conv.bias,
                     gain=getattr(conv, "gain", None)).eval()


@settings(max_examples=60, deadline=None)
@given(conv_variants())
def test_basis_conv_equals_conv_in_both_forms(variant):
    torch.manual_seed(0)
    conv = _conv(variant).eval()
    x = torch.randn(2, 8, 13, 11)
    layer = _full_rank(conv)
    for runtime in ("composed", "factored"):
        layer.runtime = runtime
        with torch.no_grad():
            torch.testing.assert_close(layer(x), conv(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.dense()(x), conv(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [
    lambda: Conv2dSame(8, 12, 3, stride=2), lambda: StdConv2d(8, 12, 3, stride=2, padding=1, bias=True),
    lambda: StdConv2dSame(8, 12, 3, stride=2), lambda: ScaledStdConv2d(8, 12, 3, padding=1),
    lambda: ScaledStdConv2dSame(8, 12, 3, stride=2, padding="same"), lambda: nn.Linear(8, 12),
])  # fmt: skip
def test_special_classes_are_matched(make):
    module = make().eval()
    if hasattr(module, "gain"):
        nn.init.normal_(module.gain)
    x = torch.randn(2, 9, 8) if isinstance(module, nn.Linear) else torch.randn(2, 8, 13, 10)
    layer = _full_rank(module)
    # Standardising a standardised weight is exact but for eps (1e-6 against a variance of 5e-3 here).
    close = {"rtol": 1e-3, "atol": 5e-3}
    with torch.no_grad():
        torch.testing.assert_close(layer(x), module(x), **close)
        dense = layer.dense()
        assert type(dense) is type(module)
        torch.testing.assert_close(dense(x), layer(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(weight_matrix(module), weight_matrix(layer), **close)


def test_spatial_conv_equals_its_composition_for_strides_and_dilation():
    conv = nn.Conv2d(6, 10, (3, 5), stride=(2, 1), padding=(1, 4), dilation=(1, 2))
    form = form_of(conv)
    layer = SpatialConv(form, torch.randn(4, 6, 3, 1), torch.randn(10, 4, 1, 5), bias=conv.bias).eval()
    x = torch.randn(2, 6, 12, 14)
    layer.runtime = "factored"
    factored = layer(x)
    layer.runtime = "composed"
    torch.testing.assert_close(factored, layer(x), rtol=1e-4, atol=1e-4)
    filters, coefficients = layer.linear_part()
    torch.testing.assert_close((coefficients @ filters.flatten(1)).reshape(layer.weight.shape), layer.weight)


@settings(max_examples=40, deadline=None)
@given(conv_variants().filter(lambda v: v["groups"] == 1 and v["kernel"] != (1, 1)))
def test_tucker_conv_equals_its_composition_in_both_forms(variant):
    torch.manual_seed(0)
    conv = _conv(variant)
    form = form_of(conv)
    bank = Bank({"projection": torch.randn(5, 8), "basis": torch.randn(7, 5, *form.kernel_size)}, uses=1)
    layer = TuckerConv(form, torch.randn(12, 7), bank, bias=conv.bias).eval()
    expected = torch.einsum("or,rjhw,ji->oihw", layer.coefficients, bank.basis, bank.projection)
    torch.testing.assert_close(layer.weight, expected, rtol=1e-4, atol=1e-4)
    x = torch.randn(2, 8, 13, 11)
    for runtime in ("composed", "factored"):
        layer.runtime = runtime
        with torch.no_grad():
            torch.testing.assert_close(layer(x), layer.dense()(x), rtol=1e-4, atol=1e-3)
    filters, coefficients = layer.linear_part()
    torch.testing.assert_close((coefficients @ filters.flatten(1)).reshape(layer.weight.shape), layer.weight)


def test_basis_absorbs_its_norm_exactly_in_eval_and_normalises_in_train():
    form = form_of(nn.Conv2d(6, 8, 3, padding=1, bias=False))
    norm = nn.BatchNorm2d(5)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    bank = Bank({"basis": torch.randn(3, 6, 3, 3)}, uses=2)
    layer = BasisConv(form, torch.randn(8, 5), bank, unique=torch.randn(2, 6, 3, 3), norm=norm)
    x = torch.randn(4, 6, 7, 7)
    responses = torch.cat([nn.functional.conv2d(x, layer.unique, padding=1),
                           nn.functional.conv2d(x, bank.basis, padding=1)], 1)
    layer.eval()
    expected = torch.einsum("or,brhw->bohw", layer.coefficients, norm(responses))
    for runtime in ("composed", "factored"):
        layer.runtime = runtime
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    layer.train()
    before = norm.running_mean.clone()
    layer(x)
    assert not torch.equal(before, norm.running_mean), "in train mode the BatchNorm must see the responses"


@pytest.mark.parametrize("kind", ["bank", "own", "spatial", "linear"])
def test_pivoted_factors_are_the_same_layer_with_fewer_numbers(kind):
    dense = nn.Linear(12, 8) if kind == "linear" else nn.Conv2d(6, 8, 3, padding=1)
    form, rank = form_of(dense), 5
    size = 18 if kind == "spatial" else form.features
    free, pivots = torch.randn(rank, size - rank), torch.randperm(size)[:rank].sort().values.int()
    rows = with_pivots(free, pivots)
    coefficients = torch.randn(8, rank)
    if kind == "spatial":
        rest = torch.randn(8, rank, 1, 3)
        layer = SpatialConv(form, free, rest, bias=dense.bias, pivots=pivots)
        plain = SpatialConv(form, rows.reshape(rank, 6, 3, 1), rest, bias=dense.bias)
    elif kind == "own":
        layer = BasisConv(form, coefficients, unique=free, pivots=pivots, bias=dense.bias)
        plain = BasisConv(form, coefficients, unique=rows.reshape(rank, 6, 3, 3), bias=dense.bias)
    else:
        layer = BasisConv(form, coefficients, Bank({"basis": free, "pivots": pivots}, uses=1), bias=dense.bias)
        plain = BasisConv(form, coefficients, Bank({"basis": rows.reshape(rank, *form.weight_shape[1:])}, 1), bias=dense.bias)
    x = torch.randn(2, 12) if kind == "linear" else torch.randn(2, 6, 9, 7)
    assert count(plain) - count(layer) == rank**2
    for runtime in ("composed", "factored"):
        layer.runtime = plain.runtime = runtime
        for mode in (True, False):
            torch.testing.assert_close(layer.train(mode)(x), plain.train(mode)(x), rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            first = layer(x)
            assert torch.equal(layer(x), first), "kept filters must be those that were made"
            (free_of(layer)).mul_(1.5)
            assert not torch.allclose(layer(x), first), "kept filters must follow their source"
            (free_of(layer)).div_(1.5)
    for mine, its in zip(layer.linear_part(), plain.linear_part(), strict=True):
        torch.testing.assert_close(mine, its)
    layer(x).square().sum().backward()
    assert bool((free_of(layer).grad != 0).any())


def free_of(layer):
    return layer.vertical if isinstance(layer, SpatialConv) else layer.bank.basis if layer.bank else layer.unique


def count(layer):
    owners = [layer] if layer.bank is None else [layer, layer.bank]
    return sum(p.numel() for owner in owners for p in owner.parameters())


def test_entries_that_point_to_nothing_are_found(net):
    assert stray_pointers(net) == []
    net.body[4].codes[0, 0] = 16
    assert stray_pointers(net) == ["body.4.codes"]
    bank = add_bank(net, "stage.3", Bank({"basis": torch.randn(2, 5), "pivots": torch.tensor([1, 6])}, uses=1))
    assert stray_pointers(net) == ["body.4.codes"]
    for wrong in ([1, 7], [-1, 2], [3, 3]):
        bank.pivots = torch.tensor(wrong)
        assert stray_pointers(net)[1:] == ["sharefold_banks.stage_3.pivots"]


class Net(nn.Module):
    """Three members of each kind over two banks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(5)])
        form = form_of(self.body[0])
        shared = add_bank(self, "stage.0", Bank({"basis": torch.randn(6, 8, 3, 3) / 8}, uses=2))
        tied = add_bank(self, "stage.1", Bank({"weight": torch.randn(8, 8, 3, 3) / 8}, uses=2))
        book = add_bank(self, "stage.2", Bank({"codebook": torch.randn(16, 9) / 3}, uses=1))
        for i in range(2):
            replace_module(self, f"body.{i}", BasisConv(form, torch.randn(8, 6), shared, bias=torch.randn(8)))
        replace_module(self, "body.2", TiedConv(form, tied, scale=torch.rand(8)))
        replace_module(self, "body.3", TiedConv(form, tied))
        codes = torch.randint(0, 16, (8, 8), dtype=torch.uint8)
        replace_module(self, "body.4", CodebookConv(form, book, codes, scale=torch.rand(8)))

    def forward(self, x):
        return self.body(self.stem(x)).mean((2, 3))


@pytest.fixture
def net() -> Net:
    return Net().eval()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


def test_state_dict_holds_each_shared_tensor_once(net):
    names = list(net.state_dict())
    assert [n for n in names if "basis" in n] == ["sharefold_banks.stage_0.basis"]
    pointers = [t.data_ptr() for t in net.state_dict().values()]
    assert len(pointers) == len(set(pointers))
    assert sum(p.numel() for p in net.parameters()) == sum(t.numel() for t in net.state_dict().values()
                                                          if t.is_floating_point())


def test_deepcopy_and_pickle_keep_the_sharing_and_separate_the_copies(net, image):
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin.body[0].bank is twin.body[1].bank is banks(twin)["stage_0"]
        assert twin.body[0].bank is not net.body[0].bank
        torch.testing.assert_close(twin(image), net(image), rtol=0, atol=0)
        with torch.no_grad():
            banks(twin)["stage_0"].basis.mul_(2)
        assert not torch.allclose(twin(image), net(image))


def test_cache_follows_every_change(net, image):
    with torch.no_grad():
        first = net(image)
        assert net.body[0]._kept._entry is not None
        banks(net)["stage_0"].basis.add_(0.1)
        second = net(image)
        assert not torch.allclose(first, second)
        state = {k: v * 1.5 if v.is_floating_point() else v for k, v in net.state_dict().items()}
        net.load_state_dict(state)
        third = net(image)
        assert not torch.allclose(second, third)
    fresh = copy.deepcopy(net)
    with torch.no_grad():
        torch.testing.assert_close(fresh(image), third, rtol=0, atol=0)


def test_gradients_reach_bank_and_coefficients_in_train_and_eval(net, image):
    for mode in (True, False):
        net.train(mode).zero_grad()
        net(image).square().sum().backward()
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_dtype_memory_format_and_autocast(net, image):
    with torch.no_grad():
        expected = net(image)
        torch.testing.assert_close(copy.deepcopy(net).double()(image.double()).float(), expected, rtol=1e-4, atol=1e-4)
        last = copy.deepcopy(net).to(memory_format=torch.channels_last)
        torch.testing.assert_close(last(image.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = net(image)
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(net(image), expected, rtol=0, atol=0)
        torch.testing.assert_close(low.float(), expected, rtol=0.1, atol=0.2)


def test_training_under_autocast_rounds_the_weight_once(net, image):
    layer = net.body[0].train()
    x = torch.randn(2, layer.form.in_channels, 8, 8).to(memory_format=torch.channels_last)
    with torch.no_grad():
        bias = None if layer.bias is None else layer.bias.bfloat16()
        expected = layer.form.apply(x.bfloat16(), layer.compose().bfloat16(), bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
    found.float().square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert layer.coefficients.grad.dtype == torch.float32 and layer.coefficients.grad.abs().sum() > 0


def test_fx_trace_and_export_see_one_bank(net, image):
    traced = torch.fx.symbolic_trace(net)
    torch.testing.assert_close(traced(image), net(image), rtol=1e-5, atol=1e-5)
    exported = torch.export.export(net, (image,))
    torch.testing.assert_close(exported.module()(image), net(image), rtol=1e-5, atol=1e-5)
    assert sum("basis" in name for name in exported.state_dict) == 1


def test_to_dense_is_the_same_function_without_a_bank(net, image):
    dense = to_dense(net)
    assert not shared_layers(dense) and not banks(dense)
    assert all(type(m) is nn.Conv2d for m in dense.body)
    torch.testing.assert_close(dense(image), net(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["basis", "spatial", "hybrid"])
def test_batchnorms_are_merged_as_into_any_convolution(kind):
    """As torch's and ultralytics' fusing does: ``conv.weight, conv.bias = fused(...)``."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2), norm.weight.data.normal_(), norm.bias.data.normal_()
    form, mix = form_of(conv), torch.randn(6, 3)
    layer = {
        "basis": lambda: BasisConv(form, mix, unique=torch.randn(3, 4, 3, 3)),
        "spatial": lambda: SpatialConv(form, torch.randn(3, 4, 3, 1), torch.randn(6, 3, 1, 3)),
        "hybrid": lambda: HybridConv(
            form, torch.randn(6, 8), Bank({"basis": torch.randn(2, 4, 3, 3)}, uses=1), vertical=torch.randn(2, 4, 3, 1)
        ),
    }[kind]().eval()
    norm.eval()
    images = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = norm(layer(images))
        layer.weight, layer.bias = nn.utils.fusion.fuse_conv_bn_weights(
            layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        torch.testing.assert_close(layer(images), expected, rtol=1e-4, atol=1e-4)
    state = layer.state_dict()
    assert "weight" not in state and "own_bias" in state
    before = {name: value.clone() for name, value in state.items()}
    with pytest.raises(SharefoldError, match="only multiples of its filters"):
        layer.weight = nn.Parameter(torch.randn(6, 4, 3, 3))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def own_filters(dtype=torch.float32):
    torch.manual_seed(0)
    layer = BasisConv(form_of(nn.Conv2d(4, 6, 3)), torch.randn(6, 3), unique=torch.randn(3, 4, 3, 3))
    return layer.to(dtype)


def test_a_weight_is_set_filter_by_filter_and_in_the_precision_of_its_type():
    layer = own_filters()
    kept = layer.coefficients.detach().clone()
    large, nan = layer.weight.detach().clone(), layer.weight.detach() * float("nan")
    large[0].mul_(1e4), large[1].normal_()
    for weight in (large, nan):
        with pytest.raises(SharefoldError, match="only multiples of its filters"):
            layer.weight = nn.Parameter(weight)
        assert torch.equal(layer.coefficients, kept)
    rough = own_filters(torch.bfloat16)
    expected = rough.weight.float() * 1.7
    rough.weight = nn.Parameter((rough.weight * 1.7).detach())
    torch.testing.assert_close(rough.weight.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("bias", [nn.Parameter(torch.zeros(1)), torch.zeros(3), 0.5])
def test_a_bias_of_another_shape_is_refused(bias):
    layer = own_filters()
    with pytest.raises(SharefoldError, match="give a tensor of 6 numbers, or None"):
        layer.bias = bias
    assert layer.own_bias is None


def test_float64_is_left_alone_by_autocast():
    layer = own_filters(torch.float64).train()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 4, 8, 8, dtype=torch.float64)).dtype == torch.float64


def test_layers_pickled_before_they_could_be_given_a_weight_run():
    layer = own_filters()
    old = pickle.loads(pickle.dumps(layer))
    old.__dict__.pop("given", None)
    assert old(torch.randn(1, 4, 8, 8)).shape == (1, 6, 6, 6)
