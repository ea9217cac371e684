"""Bare state dicts find their architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sharefold.architectures import matching as match_module
from sharefold.architectures.build import build_on_meta, make_base, registry
from sharefold.architectures.index import Index
from sharefold.architectures.index_builder import torchvision_names
from sharefold.architectures.matching import exact_match, match_architecture, named_architecture
from sharefold.architectures.shapes import Shapes, compare, load_weights, shapes_of
from sharefold.errors import SharefoldError


def shapes(library: str, name: str, **kwargs: Any) -> Shapes:
    return shapes_of(build_on_meta(make_base(library, name, kwargs)).state_dict())


@pytest.mark.parametrize(
    ("library", "name", "kwargs"),
    [
        ("timm", "resnet20_cifar", {"num_classes": 10}),
        ("timm", "resnet110_cifar", {"num_classes": 100}),
        ("timm", "resnet18", {"num_classes": 37}),
        ("timm", "resnet50", {"num_classes": 1000, "in_chans": 1}),
        ("timm", "efficientnet_b0", {"num_classes": 5}),
        ("timm", "convnext_tiny", {"num_classes": 2}),
        ("timm", "mobilenetv2_100", {"num_classes": 1000}),
        ("timm", "convmixer_768_32", {"num_classes": 10}),
        ("timm", "lrunet", {"reuse": 14, "width": 1, "num_classes": 10}),
        ("timm", "lrunet_unrolled", {"reuse": 3, "width": 2, "num_classes": 10}),
        ("torchvision", "mobilenet_v2", {"num_classes": 3}),
        ("torchvision", "vgg16_bn", {"num_classes": 1000}),
        ("torchvision", "regnet_y_400mf", {"num_classes": 12}),
        ("torchvision", "googlenet", {"transform_input": True, "aux_logits": False, "num_classes": 4}),
        ("torchvision", "fcn_resnet50", {"aux_loss": True, "num_classes": 21}),
        ("torchvision", "fasterrcnn_resnet50_fpn", {"num_classes": 3}),
    ],
)
def test_finds_name_arguments_and_counts(library: str, name: str, kwargs: dict[str, Any]) -> None:
    match = match_architecture(shapes(library, name, **kwargs), "weights.pth")
    assert match.base == make_base(library, name, kwargs)


def test_class_count_is_explicit_and_buffers_do_not_matter() -> None:
    full = shapes("timm", "resnet18", num_classes=6)
    bare = {name: shape for name, shape in full.items() if name.endswith((".weight", ".bias"))}
    assert len(bare) < len(full)
    for part in (full, bare):
        found = match_architecture(part, "w.pth")
        assert found.base == make_base("timm", "resnet18", {"num_classes": 6})
        assert found.head == {"fc.weight", "fc.bias"}


class TestTies:
    """Several models with the same tensors: the documented order."""

    def test_timm_before_torchvision(self) -> None:
        match = match_architecture(shapes("torchvision", "resnet50"), "w.pth")
        assert match.base["library"] == "timm" and match.base["name"] == "resnet50"
        assert "tv:resnet50" in match.others and match.rule == "plainest name"

    def test_plain_name(self) -> None:
        match = match_architecture(shapes("timm", "tf_efficientnet_b0"), "w.pth")
        assert match.base["name"] == "efficientnet_b0" and "timm:tf_efficientnet_b0" in match.others

    def test_name_in_the_file_name(self) -> None:
        match = match_architecture(shapes("timm", "tf_efficientnet_b0"), "a/tf_efficientnet_b0_aa-827b6e33.pth")
        assert match.base["name"] == "tf_efficientnet_b0" and match.rule == "name in the file name"

    def test_torchvisions_own_file(self) -> None:
        match = match_architecture(shapes("torchvision", "resnet50"), "cache/resnet50-0676ba61.pth")
        assert match.base["library"] == "torchvision" and match.rule == "file name of torchvision's download"

    def test_name_stored_in_the_checkpoint(self) -> None:
        stored = {"arch": "tf_efficientnet_b0.ns_jft_in1k"}
        match = match_architecture(shapes("timm", "efficientnet_b0"), "efficientnet_b0.pth", stored)
        assert match.base["name"] == "tf_efficientnet_b0" and match.rule == "named in the checkpoint"

    def test_stored_name_that_does_not_fit_is_no_matter(self) -> None:
        match = match_architecture(shapes("timm", "resnet18"), "w.pth", {"arch": "resnet50"})
        assert match.base["name"] == "resnet18"


def test_near_miss_names_three_and_what_differs() -> None:
    form = shapes("timm", "resnet18")
    form["layer1.0.conv1.weight"] = (32, 64, 3, 3)
    del form["layer4.1.bn2.weight"]
    form["stray.weight"] = (1, 2)
    with pytest.raises(SharefoldError) as error:
        match_architecture(form, "odd.pt")
    text = str(error.value)
    assert "\n" not in text and text.startswith(f"no architecture matches odd.pt ({len(form)} tensors)")
    first, *others = text.split("nearest are ")[1].split(" | ")
    assert first == (
        "timm:resnet18 (1 missing, first layer4.1.bn2.weight; 1 unexpected, first stray.weight; "
        "1 of other shape, first layer1.0.conv1.weight [32, 64, 3, 3] in the file, [64, 64, 3, 3] in the network)"
    )
    assert len(others) == 2 and text.endswith("name the architecture and its arguments with --arch")


def test_near_miss_of_depth() -> None:
    """A network one block shorter than any of its family is reported against that family."""
    form = {k: v for k, v in shapes("timm", "resnet32_cifar").items() if not k.startswith("layer3.4.")}
    with pytest.raises(SharefoldError, match=r"nearest are timm:resnet(20|32)_cifar \("):
        match_architecture(form, "w.pt")


def test_backbone_without_classifier() -> None:
    form = {k: v for k, v in shapes("timm", "resnet50").items() if not k.startswith("fc.")}
    match = match_architecture(form, "w.pt")
    assert match.base["kwargs"] == {"num_classes": 0} and match.rule == "without its classifier"
    assert match.base["name"].startswith("resnet50")


def test_nothing_in_common() -> None:
    with pytest.raises(SharefoldError, match="none shares a tensor name with it"):
        match_architecture({"zzz.q": (1, 2, 3)}, "w.pt")


def test_index_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records whose hash no longer holds are found by similarity, then compared tensor by tensor."""
    from sharefold.architectures.index_builder import records_of

    stale = records_of("timm", ["resnet18", "resnet34"])
    for record in stale:
        record.fingerprint += 1
    monkeypatch.setattr(match_module, "complete_index", lambda: Index(stale, {}))
    form = shapes("timm", "resnet34", num_classes=9)
    assert exact_match(form, "w.pt") is None
    match = match_architecture(form, "w.pt")
    assert match.base == make_base("timm", "resnet34", {"num_classes": 9})
    assert match.rule == "found without the index"


def test_index_that_promises_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    from sharefold.architectures.index_builder import describe

    (wrong,), (right,) = describe("timm", "resnet34", {}), describe("timm", "resnet18", {})
    wrong.fingerprint = right.fingerprint
    monkeypatch.setattr(match_module, "complete_index", lambda: Index([wrong], {}))
    assert exact_match(shapes("timm", "resnet18"), "w.pt") is None


def test_named_architecture_reads_the_counts() -> None:
    form = shapes("timm", "resnet18", num_classes=8, in_chans=4)
    match = named_architecture("timm", "resnet18", {}, form)
    assert match.base["kwargs"] == {"num_classes": 8, "in_chans": 4}
    assert named_architecture("timm", "resnet18", {"num_classes": 5}, form).base["kwargs"]["num_classes"] == 5


class TestShapes:
    def model(self) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))

    def test_compare(self) -> None:
        state = shapes_of(self.model().state_dict())
        assert len(compare(state, self.model())) == 0
        del state["1.num_batches_tracked"], state["1.running_mean"], state["0.bias"]
        state.update({"0.weight": (4, 3, 1, 1), "7.weight": (1,), "9.num_batches_tracked": ()})
        difference = compare(state, self.model())
        assert difference.missing == ("0.bias",) and difference.unexpected == ("7.weight",)
        assert difference.mismatched == (("0.weight", (4, 3, 1, 1), (4, 3, 3, 3)),)

    def test_load(self) -> None:
        source, target = self.model(), self.model()
        state = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
        assert load_weights(target, state, "w.pt", "net") == []
        assert all(torch.equal(value, target.state_dict()[key]) for key, value in state.items())

    def test_load_is_all_or_nothing(self) -> None:
        target = self.model()
        before = {key: value.clone() for key, value in target.state_dict().items()}
        state = {**self.model().state_dict(), "extra": torch.ones(1)}
        with pytest.raises(SharefoldError, match=r"w\.pt does not fit net: 1 unexpected, first extra"):
            load_weights(target, state, "w.pt", "net")
        assert all(torch.equal(value, target.state_dict()[key]) for key, value in before.items())

    def test_lost_statistics_are_announced(self) -> None:
        state = {k: v for k, v in self.model().state_dict().items() if "running" not in k}
        with pytest.warns(UserWarning, match=r"no running statistics for 2 buffers, first 1\.running_mean"):
            absent = load_weights(self.model(), state, "w.pt", "net")
        assert absent == ["1.running_mean", "1.running_var"]


@pytest.mark.sweep
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_registry(library: str) -> None:
    """Every 30th model, with 11 classes where it has a classifier, is found again with the same tensors."""
    names = registry("timm") if library == "timm" else torchvision_names()
    for name in names[:: 30 if library == "timm" else 8]:
        try:
            form = shapes(library, name, num_classes=11)
        except SharefoldError:
            form = shapes(library, name)
        match = exact_match(form, "w.pt")
        assert match is not None, name
        again = build_on_meta(match.base)
        assert shapes_of(again.state_dict()) == form, (name, match.base)
        labels = [f"{'timm' if match.base['library'] == 'timm' else 'tv'}:{match.base['name']}", *match.others]
        assert f"{'timm' if library == 'timm' else 'tv'}:{name}" in labels
