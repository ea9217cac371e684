"""Method fold: networks that really shrink, the answers of their expansion, files, budgets."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import networks
import pytest
import timm
import torch
from hidden_nets import VGG, Excited, Head
from torch import Tensor, nn

import sharefold
from sharefold.errors import SharefoldError
from sharefold.graph.hidden_channels import hidden_spaces
from sharefold.layers.width import give_columns, give_rows, take_columns, take_rows
from sharefold.measure import agreement, count_macs, count_parameters
from sharefold.methods import FOLD
from sharefold.methods.fold import FEWEST, as_bits
from sharefold.models.cifar_resnet import CifarResNet
from sharefold.plans import GroupPlan, Plan


def trained_like(model: nn.Module, size: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return networks.trained_like(model, size, 32)


def images(size: int = 16, count: int = 40) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


NETWORKS = {
    "excited": lambda: Head(nn.Sequential(Excited(), Excited())),
    "basic": lambda: CifarResNet(2, num_classes=4),
    "vgg": lambda: copy.deepcopy(VGG),
    "inverted": lambda: timm.create_model("mobilenetv2_035", num_classes=4),
    "convnext": lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=4),
    "dense": lambda: timm.create_model("densenet121", growth_rate=4, block_config=(2, 2, 2, 2), num_classes=4),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_shrinks_saves_loads_and_expands(name: str, tmp_path: Path) -> None:
    size = 32 if name in ("inverted", "convnext", "dense") else 16
    model = trained_like(NETWORKS[name](), size)
    dense, x = copy.deepcopy(model), images(size)
    before, classes = count_parameters(model), {n: type(m) for n, m in model.named_modules()}
    cal = sharefold.calibrate(model, x)
    plan = sharefold.plan(model, "85%", cal, method="fold")
    assert {group.method for group in plan.groups} == {"fold"}
    modules = dict(model.named_modules())
    done = sharefold.convert_(model, plan, cal, repair=False)
    assert count_parameters(model) == plan.params_after == done.plan.params_after <= 0.85 * before
    assert count_macs(model, x[:1]) < count_macs(dense, x[:1])
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert all(modules[n] is m for n, m in model.named_modules())  # the user's own modules
    for group in plan.groups:
        layer = model.get_submodule(group.members[0])
        assert len(layer.weight) == group.options["keep"] == getattr(layer, "out_channels", getattr(layer, "out_features", 0))
    sharefold.save(model, tmp_path / "folded.safetensors")
    loaded = sharefold.load(tmp_path / "folded.safetensors", model=copy.deepcopy(dense))
    whole = sharefold.expand(model)
    assert {n: t.shape for n, t in whole.state_dict().items()} == {n: t.shape for n, t in dense.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(loaded(x), expected)
        torch.testing.assert_close(whole(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_space_is_the_least_squares_of_its_reader() -> None:
    """Against the dense network's own activations: slice the writer, solve the reader by lstsq."""
    model = trained_like(CifarResNet(2, num_classes=4))
    cal = sharefold.calibrate(model, images())
    space = next(s for s in hidden_spaces(model, cal.graph)[0] if s.writer == "layer3.0.conv1")
    options = {"keep": 40, "channels": 64, "through": list(space.through), "readers": list(space.readers)}
    group = GroupPlan("one", "fold", (space.writer,), options)
    before = count_parameters(model)
    done = sharefold.convert_(model, Plan([group], before, before), cal, repair=False)
    found = done.plan.groups[0]
    kept = [c for c in range(64) if int(found.options["kept"][0], 16) >> c & 1]
    assert len(kept) == 40
    writer, reader = done.original.get_submodule(space.writer), done.original.get_submodule(space.readers[0])
    assert torch.equal(model.get_submodule(space.writer).weight, writer.weight[kept])  # type: ignore[index]
    moment = cal.statistics.moments(space.readers)[space.readers[0]][0].double()
    weight = reader.weight.flatten(1).double()  # type: ignore[union-attr,operator]
    mine = torch.tensor([c * 9 + k for c in kept for k in range(9)])
    best = torch.linalg.solve(moment[mine][:, mine], moment[mine] @ weight.T).T
    torch.testing.assert_close(model.get_submodule(space.readers[0]).weight.flatten(1).double(), best, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr,operator]
    change = weight.clone()
    change[:, mine] -= best
    rows = cal.graph.layers[space.readers[0]].norm
    norm = done.original.get_submodule(str(rows))
    scale = norm.weight.double().square() / (norm.running_var.double() + norm.eps)  # type: ignore[union-attr,operator]
    error = (((change @ moment) * change).sum(1) @ scale) / (((weight @ moment) * weight).sum(1) @ scale)
    assert found.error == pytest.approx(float(error), rel=1e-3)
    # the mean of the reader's output is what it was
    lost = change @ cal.statistics.means[space.readers[0]][0].double()
    torch.testing.assert_close(
        model.get_submodule(str(rows)).running_mean.double(), norm.running_mean.double() - lost, rtol=1e-4, atol=1e-5  # type: ignore[union-attr,operator]
    )  # fmt: skip


def test_all_readers_make_up_and_nothing_is_lost_that_is_a_copy() -> None:
    model = trained_like(Head(Excited()))
    body = model.body
    with torch.no_grad():  # channel 7 becomes channel 2 everywhere
        for module in (body.expand, body.norm, body.act, body.depthwise, body.excite):
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.dim() and len(tensor) == 12:
                    tensor[7] = tensor[2]
    cal = sharefold.calibrate(model, images(count=200))
    space = hidden_spaces(model, cal.graph)[0][0]
    options = {key: list(getattr(space, key)) for key in ("gates", "through", "readers")}
    group = GroupPlan("one", "fold", ("body.expand",), {"keep": 11, "channels": 12, **options})
    total = count_parameters(model)
    dense = copy.deepcopy(model)
    done = sharefold.convert_(model, Plan([group], total, total), cal, repair=False)
    assert set(range(12)) - {c for c in range(12) if int(done.plan.groups[0].options["kept"][0], 16) >> c & 1} in ({2}, {7})
    assert body.depthwise.groups == body.depthwise.in_channels == body.norm.num_features == body.act.num_parameters == 11
    assert body.excite.out_channels == body.reduce.in_channels == body.project.in_channels == 11
    with torch.no_grad():
        torch.testing.assert_close(model(images()), dense(images()), rtol=1e-2, atol=1e-3)


def test_budgets_rounding_exclusion_and_frozen_flags() -> None:
    model = trained_like(CifarResNet(2, num_classes=4))
    for parameter in model.layer2.parameters():
        parameter.requires_grad_(False)
    cal = sharefold.calibrate(model, images())
    plan = sharefold.plan(model, "60% MACs", cal, method="fold", round_channels=8, exclude="layer1.0.conv2")
    assert all(group.options["keep"] % 8 == 0 for group in plan.groups)
    assert "layer1.0.conv1" not in {name for group in plan.groups for name in group.members}
    dense = copy.deepcopy(model)
    sharefold.convert_(model, plan, cal, repair=False)
    assert count_macs(model, images()[:1]) <= 0.6 * count_macs(dense, images()[:1])
    assert model.layer1[0].conv1.weight.shape == dense.layer1[0].conv1.weight.shape
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {n: p.requires_grad for n, p in dense.named_parameters()}
    with pytest.raises(SharefoldError, match=r"the floor is .* parameters"):
        sharefold.plan(dense, "5%", cal, method="fold")


def test_folds_come_first_and_others_share_what_is_left(tmp_path: Path) -> None:
    model = trained_like(CifarResNet(2, num_classes=4))
    dense, cal = copy.deepcopy(model), sharefold.calibrate(model, images())
    folds = sharefold.plan(model, "80%", cal, method="fold")
    width = {group.members[0]: group.options["keep"] for group in folds.groups}
    both = next(iter(width))
    svd = GroupPlan("s", "svd", (both,), {"rank": 2})
    plan = Plan([svd, *folds.groups], folds.params_before, 0)
    plan = Plan.from_json(plan.to_json())
    sharefold.convert_(model, plan, cal)
    assert model.get_submodule(both).form.out_channels == width[both]
    sharefold.save(model, tmp_path / "both")
    loaded, whole = sharefold.load(tmp_path / "both", model=copy.deepcopy(dense)), sharefold.expand(model)
    with torch.no_grad():
        assert torch.equal(loaded(images()), model(images()))
        torch.testing.assert_close(whole(images()), model(images()), rtol=1e-4, atol=1e-4)
    assert {n: t.shape for n, t in whole.state_dict().items()} == {n: t.shape for n, t in dense.state_dict().items()}


def test_repairs_and_refinement_run_on_folded_networks() -> None:
    model = trained_like(CifarResNet(2, num_classes=4))
    cal = sharefold.calibrate(model, images())
    done = sharefold.convert_(model, sharefold.plan(model, "70%", cal, method="fold"), cal, refine=1)
    assert agreement(done.original, model, images()).kl < 1
    assert set(done.steps) >= {"scale", "refit", "norms", "head", "refine"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": FEWEST - 1}, "keep must be 2 to 64"),
        ({"keep": 65}, "keep must be 2 to 64"),
        ({"keep": "many"}, "both integers"),
        ({"channels": 32}, "64 channels there, not 32"),
        ({"readers": ["layer9"]}, "does not have"),
        ({"readers": []}, "needs readers"),
        ({"kept": ["zz"]}, "hexadecimal"),
        ({"kept": ["ff"]}, "does not hold 30 channels"),
        ({"kept": as_bits(torch.arange(40, 70), 70)}, "does not hold 30 channels of 64"),
    ],
)
def test_plans_that_do_not_fit_say_so(change: dict[str, object], message: str) -> None:
    model = trained_like(CifarResNet(2, num_classes=4))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    options = {"keep": 30, "channels": 64, "through": ["layer3.0.bn1"], "readers": ["layer3.0.conv2"], **change}
    plan = Plan([GroupPlan("one", "fold", ("layer3.0.conv1",), options)], 0, 0)
    with pytest.raises(SharefoldError, match=message):
        sharefold.convert_(model, plan, images())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.raises(SharefoldError, match="takes one layer"):
        FOLD.check(model, replace(plan.groups[0], members=("layer3.0.conv1", "conv1")))


@pytest.mark.parametrize(
    "module", [nn.Conv2d(6, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(5, 8), nn.BatchNorm2d(8), nn.PReLU(8)]
)
def test_rows_come_back_where_they_were(module: nn.Module) -> None:
    before, kept = copy.deepcopy(module), torch.tensor([0, 3, 4])
    take_rows(module, kept, 8)
    shapes = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    give_rows(module, kept, 8)
    for name, tensor in module.state_dict().items():
        old = before.state_dict()[name]
        assert tensor.shape == old.shape
        if tensor.dim():
            assert shapes[name][0] == 3 and torch.equal(tensor[kept], old[kept])
    assert repr(module) == repr(before)


def test_columns_come_back_where_they_were() -> None:
    layer = nn.Conv2d(8, 4, 3)
    old = layer.weight.detach().clone()
    take_columns(layer, torch.tensor([1, 6]))
    assert layer.in_channels == 2 and layer(torch.randn(1, 2, 5, 5)).shape == (1, 4, 3, 3)
    give_columns(layer, torch.tensor([1, 6]), 8)
    assert torch.equal(layer.weight[:, [1, 6]], old[:, [1, 6]]) and not layer.weight[:, [0, 2, 3, 4, 5, 7]].any()
