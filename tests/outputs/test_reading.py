"""What is said of networks of every kind, and that the user's word counts more."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from sharefold.errors import SharefoldError
from sharefold.graph import analyze
from sharefold.outputs import OutputReading, read_outputs
from sharefold.outputs.leaves import tensors_of
from sharefold.outputs.own_word import hint_of

torch.manual_seed(0)
IMAGES = torch.rand(12, 3, 8, 8)


class Head(nn.Module):
    """A convolution, and ``end`` behind it: told with and without the network's graph."""

    def __init__(self, end: Any, channels: int = 6, *modules: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Conv2d(3, channels, 3, padding=1)
        self.last = nn.Sequential(*modules)
        self.end = end

    def forward(self, x: Tensor) -> Any:
        return self.end(self.body(x), self.last)


def read(net: nn.Module, graph: bool = True, **options: Any) -> OutputReading:
    return read_outputs(net, IMAGES, analyze(net, IMAGES[:1]) if graph else None, **options)


def kinds(reading: OutputReading) -> list[tuple[str, str, int | None]]:
    return [(leaf.name, leaf.kind, leaf.axis) for leaf in reading.leaves]


CASES: dict[str, tuple[nn.Module, list[tuple[str, str, int | None]]]] = {
    "classifier": (Head(lambda h, m: m(h.mean((2, 3))), 6, nn.Linear(6, 5)), [("output", "logits", 1)]),
    "masked classes": (
        Head(lambda h, m: m(h.mean((2, 3))).masked_fill(torch.arange(5) == 3, -torch.inf), 6, nn.Linear(6, 5)),
        [("output", "logits", 1)],
    ),
    "one number": (Head(lambda h, m: m(h.mean((2, 3))), 6, nn.Linear(6, 1)), [("output", "regression", 1)]),
    "yes or no": (Head(lambda h, m: m(h.mean((2, 3))).sigmoid(), 6, nn.Linear(6, 1)), [("output", "binary", 1)]),
    "several yes or no": (Head(lambda h, m: m(h.mean((2, 3))).sigmoid(), 6, nn.Linear(6, 4)), [("output", "multi-label", 1)]),
    "probabilities": (Head(lambda h, m: m(h.mean((2, 3))).softmax(1), 6, nn.Linear(6, 4)), [("output", "probabilities", 1)]),
    "log-probabilities": (Head(lambda h, m: m(h.mean((2, 3))).log_softmax(1), 6, nn.Linear(6, 4)), [("output", "logits", 1)]),
    "pixel probabilities": (Head(lambda h, m: h.permute(0, 2, 3, 1).softmax(-1)), [("output", "probabilities", 3)]),
    "text": (Head(lambda h, m: m(h.mean(2).transpose(1, 2)), 6, nn.Linear(6, 12)), [("output", "logits", 2)]),
    "unit vectors": (Head(lambda h, m: nn.functional.normalize(h.mean((2, 3))), 16), [("output", "embedding", 1)]),
    "image": (Head(lambda h, m: m(h), 6, nn.Conv2d(6, 3, 3, padding=1)), [("output", "image", 1)]),
    "larger image": (Head(lambda h, m: m(h), 12, nn.PixelShuffle(2)), [("output", "image", 1)]),
    "mask": (Head(lambda h, m: (60 * m(h)).sigmoid(), 6, nn.Conv2d(6, 1, 1)), [("output", "binary", 1)]),
    "depth": (Head(lambda h, m: 3 * m(h), 6, nn.Conv2d(6, 1, 1)), [("output", "regression", 1)]),
    "heat maps": (Head(lambda h, m: h, 6), [("output", "regression", 1)]),
    "two tasks": (Head(lambda h, m: {"a": m(h.mean((2, 3))), "b": 2 * m(h.mean((2, 3)))}, 6, nn.Linear(6, 5)),
                  [("a", "regression", 1), ("b", "regression", 1)]),
    "named": (Head(lambda h, m: {"cls_logits": h, "box_deltas": h.relu(), "embedding": h.mean((2, 3))}, 6),
              [("cls_logits", "logits", 1), ("box_deltas", "regression", 1), ("embedding", "embedding", 1)]),
    "boxes and scores": (Head(lambda h, m: torch.cat([50 + 9 * h[:, :4].flatten(2), h[:, 4:].flatten(2).sigmoid()], 1), 9),
                         [("output[0:4]", "boxes", 1), ("output[4:9]", "scores", 1)]),
    "the same, anchors first": (
        Head(lambda h, m: torch.cat([50 + 9 * h[:, :4].flatten(2), h[:, 4:].flatten(2).sigmoid()], 1).transpose(1, 2), 9),
        [("output[0:4]", "boxes", 2), ("output[4:9]", "scores", 2)]),
    "class numbers": (Head(lambda h, m: h.argmax(1)), [("output", "labels", None)]),
}  # fmt: skip


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_kinds(case: str, graph: bool) -> None:
    net, wanted = CASES[case]
    assert kinds(read(net, graph)) == wanted


def test_an_argmax_in_the_graph_tells_classes_a_pixel() -> None:
    net = Head(lambda h, m: {"map": h, "best": h.argmax(1)})
    assert kinds(read(net)) == [("map", "logits", 1), ("best", "labels", None)]
    assert "argmax" in read(net).leaves[0].why
    assert kinds(read(net, graph=False))[0] == ("map", "regression", 1)


def test_timm_says_how_many_classes() -> None:
    net = timm.create_model("test_resnet", num_classes=7)
    images = torch.rand(3, 3, 32, 32)
    assert kinds(read_outputs(net, images)) == [("output", "logits", 1)]
    assert "7 classes" in read_outputs(net, images).leaves[0].why
    features = timm.create_model("test_resnet", num_classes=0)
    assert kinds(read_outputs(features, images)) == [("output", "embedding", 1)]
    maps = timm.create_model("test_resnet", features_only=True)
    assert {kind for _, kind, _ in kinds(read_outputs(maps, images))} == {"regression"}


def test_a_detector_of_ultralytics_says_what_its_channels_are() -> None:
    class Yolo(nn.Module):
        task, names, stride = "segment", {0: "cat", 1: "dog"}, torch.tensor([8.0])

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x.flatten(2), x.flatten(2)], 1)[:, [0] * 9]

    leaves = read_outputs(Yolo(), IMAGES).leaves
    assert [(leaf.kind, leaf.channels) for leaf in leaves] == [("boxes", (0, 4)), ("scores", (4, 6)), ("regression", (6, 9))]


def test_tensors_are_found_in_any_container() -> None:
    a, b, c, d = (torch.zeros(1) for _ in range(4))
    pair = namedtuple("pair", "left right")

    @dataclass
    class Two:
        one: Tensor
        two: Any

    output = OrderedDict(x=a, y=[b, Two(c, pair(d, None))], again=a)
    assert list(tensors_of(output)) == ["x", "y.0", "y.1.one", "y.1.two.left"]
    assert list(tensors_of((a,))) == ["0"] and list(tensors_of(a)) == ["output"]


def test_images_are_found_where_they_are_counted() -> None:
    net = Head(lambda h, m: {"steps": h.mean(2).permute(2, 0, 1), "rows": h.mean(2).transpose(1, 2).reshape(-1, 6),
                             "grid": torch.arange(4.0)})  # fmt: skip
    reading = read(net)
    steps, rows = reading.leaves
    assert (steps.images_axis, steps.per_image) == (1, 1) and (rows.images_axis, rows.per_image) == (0, 8)
    assert reading.left_out == {"grid": "it is the same for any number of images"}
    with torch.no_grad():
        first, second = reading.run(net, IMAGES[:5])
        wanted = net.body(IMAGES[:5]).mean(2).transpose(1, 2)
    assert torch.equal(first, wanted) and torch.equal(second, wanted)


def test_channels_of_one_tensor_are_taken_apart() -> None:
    net, _ = CASES["boxes and scores"]
    with torch.no_grad():
        boxes, scores = read(net).run(net, IMAGES[:2])
        assert torch.equal(torch.cat([boxes, scores], 1), net(IMAGES[:2]))
    assert boxes.shape == (2, 4, 64) and scores.shape == (2, 5, 64)


def test_the_network_is_left_as_it_was() -> None:
    net = Head(lambda h, m: m(h), 6, nn.BatchNorm2d(6))
    net.train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    read(net)
    assert net.training and net.last[0].training and not any(m._forward_hooks for m in net.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_the_user_knows_better() -> None:
    net, _ = CASES["heat maps"]
    assert kinds(read(net, overrides="logits:axis=1")) == [("output", "logits", 1)]
    assert kinds(read(net, overrides="logits:axis=-1")) == [("output", "logits", 3)]
    assert kinds(read(net, overrides={"output": "image"})) == [("output", "image", 1)]
    split = read(net, overrides=["boxes:channels=0-4", "scores:channels=4-6:sigmoid:weight=2"])
    assert kinds(split) == [("output[0:4]", "boxes", 1), ("output[4:6]", "scores", 1)]
    assert split.leaves[1].activated and split.leaves[1].weight == 2 and split.leaves[1].why == "given"
    two, _ = CASES["two tasks"]
    assert kinds(read(two, overrides=["a:ignore", "b:logits"])) == [("b", "logits", 1)]
    steps = Head(lambda h, m: h.mean(2).permute(2, 0, 1))
    assert kinds(read(steps, overrides="logits:axis=0")) == [("output", "logits", 1)]
    rows = Head(lambda h, m: h.mean(2).transpose(1, 2).reshape(-1, 6))
    assert kinds(read(rows, overrides="logits:axis=1")) == [("output", "logits", 2)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["binary", "multi-label", "scores"])
def test_a_sigmoid_is_not_forgotten_whatever_the_user_calls_it(kind: str, channels: int) -> None:
    """As logits all of its values would say yes."""
    net = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.Sigmoid())
    (leaf,) = read(net, overrides=kind).leaves
    assert (leaf.kind, leaf.activated) == (kind, True)
    (leaf,) = read(net[:1], overrides=kind).leaves
    assert (leaf.kind, leaf.activated) == (kind, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [("logit", "did you mean logits"), ("logits:axis", "not understood"), ("logits:axis=0", "axis 0"),
     ("c:image", "no such output"), ("boxes:channels=4-9", "not within the 6"), ("ignore", "every output is ignored"),
     ("logits:weight=0", "what has no weight is not compared: say ignore in place of logits")],
)  # fmt: skip
def test_words_that_do_not_fit_are_refused(text: str, message: str) -> None:
    with pytest.raises(SharefoldError, match=message):
        read(CASES["heat maps"][0], overrides=text)


@pytest.mark.parametrize("said", [["logits", "image"], ["output:logits", "output:image"], ["output:image", "output:image"]])
def test_one_output_is_one_thing(said: list[str]) -> None:
    """Of two words on the same output neither wins; a word on one output goes before a word on all."""
    with pytest.raises(SharefoldError, match="output is spoken of twice"):
        read(CASES["heat maps"][0], overrides=said)
    for order in (["ignore", "b:logits"], ["b:logits", "ignore"]):
        assert kinds(read(CASES["two tasks"][0], overrides=order)) == [("b", "logits", 1)]


def test_no_images_are_refused() -> None:
    with pytest.raises(SharefoldError, match="no images"):
        read_outputs(CASES["image"][0], IMAGES[:0])


@pytest.mark.parametrize(
    ("name", "hint"),
    [("roi_heads.bbox_pred", "regression"), ("head.cls_logits", "logits"), ("segmentation_head.0", "logits"), ("fc", None),
     ("classifier.4", "logits"), ("age", "regression"), ("image_embeds", "embedding"), ("output", None)],
)  # fmt: skip
def test_hints_of_names(name: str, hint: str | None) -> None:
    assert hint_of(name) == hint


RUNS: list[int] = []  # images; what a network notes on itself is taken back


class Given(nn.Module):
    """Says a function of each image's mean, a number that no graph tells of."""

    def __init__(self, say: Any) -> None:
        super().__init__()
        self.say = say

    def forward(self, x: Tensor) -> Tensor:
        RUNS.append(len(x))
        return self.say(x.mean((1, 2, 3)))[0]


def flat(values: Tensor) -> Tensor:
    return values[:, None, None, None].expand(-1, 3, 8, 8).contiguous()


VALUES = {
    "from 0 to 1": (lambda m: [m[:, None]], "regression"),
    "sums to 1": (lambda m: [torch.stack([m / 2, 1 - m / 2 + (m > 1)], 1)], "logits"),
    "of length 1": (lambda m: [-m.clamp(min=1)[:, None].expand(-1, 16) / 4], "logits"),
    "scores": (lambda m: [(m[:, None, None] + torch.tensor([2.0] * 4 + [0.0] * 3)[:, None]).expand(-1, 7, 9)], "regression"),
}


@pytest.mark.parametrize("case", VALUES)
def test_what_few_images_say_is_confirmed_on_more_in_any_order(case: str) -> None:
    """Some of 100 images lie outside of what the others do."""
    say, wanted = VALUES[case]
    means = torch.linspace(0.1, 0.9, 100)
    means[[40, 41, 42, 43, 44]] = 1.8
    orders = [torch.arange(100), means.argsort(), means.argsort(descending=True), torch.randperm(100)]
    found = [read_outputs(Given(say), flat(means[order])).leaves for order in orders]
    assert [[leaf.kind for leaf in leaves] for leaves in found] == [[wanted]] * 4
    inside = read_outputs(Given(say), flat(means.clamp(max=0.9))).leaves
    assert [leaf.kind for leaf in inside] != [wanted]


def test_only_what_values_say_costs_more_runs_and_large_images_fewer() -> None:
    shares, logits = Given(lambda m: [m.sigmoid()[:, None]]), Given(lambda m: [torch.stack([m, -3 * m - 1, m + 2], 1)])
    for net, count, size in ((logits, 8, 8), (shares, 256, 8), (shares, (1 << 22) // (3 * 128 * 128), 128)):
        RUNS.clear()
        read_outputs(net, torch.randn(300, 3, size, size))
        assert sum(RUNS) == count


def test_masked_classes_are_no_shares() -> None:
    """Beside the mask all values lie from 0 to 1."""
    net = Given(lambda m: [torch.stack([m, m / 2, torch.full_like(m, -torch.inf)], 1)])
    assert kinds(read_outputs(net, IMAGES)) == [("output", "logits", 1)]
    net = Given(lambda m: [torch.stack([m, m / 2, torch.full_like(m, -torch.inf)], 1).log_softmax(1)])
    assert read_outputs(net, IMAGES).leaves[0].why == "logarithms of shares that sum to 1 over axis 1"
