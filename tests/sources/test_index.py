"""The table of architectures: hashes, free sizes, sketches, and the prebuilt file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharefold.architectures import index_builder as sweep
from sharefold.architectures.build import build_on_meta, make_base, own_models, registry
from sharefold.architectures.index import (
    INDEX_FILE,
    Entry,
    Index,
    Pattern,
    fingerprint,
    load_index,
    read_counts,
    save_index,
    sketch,
)
from sharefold.architectures.index_builder import describe, records_of, torchvision_names
from sharefold.architectures.shapes import Shapes, shapes_of

HEAD = Pattern(classes=(("fc.weight", 0, 1, 0), ("box.weight", 0, 4, 4)), channels=(("stem.weight", 1, 16, 2),))


def shapes(classes: int, channels: int) -> Shapes:
    return {
        "stem.weight": (8, 16 * channels + 2, 3, 3),
        "bn.running_mean": (8,),
        "bn.num_batches_tracked": (),
        "fc.weight": (classes, 8),
        "box.weight": (4 * classes + 4, 8),
    }


@given(st.integers(1, 30_000), st.integers(1, 40))
def test_free_sizes_are_read_and_left_out_of_the_hash(classes: int, channels: int) -> None:
    assert read_counts(HEAD, shapes(classes, channels)) == (classes, channels)
    assert fingerprint(HEAD, shapes(classes, channels)) == fingerprint(HEAD, shapes(10, 3))


def test_counts_must_agree() -> None:
    assert read_counts(HEAD, {**shapes(10, 3), "fc.weight": (11, 8)}) is None
    assert read_counts(HEAD, {**shapes(10, 3), "stem.weight": (8, 51, 3, 3)}) is None
    assert read_counts(HEAD, {"fc.weight": (10, 8)}) is None
    assert read_counts(Pattern(), {}) == (None, None)


def test_hash_ignores_order_and_buffers_but_no_parameter() -> None:
    one = shapes(10, 3)
    reverse = dict(reversed(one.items()))
    without = {name: shape for name, shape in one.items() if not name.startswith("bn.")}
    assert fingerprint(HEAD, one) == fingerprint(HEAD, reverse) == fingerprint(HEAD, without)
    assert fingerprint(HEAD, one) != fingerprint(HEAD, {**one, "extra.weight": (1,)})
    assert fingerprint(HEAD, one) != fingerprint(HEAD, {**one, "stem.weight": (9, 50, 3, 3)})


def test_sketch_estimates_similarity() -> None:
    rng = np.random.default_rng(0)
    names = [f"layer{i}.weight" for i in range(400)]
    one = {name: (int(rng.integers(1, 99)), 3) for name in names}
    for shared in (0, 100, 200, 300, 400):
        two = {name if i < shared else f"other.{name}": one[name] for i, name in enumerate(names)}
        jaccard = shared / (800 - shared)
        assert (sketch(one.items()) == sketch(two.items())).mean() == pytest.approx(jaccard, abs=0.16)


def test_description_of_a_model() -> None:
    (record,) = describe("timm", "resnet18", {})
    assert record.pattern == Pattern((("fc.bias", 0, 1, 0), ("fc.weight", 0, 1, 0)), (("conv1.weight", 1, 1, 0),))
    assert record.entries == [Entry("timm", "resnet18", {}, 1000, 3)]
    base = record.entries[0].base(37, 3)
    assert base == make_base("timm", "resnet18", {"num_classes": 37})
    assert record.entries[0].base(37, 1)["kwargs"] == {"num_classes": 37, "in_chans": 1}


def test_equal_models_share_a_record() -> None:
    (timm_record,) = describe("timm", "resnet50", {})
    (tv_record,) = describe("torchvision", "resnet50", {})
    assert (timm_record.fingerprint, timm_record.pattern) == (tv_record.fingerprint, tv_record.pattern)


def test_round_trip_through_the_file(tmp_path: Path) -> None:
    records = records_of("timm", ["resnet20_cifar", "resnet18", "tresnet_m"])
    index = Index(records, {"timm": "1"})
    save_index(index, tmp_path / "i.npz")
    again = load_index(tmp_path / "i.npz")
    assert again.versions == {"timm": "1"} and again.table.keys() == index.table.keys()
    for one, two in zip(index.records, again.records, strict=True):
        assert one.entries == two.entries and np.array_equal(one.sketch, two.sketch)


def test_lookup_of_other_heads_and_stems() -> None:
    index = Index(records_of("timm", ["tresnet_m", "resnet18"]), {})
    for name, classes, channels in (("tresnet_m", 11, 4), ("resnet18", 2, 1)):
        kwargs = {"num_classes": classes, "in_chans": channels}
        model = build_on_meta(make_base("timm", name, kwargs))
        ((record, *counts),) = index.find(shapes_of(model.state_dict()))
        assert record.entries[0].name == name and counts == [classes, channels]


def test_nearest_orders_by_similarity() -> None:
    index = Index(records_of("timm", ["resnet20_cifar", "resnet18", "resnet34", "resnet50"]), {})
    model = build_on_meta(make_base("timm", "resnet34", {}))
    names = [record.entries[0].name for record in index.nearest(shapes_of(model.state_dict()), 4)]
    assert names[0] == "resnet34" and names[-1] == "resnet20_cifar" and len(names) == 4
    assert Index([], {}).nearest({"a": (1,)}, 3) == []
    assert index.nearest({"unrelated": (1,)}, 3) == []


def test_rebuilding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sweep, "registry", lambda _: ["resnet50", "no_such_model"])
    monkeypatch.setattr(sweep, "torchvision_names", lambda: ["resnet50", "inception_v3"])
    assert sweep.main(["--output", str(tmp_path / "i.npz")]) == 0
    index = load_index(tmp_path / "i.npz")
    names = [[(entry.library, entry.name) for entry in record.entries] for record in index.records]
    shared = [("timm", "resnet50"), ("torchvision", "resnet50")]
    assert names == [shared, *2 * [[("torchvision", "inception_v3")]]]  # with and without the auxiliary head
    assert set(index.versions) == {"timm", "torchvision"}
    out, err = capsys.readouterr()
    assert "4 models, 3 distinct" in out and "left out no_such_model: unknown model" in err


class TestPrebuilt:
    def test_size(self) -> None:
        assert INDEX_FILE.stat().st_size < 1_500_000

    def test_holds_the_registries(self) -> None:
        index = load_index()
        timm_names = {name for library, name in index.names if library == "timm"}
        # Names come and go with timm's versions; most of what it lists has to be there.
        assert len(timm_names & set(registry("timm"))) > 1000
        # Own models newer than the index are described when they are needed.
        assert len(set(own_models()) & timm_names) > 10
        tv_names = {name for library, name in index.names if library == "torchvision"}
        assert len(tv_names & set(torchvision_names())) >= 90

    @pytest.mark.parametrize(
        ("library", "name"), [("timm", "convmixer_768_32"), ("torchvision", "vgg16_bn"), ("timm", "efficientnet_b0")]
    )
    def test_agrees_with_fresh_records(self, library: str, name: str) -> None:
        (fresh,) = describe(library, name, {})
        kept = load_index().table[fresh.fingerprint, fresh.pattern]
        assert fresh.entries[0] in kept.entries and np.array_equal(kept.sketch, fresh.sketch)

    def test_knows_layer_reuse_arguments(self) -> None:
        model = build_on_meta(make_base("timm", "lrunet", {"reuse": 9, "width": 2, "num_classes": 100}))
        ((record, classes, channels),) = load_index().find(shapes_of(model.state_dict()))
        assert (classes, channels) == (100, 3)
        assert Entry("timm", "lrunet", {"reuse": 9, "width": 2}, 10, 3) in record.entries
