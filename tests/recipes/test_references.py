"""The reference networks themselves: equal to a dense network with equal weights, and of the published size.

A reference is handed a state dict that records what is read. What it reads, with the shared tensors, must be
exactly the published parameter count: so it shares just the layers that the paper shares.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import references as ref
import timm
import torch
import torchvision
from torch import Tensor, nn

import sharefold.models  # noqa: F401  (registers the CIFAR networks)

SYSTEMS = json.loads((Path(__file__).parent / "systems.json").read_text())


class Recording(dict[str, Tensor]):
    """State dict that remembers the entries read."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__(state)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.read.add(key)
        return super().__getitem__(key)

    def trainable(self) -> int:
        return sum(self[key].numel() for key in set(self.read) if not key.endswith(("running_mean", "running_var")))


def published(system: str, source: str, classes: int = 10, **options: object) -> int:
    for entry in SYSTEMS[system]:
        if entry["source"] == source and entry["classes"] == classes and entry.get("options", {}) == options:
            return int(entry["after"])
    raise LookupError(source)


def build(source: str, classes: int = 10) -> nn.Module:
    """Random network in eval mode with BatchNorms that do something."""
    library, name = source.split(":")
    if library == "tv":
        model = torchvision.models.get_model(name, weights=None)
    else:
        model = timm.create_model(name, num_classes=classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def tie(model: nn.Module, names: list[str]) -> Tensor:
    """Give all convolutions named the first one's weight."""
    weight = model.get_submodule(names[0]).weight.data
    for name in names[1:]:
        assert model.get_submodule(name).weight.shape == weight.shape
        model.get_submodule(name).weight.data.copy_(weight)
    return weight


def depth(model: nn.Module, stage: int) -> int:
    return len(model.get_submodule(f"layer{stage}"))


def compare(logits: Tensor, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected = model(x)
    assert expected.std() > 1e-3
    assert torch.allclose(logits, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_recording_counts_only_what_is_read() -> None:
    state = Recording({"a.weight": torch.zeros(3), "b.weight": torch.zeros(5), "a.running_mean": torch.zeros(7)})
    _ = state["a.weight"], state["a.running_mean"]
    assert state.trainable() == 3


@pytest.mark.parametrize("classes", [10, 100])
def test_kernel_sharing_convmixer(classes: int) -> None:
    source = "timm:convmixer_256_16_cifar"
    model, x = build(source, classes), torch.randn(1, 3, 6, 6)
    first = model.blocks[0]
    shared = [first[0].fn[0].weight, first[0].fn[0].bias, first[1].weight, first[1].bias]
    for block in model.blocks:
        for tensor, value in zip(
            (block[0].fn[0].weight, block[0].fn[0].bias, block[1].weight, block[1].bias), shared, strict=True
        ):
            tensor.data.copy_(value.data)
    state = Recording(model.state_dict())
    with torch.no_grad():
        logits = ref.kernel_sharing_convmixer(x, state, *shared)
    compare(logits, model, x)
    count = state.trainable() + sum(t.numel() for t in shared)
    assert count == published("kernel-sharing", source, classes)


@pytest.mark.parametrize(
    ("layers", "stages", "count"),
    [
        (14, (1, 2, 3), 1_223_002),
        (14, (), 2_771_290),
        (14, (1,), 2_697_562),
        (14, (2,), 2_476_378),
        (14, (3,), 1_591_642),
        (14, (2, 3), 1_296_730),
        (20, (1, 2, 3), 1_235_546),
        (26, (2, 3), 1_469_274),
        (38, (1, 2, 3), 1_273_178),
    ],
)
def test_kernel_sharing_se_resnet(layers: int, stages: tuple[int, ...], count: int) -> None:
    model, x = build(f"timm:se_resnet{layers}_cifar"), torch.randn(1, 3, 16, 16)
    shared = {
        s: tie(
            model,
            [f"layer{s}.{i}.conv2" for i in range(depth(model, s))]
            + [f"layer{s}.{i}.conv1" for i in range(1, depth(model, s))],
        )
        for s in stages
    }
    state = Recording(model.state_dict())
    compare(ref.kernel_sharing_se_resnet(x, state, shared), model, x)
    assert state.trainable() + sum(t.numel() for t in shared.values()) == count


@pytest.mark.parametrize(
    ("source", "classes"),
    [
        ("tv:resnet18", 1000),
        ("tv:resnet34", 1000),
        ("tv:resnet50", 1000),
        ("tv:resnet101", 1000),
        ("timm:resnet164_cifar", 10),
        ("timm:wrn_40_4_cifar", 10),
        ("timm:wrn_28_10_cifar", 100),
    ],
)
def test_sharesnet(source: str, classes: int) -> None:
    model = build(source, classes)
    x = torch.randn(1, 3, 64, 64) if source.startswith("tv:") else torch.randn(1, 3, 8, 8)
    if source in ("tv:resnet18", "tv:resnet34"):
        function, stages, first = ref.sharesnet_basic, (1, 2, 3, 4), {1: 0, 2: 0, 3: 0, 4: 0}
    elif source.startswith("tv:"):
        function, stages, first = ref.sharesnet_bottleneck, (1, 2, 3, 4), {1: 0, 2: 1, 3: 1, 4: 1}
    else:
        function, stages, first = ref.sharesnet_preact, (1, 2, 3), {1: 1, 2: 1, 3: 1}
    shared = {s: tie(model, [f"layer{s}.{i}.conv2" for i in range(first[s], depth(model, s))]) for s in stages}
    state = Recording(model.state_dict())
    compare(function(x, state, shared), model, x)
    count = state.trainable() + sum(t.numel() for t in shared.values())
    assert count == published("sharesnet", source, classes)


def replace_by_bases(
    model: nn.Module, stages: tuple[int, ...], s_first: int, u_first: int, two: bool
) -> tuple[dict[int, tuple[Tensor, ...]], dict[str, ref.BasisMember]]:
    """Random bases; every dense convolution concerned becomes the kernel that its member composes to.

    The inner norm is absorbed by the coefficients; its shift becomes a shift of the BatchNorm that follows.
    """
    bases, members = {}, {}
    for stage in stages:
        width = model.get_submodule(f"layer{stage}.1.conv1").in_channels
        s, u = s_first * 2 ** (stage - 1), u_first * 2 ** (stage - 1)
        bases[stage] = tuple(torch.randn(s, width, 3, 3) * 0.05 for _ in range(2 if two else 1))
        for i in range(1, depth(model, stage)):
            for layer, basis in (("conv1", bases[stage][0]), ("conv2", bases[stage][-1])):
                n = s + u
                norm = ref.BatchNorm(torch.rand(n) + 0.5, torch.randn(n), torch.randn(n), torch.rand(n) + 0.5)
                member = ref.BasisMember(torch.randn(u, width, 3, 3) * 0.05, norm, torch.randn(width, n, 1, 1) * 0.1)
                name = f"layer{stage}.{i}.{layer}"
                members[name] = member
                scale = norm.weight / (norm.var + norm.eps).sqrt()
                mixing = member.coefficients[:, :, 0, 0]
                filters = torch.cat((member.unique, basis)).flatten(1)
                kernel = (mixing * scale) @ filters
                model.get_submodule(name).weight.data.copy_(kernel.view(width, width, 3, 3))
                outer = model.get_submodule(name.replace("conv", "bn"))
                outer.running_mean.sub_(mixing @ (norm.bias - norm.mean * scale))
    return bases, members


@pytest.mark.parametrize(
    ("source", "shared", "unique", "bases"),
    [
        ("tv:resnet34", 32, 1, 1),
        ("tv:resnet34", 48, 1, 2),
        ("timm:resnet32_cifar", 8, 1, 1),
        ("timm:resnet32_cifar", 16, 1, 1),
        ("timm:resnet32_cifar", 16, 1, 2),
        ("timm:resnet56_cifar", 16, 1, 1),
        ("timm:resnet56_cifar", 16, 1, 2),
    ],
)
def test_filter_bases(source: str, shared: int, unique: int, bases: int) -> None:
    classes = 1000 if source.startswith("tv:") else 10
    model = build(source, classes)
    untouched = Recording({key: value.clone() for key, value in model.state_dict().items()})
    stages = (1, 2, 3, 4) if source.startswith("tv:") else (1, 2, 3)
    tensors, members = replace_by_bases(model, stages, shared, unique, bases == 2)
    x = torch.randn(1, 3, 64, 64) if source.startswith("tv:") else torch.randn(1, 3, 16, 16)
    compare(ref.filter_bases(x, untouched, tensors, members), model, x)
    count = untouched.trainable() + sum(t.numel() for pair in tensors.values() for t in pair)
    for member in members.values():
        parts = (member.unique, member.coefficients, member.norm.weight, member.norm.bias)
        count += sum(t.numel() for t in parts)
    assert count == published("filter-bases", source, classes, shared=shared, unique=unique, bases=bases)


@pytest.mark.parametrize("rule", ["3x3", "3x3+expand"])
@pytest.mark.parametrize("source", ["tv:resnet50", "tv:resnet101"])
def test_filter_bases_bottleneck(source: str, rule: str) -> None:
    model, x = build(source, 1000), torch.randn(1, 3, 64, 64)
    kernels = [
        {s: tie(model, [f"layer{s}.{i}.{layer}" for i in range(1, depth(model, s))]) for s in (1, 2, 3, 4)}
        for layer in (("conv2", "conv3") if rule == "3x3+expand" else ("conv2",))
    ]
    state = Recording(model.state_dict())
    compare(ref.filter_bases_bottleneck(x, state, *kernels), model, x)
    count = state.trainable() + sum(t.numel() for each in kernels for t in each.values())
    assert count == published("filter-bases", source, 1000, tie=rule)


@pytest.mark.parametrize(("double", "saved"), [(False, 3_507_272 - 3_243_080), (True, 3_507_272 - 2_978_888)])
def test_filter_bases_mobilenet_v2(double: bool, saved: int) -> None:
    """torchvision's network is 2,400 parameters smaller than the paper's, so the saving is what must agree."""
    model, x = build("tv:mobilenet_v2", 1000), torch.randn(1, 3, 64, 64)
    stages = {s: ref.MOBILENET_STAGES[s][1:] for s in (3, 4, 5, 6)}
    kernels = [{s: tie(model, [f"features.{i}.conv.0.0" for i in later]) for s, later in stages.items()}]
    if double:
        kernels.append({s: tie(model, [f"features.{i}.conv.2" for i in later]) for s, later in stages.items()})
    state = Recording(model.state_dict())
    compare(ref.filter_bases_mobilenet_v2(x, state, *kernels), model, x)
    count = state.trainable() + sum(t.numel() for each in kernels for t in each.values())
    assert sum(p.numel() for p in model.parameters()) - count == saved


@pytest.mark.parametrize(("reuse", "width", "classes"), [(1, 1, 10), (8, 1, 10), (14, 2, 100)])
def test_lrunet(reuse: int, width: int, classes: int) -> None:
    model = timm.create_model("lrunet", reuse=reuse, width=width, num_classes=classes)
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        nn.init.constant_(model.get_classifier().bias, 5.0)
        model.train()(x)
    model.eval()
    state = Recording(model.state_dict())
    compare(ref.lrunet(x, state, width), model, x)
    assert state.trainable() == published("layer-reuse", "timm:lrunet", classes, reuse=reuse, width=width)


@pytest.mark.parametrize(
    ("in_chans", "out_chans", "groups"),
    [
        (16, 96, 1),
        (96, 24, 6),
        (24, 144, 1),
        (144, 40, 8),
        (40, 240, 2),
        (240, 10, 10),
        (80, 480, 5),
        (480, 112, 16),
        (112, 672, 7),
        (672, 28, 28),
        (672, 192, 32),
        (1152, 48, 48),
        (48, 1152, 3),
        (1024, 512, 64),
    ],
)
def test_keffnet_groups(in_chans: int, out_chans: int, groups: int) -> None:
    """Group counts of kEffNet-B0 16ch, and the paper's worked example 1024 -> 512 (12,288 weights)."""
    assert ref.keffnet_groups(in_chans, out_chans, 16) == groups


def test_keffnet_paper_example() -> None:
    assert ref.keffnet_params(1024, 512, 16, bias=False, norm=False) == 8192 + 4096


@pytest.mark.parametrize("entry", SYSTEMS["grouped-pointwise"], ids=lambda e: f"{e['source']}-{e['options']}")
def test_keffnet_published_counts(entry: dict) -> None:
    """Replacing every pointwise layer of EfficientNet but none else gives the published totals."""
    with torch.device("meta"):
        model = timm.create_model(entry["source"].removeprefix("timm:"), num_classes=entry["classes"])
    count = sum(p.numel() for p in model.parameters())
    assert count == entry["before"]
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1:
            bias = module.bias is not None  # the squeeze-and-excitation layers: bias, no norm
            shape = (module.in_channels, module.out_channels)
            assert bias == (".se." in name)
            dense = shape[0] * shape[1] + shape[1] * (1 if bias else 2)
            count += ref.keffnet_params(*shape, entry["options"]["min_channels"], bias=bias, norm=not bias) - dense
    assert count == entry["after"]


def test_keffnet_pointwise_values() -> None:
    """Against the dense matrices: block-diagonal K, the interleaving permutation, block-diagonal L plus K."""
    groups, chans, outs = 3, 12, 6
    k, mix = torch.randn(outs, chans // groups, 1, 1), torch.randn(outs, outs // groups, 1, 1)
    x = torch.randn(2, chans, 5, 5)

    def dense(weight: Tensor) -> Tensor:
        return torch.block_diag(*weight[:, :, 0, 0].chunk(groups))

    # step = outs / groups = 2: the even outputs, then the odd ones
    order = [0, 2, 4, 1, 3, 5]
    first = torch.relu(torch.einsum("oc,nchw->nohw", dense(k), x))
    second = torch.relu(torch.einsum("oc,nchw->nohw", dense(mix), first[:, order]))
    assert torch.allclose(ref.keffnet_pointwise(x, k, mix, groups, act=torch.relu), first + second, atol=1e-5)
    assert torch.allclose(ref.keffnet_pointwise(x, k, None, groups, act=torch.relu), first[:, order], atol=1e-5)
