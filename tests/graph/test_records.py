"""Exact records, roles, stages and groups of well-known networks."""

from __future__ import annotations

from functools import cache

import pytest
import timm
import torch
import torchvision

import sharefold.models  # noqa: F401  (registers the CIFAR networks)
from sharefold.graph import LayerRecord, NetworkGraph, analyze, find_groups

from .networks import Branching, OptionANet, Recurrent


@cache
def graph_of(name: str, size: int) -> NetworkGraph:
    builder = torchvision.models.get_model if name.startswith("tv:") else timm.create_model
    with torch.device("meta"):
        model = builder(name.removeprefix("tv:"))
    return analyze(model, torch.empty(1, 3, size, size, device="meta"))


def block_roles(graph: NetworkGraph, block: str) -> list[str]:
    return [r.role for r in graph.layers.values() if r.block == block]


def groups_of(graph: NetworkGraph, **options: object) -> dict[str, tuple[str, int]]:
    return {g.name: (g.role, len(g.members)) for g in find_groups(graph, **options)}  # type: ignore[arg-type]


def test_resnet18_records_are_exact() -> None:
    graph = graph_of("tv:resnet18", 64)
    assert graph.traced == "fx" and graph.skipped == {} and graph.trace_note == ""
    assert len(graph.layers) == 21
    assert graph.layers["layer2.0.conv1"] == LayerRecord(
        name="layer2.0.conv1", kind="conv2d", module_class="Conv2d", weight_shape=(128, 64, 3, 3), groups=1,
        stride=(2, 2), padding=(1, 1), dilation=(1, 1), padding_mode="zeros", bias=False,
        input_size=(16, 16), output_size=(8, 8), stage=2, block="layer2.0", block_index=0, role="conv1", calls=1,
        norm="layer2.0.bn1", reads_stream=True, writes_stream=False, private_input=False, private_output=True,
        input_space=graph.layers["layer1.1.conv2"].output_space,
        output_space=graph.layers["layer2.0.conv2"].input_space, depth=1, input_shape=(64, 16, 16),
    )  # fmt: skip
    stages = {r.block: r.stage for r in graph.layers.values()}
    assert stages == {"": 4, **{f"layer{s}.{b}": s for s in (1, 2, 3, 4) for b in (0, 1)}}
    assert graph.layers["conv1"].stage == 0 and graph.layers["conv1"].role == "stem"
    assert graph.layers["conv1"].norm == "bn1" and graph.layers["conv1"].writes_stream
    head = graph.layers["fc"]
    assert (head.kind, head.role, head.stage, head.weight_shape) == ("linear", "head", 4, (1000, 512, 1, 1))
    assert head.bias and head.pooled and head.norm is None and not head.private_output
    assert block_roles(graph, "layer3.0") == ["conv1", "conv2", "downsample"]
    assert block_roles(graph, "layer3.1") == ["conv1", "conv2"]
    assert graph.layers["layer3.0.downsample.0"].writes_stream
    assert [r.blocks for r in graph.repeats] == [("layer1.0", "layer1.1")]


def test_resnet18_groups() -> None:
    graph = graph_of("tv:resnet18", 64)
    assert groups_of(graph) == {
        "stage1.conv3x3-64-64": ("conv1+conv2", 4),
        "stage2.conv3x3-128-128": ("conv2+conv1", 3),
        "stage3.conv3x3-256-256": ("conv2+conv1", 3),
        "stage4.conv3x3-512-512": ("conv2+conv1", 3),
    }
    assert groups_of(graph, by_role=True) == {
        "stage1.conv1.conv3x3-64-64": ("conv1", 2),
        "stage1.conv2.conv3x3-64-64": ("conv2", 2),
        **{f"stage{s}.conv2.conv3x3-{64 << (s - 1)}-{64 << (s - 1)}": ("conv2", 2) for s in (2, 3, 4)},
    }
    assert groups_of(graph, first_block="skip") == {
        f"stage{s}.conv3x3-{64 << (s - 1)}-{64 << (s - 1)}": ("conv1+conv2", 2) for s in (1, 2, 3, 4)
    }


def test_bottleneck_and_first_block_policies() -> None:
    graph = graph_of("tv:resnet50", 64)
    assert block_roles(graph, "layer2.0") == ["conv1", "conv2", "conv3", "downsample"]
    assert [r.blocks for r in graph.repeats] == [
        tuple(f"layer{s}.{b}" for b in range(1, n)) for s, n in ((1, 3), (2, 4), (3, 6), (4, 3))
    ]
    sizes = {s: n for s, n in ((1, 3), (2, 4), (3, 6), (4, 3))}
    three = {s: f"stage{s}.conv3x3-{64 << (s - 1)}-{64 << (s - 1)}" for s in sizes}
    assert groups_of(graph, kernel=3) == {three[s]: ("conv2", n) for s, n in sizes.items()}
    # the strided 3x3 of stages 2 to 4 is left on its own, the one of stage 1 has stride 1
    by_stride = groups_of(graph, kernel=3, first_block="stride")
    assert by_stride == {three[s]: ("conv2", n - (s > 1)) for s, n in sizes.items()}
    assert groups_of(graph, kernel=3, first_block="skip") == {three[s]: ("conv2", n - 1) for s, n in sizes.items()}
    strided = groups_of(graph, kernel=3, first_block="stride", min_members=1, include=r"layer2\.0")
    assert strided == {"stage2.conv3x3-128-128-s2": ("conv2", 1)}
    assert groups_of(graph, roles=["conv3"], exclude="layer[34]") == {
        "stage1.conv1x1-64-256": ("conv3", 3),
        "stage2.conv1x1-128-512": ("conv3", 4),
    }


@pytest.mark.parametrize("name", ["tv:mobilenet_v2", "mobilenetv2_100"])
def test_inverted_residuals(name: str) -> None:
    graph = graph_of(name, 96)
    blocks = graph.blocks
    assert len(blocks) == 17 and block_roles(graph, blocks[0]) == ["depthwise", "project"]
    for block in blocks[1:]:
        assert block_roles(graph, block) == ["expand", "depthwise", "project"]
    first = {b: next(r for r in graph.layers.values() if r.block == b) for b in blocks}
    # 14 x 14 holds two widths: the count of blocks starts again at 64 -> 96
    assert [first[b].stage for b in blocks] == [0] + [1] * 2 + [2] * 3 + [3] * 7 + [4] * 4
    assert [first[b].block_index for b in blocks] == [0, 0, 1, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 0]
    assert groups_of(graph, first_block="skip", roles=["expand"]) == {
        "stage2.conv1x1-32-192": ("expand", 2),
        "stage3.conv1x1-64-384": ("expand", 3),
        "stage3.conv1x1-96-576": ("expand", 2),
        "stage4.conv1x1-160-960": ("expand", 2),
    }
    inner = [r for r in graph.layers.values() if r.block == blocks[2]]
    assert [(r.reads_stream, r.writes_stream) for r in inner] == [(True, False), (False, False), (False, True)]
    assert [(r.private_input, r.private_output) for r in inner] == [(False, True), (True, True), (True, False)]
    assert inner[1].input_space == inner[1].output_space


def test_squeeze_and_excitation() -> None:
    graph = graph_of("efficientnet_b0", 64)
    assert block_roles(graph, "blocks.0.0") == ["depthwise", "se_reduce", "se_expand", "project"]
    assert block_roles(graph, "blocks.3.1") == ["expand", "depthwise", "se_reduce", "se_expand", "project"]
    reduce = graph.layers["blocks.3.1.se.conv_reduce"]
    assert reduce.stage == graph.layers["blocks.3.1.conv_pw"].stage == 3
    assert reduce.input_size == (1, 1) and reduce.pooled
    space = graph.spaces[graph.layers["blocks.3.1.conv_pw"].output_space]
    assert space.writers == ("blocks.3.1.conv_pw", "blocks.3.1.se.conv_expand")
    assert space.gates == ("blocks.3.1.se.conv_expand",) and not space.stream and not space.private
    assert space.readers == ("blocks.3.1.se.conv_reduce", "blocks.3.1.conv_pwl")
    assert space.through == ("blocks.3.1.bn1", "blocks.3.1.conv_dw", "blocks.3.1.bn2")
    assert "stage3.conv1x1-480-20-pooled" in groups_of(graph)
    assert [r.role for r in graph.layers.values() if not r.block] == ["stem", "head", "head"]


def test_gate_after_the_block_input_size_of_one() -> None:
    """At 32 x 32 the last maps are single pixels: gates must still be told from maps."""
    graph = graph_of("efficientnet_b0", 32)
    assert block_roles(graph, "blocks.6.0") == ["expand", "depthwise", "se_reduce", "se_expand", "project"]
    assert graph.layers["blocks.6.0.conv_pw"].stage == 4


def test_densenet() -> None:
    graph = graph_of("densenet121", 64)
    assert len(graph.blocks) == 6 + 12 + 24 + 16
    assert all(block_roles(graph, block) == ["conv1", "conv2"] for block in graph.blocks)
    assert [n for n, r in graph.layers.items() if r.role == "transition"] == [
        f"features.transition{i}.conv" for i in (1, 2, 3)
    ]
    assert groups_of(graph) == {
        f"stage{s}.conv3x3-128-32": ("conv2", n) for s, n in ((1, 6), (2, 12), (3, 24), (4, 16))
    }
    layer = graph.layers["features.denseblock2.denselayer3.conv1"]
    assert layer.private_output and not layer.private_input and layer.norm.endswith("denselayer3.norm2")  # type: ignore[union-attr]
    assert graph.repeats == []


def test_convnext_linears_count_as_layers() -> None:
    graph = graph_of("convnext_tiny", 64)
    block = [r for r in graph.layers.values() if r.block == "stages.2.blocks.4"]
    assert [(r.role, r.kind) for r in block] == [("depthwise", "conv2d"), ("expand", "linear"), ("project", "linear")]
    assert [r.input_size for r in block] == [(4, 4)] * 3 and {r.stage for r in block} == {2}
    assert block[1].private_output and block[2].private_input and block[2].writes_stream
    assert graph.layers["stages.2.downsample.1"].role == "transition"
    assert groups_of(graph)["stage2.linear-384-1536"] == ("expand", 9)
    assert [len(r.blocks) for r in graph.repeats] == [3, 3, 9, 3]


def test_convmixer() -> None:
    graph = graph_of("convmixer_768_32", 56)
    assert graph.blocks == [f"blocks.{i}" for i in range(32)]
    assert block_roles(graph, "blocks.7") == ["depthwise", "pointwise"]
    assert groups_of(graph) == {
        "stage0.dw7x7-768": ("depthwise", 32),
        "stage0.conv1x1-768-768": ("pointwise", 32),
    }
    assert [r.name for r in graph.repeats] == ["blocks.0-31"]
    assert graph.layers["blocks.3.1"].private_output and graph.layers["blocks.3.0.fn.0"].norm is None


def test_standardized_convolutions_inside_opaque_blocks() -> None:
    graph = graph_of("nf_resnet50", 64)
    assert graph.traced == "fx" and graph.trace_note == ""
    assert graph.layers["stages.1.2.conv2"].module_class == "ScaledStdConv2d"
    assert block_roles(graph, "stages.1.0") == ["downsample", "conv1", "conv2", "conv3"]
    assert graph.layers["stages.1.2.conv2"].private_input and graph.layers["stages.1.2.conv2"].private_output
    same = graph_of("resnetv2_50x1_bit", 64)
    assert same.layers["stages.2.blocks.3.conv3"].module_class == "StdConv2d"
    assert block_roles(same, "stages.2.blocks.0") == ["downsample", "conv1", "conv2", "conv3"]
    # GroupNorm ties channels to their neighbours
    assert not same.layers["stages.2.blocks.3.conv1"].private_output
    assert groups_of(same)["stage3.conv3x3-256-256"] == ("conv2", 6)


def test_rexnet_has_no_equal_widths() -> None:
    graph = graph_of("rexnet_100", 64)
    assert block_roles(graph, "features.5") == ["expand", "depthwise", "se_reduce", "se_expand", "project"]
    assert find_groups(graph) == []
    # the sum covers a part of the channels only
    assert not graph.layers["features.5.conv_pwl.conv"].writes_stream
    assert "channels" in graph.spaces[graph.layers["features.5.conv_pwl.conv"].output_space].reason


def test_mobilenetv3_and_regnet() -> None:
    mobile = graph_of("tv:mobilenet_v3_small", 64)
    assert block_roles(mobile, "features.1") == ["depthwise", "se_reduce", "se_expand", "project"]
    assert [r.blocks for r in mobile.repeats] == [("features.5", "features.6"), ("features.10", "features.11")]
    regnet = graph_of("regnety_002", 64)
    assert block_roles(regnet, "s4.b1") == ["conv1", "conv2", "se_reduce", "se_expand", "conv3", "downsample"]
    assert not regnet.layers["s4.b2.conv1.conv"].private_output  # read by a grouped convolution
    assert groups_of(regnet, roles=["conv2"]) == {
        "stage3.conv3x3-152-152-g19": ("conv2", 4),
        "stage4.conv3x3-368-368-g46": ("conv2", 7),
    }


def test_vgg() -> None:
    graph = graph_of("tv:vgg16_bn", 64)
    roles = [r.role for r in graph.layers.values()]
    assert roles == ["stem"] + ["conv"] * 12 + ["head"] * 3 and graph.blocks == []
    assert [r.stage for r in graph.layers.values()][:13] == [0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert groups_of(graph) == {
        "stage2.conv3x3-256-256": ("conv", 2),
        "stage3.conv3x3-512-512": ("conv", 2),
        "stage4.conv3x3-512-512": ("conv", 3),
    }
    assert graph.layers["features.24"].private_output
    assert not graph.layers["features.40"].private_output  # flattened with the positions
    opaque = graph_of("vgg16_bn", 64)
    assert opaque.trace_note == "inside opaque modules: pre_logits.fc1, pre_logits.fc2"
    assert opaque.layers["pre_logits.fc1"].input_space == -1 and opaque.layers["pre_logits.fc1"].role == "head"


def test_parallel_resolutions() -> None:
    graph = graph_of("hrnet_w18_small", 64)
    by_size: dict[tuple[int, int], set[int]] = {}
    for record in graph.layers.values():
        if not record.pooled and record.stride == (1, 1) and record.block and "branches" in record.block:
            by_size.setdefault(record.input_size, set()).add(record.stage)
    assert by_size == {(16, 16): {1}, (8, 8): {2}, (4, 4): {3}, (2, 2): {4}}
    assert block_roles(graph, "stage3.0.branches.1.0") == ["conv1", "conv2"]


def test_segmentation_network() -> None:
    with torch.device("meta"):
        model = torchvision.models.segmentation.deeplabv3_resnet50(weights_backbone=None, aux_loss=True)
    graph = analyze(model, torch.empty(1, 3, 128, 128, device="meta"))
    assert graph.traced == "fx"
    # dilation keeps stages 3 and 4 at the resolution of stage 2
    assert {graph.layers[f"backbone.layer{s}.1.conv2"].stage for s in (2, 3, 4)} == {2}
    assert graph.layers["backbone.layer4.2.conv2"].dilation == (4, 4)
    assert "aux_classifier.4" in graph.layers and not graph.layers["classifier.4"].private_output


def test_option_a_shortcut_freezes_the_stream() -> None:
    graph = analyze(OptionANet(), torch.randn(2, 3, 32, 32))
    assert graph.traced == "fx" and graph.skipped == {}
    assert groups_of(graph) == {
        "stage0.conv3x3-8-8": ("conv1+conv2", 4),
        "stage1.conv3x3-16-16": ("conv2+conv1", 3),
        "stage2.conv3x3-32-32": ("conv2+conv1", 3),
    }
    assert [r.name for r in graph.repeats] == ["stages.0.0-1"]
    stream = graph.spaces[graph.layers["stages.1.1.conv2"].output_space]
    assert stream.stream and stream.frozen and not graph.layers["stages.1.1.conv2"].private_output
    assert all(r.private_output for r in graph.layers.values() if r.role == "conv1")
    assert graph.layers["stages.1.0.conv1"].block_index == 0


def test_repeated_call_of_one_layer() -> None:
    graph = analyze(Recurrent(), torch.randn(1, 3, 8, 8))
    conv = graph.layers["conv"]
    assert conv.calls == 3 and conv.norm is None
    assert conv.input_space == conv.output_space == graph.layers["stem"].output_space
    assert not conv.private_output
    assert analyze(Recurrent(), torch.randn(1, 3, 8, 8), symbolic=False).layers["conv"].calls == 3


def test_layer_reuse_network_and_its_twin() -> None:
    shared = graph_of("lrunet", 32)
    assert shared.layers["stage2.dw"].calls == 14 and shared.layers["stage2.dw"].norm is None
    assert shared.repeats == []
    twin = graph_of("lrunet_unrolled", 32)
    assert [r.blocks for r in twin.repeats] == [tuple(f"stage{s}.blocks.{b}" for b in range(14)) for s in (1, 2, 3, 4)]
    assert twin.layers["stage2.blocks.3.dw"].norm == "stage2.blocks.3.dw_bn"
    assert block_roles(twin, "stage2.blocks.3") == ["depthwise", "project"]


def test_forward_code_that_cannot_be_traced() -> None:
    graph = analyze(Branching(), torch.randn(1, 3, 16, 16))
    assert graph.traced == "hooks" and graph.fx_graph is None and graph.spaces == {} and graph.trace_note
    assert list(graph.layers) == [
        "stem.0", *(f"blocks.{i}.conv{c}" for i in range(3) for c in (1, 2)), "down", "fc",
    ]  # fmt: skip
    assert graph.skipped == {"unused": "never called as a module: unused, or its weight is used by other code"}
    assert [r.role for r in graph.layers.values()] == ["stem"] + ["conv1", "conv2"] * 3 + ["head", "head"]
    assert [r.stage for r in graph.layers.values()] == [0] * 7 + [1, 1]
    assert graph.layers["stem.0"].norm == "stem.1" and graph.layers["blocks.1.conv2"].norm == "blocks.1.bn2"
    for record in graph.layers.values():
        flags = (record.reads_stream, record.writes_stream, record.private_input, record.private_output)
        assert not any(flags) and record.input_space == record.output_space == -1
    assert [r.blocks for r in graph.repeats] == [("blocks.0", "blocks.1", "blocks.2")]
    assert groups_of(graph) == {"stage0.conv3x3-8-8": ("conv1+conv2", 6)}


@pytest.mark.parametrize(
    "name", ["tv:resnet50", "tv:mobilenet_v2", "efficientnet_b0", "densenet121", "convmixer_768_32", "convnext_tiny",
             "se_resnet14_cifar", "regnety_002", "lrunet_unrolled"],
)  # fmt: skip
def test_hooks_agree_with_the_trace(name: str) -> None:
    """Order, shapes, stages, blocks, roles and norms do not need the graph in ordinary networks."""
    traced = graph_of(name, 32 if name.startswith(("se_", "lru")) else 64)
    builder = torchvision.models.get_model if name.startswith("tv:") else timm.create_model
    with torch.device("meta"):
        model = builder(name.removeprefix("tv:"))
    size = 32 if name.startswith(("se_", "lru")) else 64
    hooked = analyze(model, torch.empty(1, 3, size, size, device="meta"), symbolic=False)
    keys = ("kind", "weight_shape", "input_size", "output_size", "stage", "block", "block_index", "role", "norm")
    assert [[getattr(r, k) for k in keys] for r in hooked.layers.values()] == [
        [getattr(r, k) for k in keys] for r in traced.layers.values()
    ]
    assert hooked.repeats == traced.repeats
