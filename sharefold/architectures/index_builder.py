"""Builds index records by building every model on the meta device.

``python -m sharefold.architectures.index_builder`` rewrites the prebuilt index; run it when timm,
torchvision or sharefold gains models.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from sharefold.architectures import segmentation
from sharefold.architectures.build import build_on_meta, make_base, own_models, registry
from sharefold.architectures.index import (
    INDEX_FILE,
    Entry,
    Index,
    Pattern,
    Record,
    Rule,
    fingerprint,
    is_parameter,
    load_index,
    save_index,
    sketch,
    versions,
)
from sharefold.architectures.shapes import Shapes, shapes_of
from sharefold.errors import SharefoldError

_MORE_CLASSES = 1009  # prime, so that it never looks like a change of the input channels
_MORE_CHANNELS = 2
_HEAD_CLASSES = 1000
# Models whose tensors follow from arguments that a bare file does not name.
_VARIANTS: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("timm", "lrunet"): [{"reuse": n, "width": w} for w in (1, 2) for n in range(1, 17)],
    ("timm", "lrunet_unrolled"): [{"reuse": n, "width": w} for w in (1, 2) for n in range(1, 17)],
    # The public weights of these two were trained with the input transform; they come with and without aux heads.
    ("torchvision", "googlenet"): [{"transform_input": True, "aux_logits": aux} for aux in (False, True)],
    ("torchvision", "inception_v3"): [{"transform_input": True, "aux_logits": aux} for aux in (True, False)],
    **{
        ("torchvision", name): [{"aux_loss": aux} for aux in (False, True)]
        for name in ("fcn_resnet50", "fcn_resnet101", "deeplabv3_resnet50", "deeplabv3_resnet101")
    },
    ("torchvision", "deeplabv3_mobilenet_v3_large"): [{"aux_loss": aux} for aux in (False, True)],
}


def describe(library: str, name: str, kwargs: dict[str, Any]) -> Iterator[Record]:
    """Records of one model: with its default head, and, where it has none, with a classifier.

    Raises:
        SharefoldError: the model cannot be built.
    """
    model = build_on_meta(make_base(library, name, kwargs))
    classes, channels = _defaults(library, model)
    yield _record(library, name, kwargs, model, classes, channels)
    if classes == 0:
        try:
            model = build_on_meta(make_base(library, name, {**kwargs, "num_classes": _HEAD_CLASSES}))
        except SharefoldError:
            return
        yield _record(library, name, kwargs, model, _HEAD_CLASSES, channels)


def records_of(library: str, names: Iterable[str], failures: dict[str, str] | None = None) -> list[Record]:
    """Records of several models; models with the same tensors share one."""
    merged: dict[tuple[int, Pattern], Record] = {}
    for name in names:
        for kwargs in _VARIANTS.get((library, name), [{}]):
            try:
                for record in describe(library, name, kwargs):
                    merged.setdefault((record.fingerprint, record.pattern), record)
                    kept = merged[record.fingerprint, record.pattern]
                    if kept is not record:
                        kept.entries += record.entries
            except SharefoldError as error:
                if failures is not None:
                    failures[name] = str(error)
    return list(merged.values())


@functools.lru_cache(maxsize=1)
def complete_index() -> Index:
    """The prebuilt index plus sharefold's own networks that are newer than it."""
    index = load_index()
    fresh = [name for name in own_models() if ("timm", name) not in index.names]
    return Index([*index.records, *records_of("timm", fresh)], index.versions) if fresh else index


def merge(*parts: list[Record]) -> list[Record]:
    merged: dict[tuple[int, Pattern], Record] = {}
    for record in (record for part in parts for record in part):
        kept = merged.setdefault((record.fingerprint, record.pattern), record)
        if kept is not record:
            kept.entries += record.entries
    return list(merged.values())


def torchvision_names() -> list[str]:
    """Image classification, segmentation and detection; video, flow and quantized models are left out."""
    import torchvision.models as models

    parts = (models, models.segmentation, models.detection)
    return sorted(name for part in parts for name in models.list_models(module=part))


def _defaults(library: str, model: nn.Module) -> tuple[int | None, int | None]:
    if library == "timm":
        cfg = getattr(model, "pretrained_cfg", None) or {}
        return getattr(model, "num_classes", cfg.get("num_classes")), (cfg.get("input_size") or (3,))[0]
    return segmentation.counts(model) if library == "smp" else (None, 3)


def _record(
    library: str, name: str, kwargs: dict[str, Any], model: nn.Module, classes: int | None, channels: int | None
) -> Record:
    shapes = shapes_of(model.state_dict())
    if classes is None:
        classes = _torchvision_classes(name)
    pattern = _pattern(library, name, kwargs, shapes, classes, channels)
    entry = Entry(library, name, kwargs, classes if pattern.classes else None, channels if pattern.channels else None)
    return Record(fingerprint(pattern, shapes), pattern, sketch(shapes.items()), [entry])


def _torchvision_classes(name: str) -> int:
    """torchvision's defaults, which its builders do not tell: ImageNet, VOC, and COCO with a background class."""
    import torchvision.models as models

    if name in models.list_models(module=models.segmentation):
        return 21
    if name == "keypointrcnn_resnet50_fpn":
        return 2
    return 91 if name in models.list_models(module=models.detection) else 1000


def _pattern(
    library: str, name: str, kwargs: dict[str, Any], shapes: Shapes, classes: int | None, channels: int | None
) -> Pattern:
    rules: list[tuple[Rule, ...]] = []
    head = {} if classes is None else {"num_classes": classes}
    for key, count, more in (("num_classes", classes, _MORE_CLASSES), ("in_chans", channels, _MORE_CHANNELS)):
        if not count:
            rules.append(())
            continue
        try:
            other = build_on_meta(make_base(library, name, {**kwargs, **head, key: count + more}))
        except SharefoldError:
            rules.append(())
            continue
        rules.append(_rules(shapes, shapes_of(other.state_dict()), count, more))
    return Pattern(*rules)


def _rules(one: Shapes, two: Shapes, count: int, more: int) -> tuple[Rule, ...]:
    """Which sizes moved when a count rose from ``count`` to ``count + more``; empty unless all moved linearly."""
    if one.keys() != two.keys():
        return ()
    rules: list[Rule] = []
    for name in sorted(one):
        before, after = one[name], two[name]
        if before == after or not is_parameter(name):
            continue
        axes = [i for i, (x, y) in enumerate(zip(before, after, strict=True)) if x != y]
        if len(axes) != 1 or (after[axes[0]] - before[axes[0]]) % more:
            return ()
        a = (after[axes[0]] - before[axes[0]]) // more
        rules.append((name, axes[0], a, before[axes[0]] - a * count))
    return tuple(rules)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sharefold.architectures.index_builder", description=__doc__)
    parser.add_argument("--output", type=Path, default=INDEX_FILE)
    output = parser.parse_args(argv).output
    start, failures = time.perf_counter(), {}  # type: ignore[var-annotated]
    timm_part = records_of("timm", registry("timm"), failures)
    tv_part = records_of("torchvision", torchvision_names(), failures)
    index = Index(merge(timm_part, tv_part), versions())
    save_index(index, output)
    for name, reason in failures.items():
        print(f"left out {name}: {reason}", file=sys.stderr)
    names = sum(len(record.entries) for record in index.records)
    print(
        f"{output}: {names} models, {len(index.records)} distinct, {len(index.patterns)} patterns, "
        f"{output.stat().st_size / 1e6:.2f} MB, {time.perf_counter() - start:.0f} s"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
