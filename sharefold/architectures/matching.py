"""From a bare state dict to its architecture, by names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharefold.architectures.bounded import limited_modules
from sharefold.architectures.build import SOURCE_PREFIXES, build_on_meta, make_base, own_models, torchvision_urls
from sharefold.architectures.index import Entry, Record, read_counts
from sharefold.architectures.index_builder import complete_index, describe
from sharefold.architectures.shapes import Difference, Shapes, compare
from sharefold.errors import SharefoldError

_TRIED = 12  # near misses that are built and compared tensor by tensor
_NAMED = 3  # of which the report names so many

_Fit = tuple[Entry, dict[str, Any], frozenset[str]]


@dataclass(frozen=True)
class Match:
    """The architecture of a state dict.

    ``others`` have the same names and shapes, and ``rule`` says why ``base`` was preferred; ``--arch`` can choose
    them; ``twins`` are how those are built. ``head`` names the tensors whose size follows the class count.
    """

    base: dict[str, Any]
    others: tuple[str, ...] = ()
    rule: str = "only match"
    head: frozenset[str] = frozenset()
    twins: tuple[dict[str, Any], ...] = ()


def match_architecture(shapes: Shapes, file: str, hints: Mapping[str, Any] | None = None) -> Match:
    """The architecture whose parameters have exactly these names and shapes, as :func:`exact_match` finds it.

    Raises:
        SharefoldError: none fits; the message names the nearest three and what differs.
    """
    return exact_match(shapes, file, hints) or _nearest(shapes, file)


def exact_match(shapes: Shapes, file: str, hints: Mapping[str, Any] | None = None) -> Match | None:
    """Looks names and shapes up in the index, and checks what it says by building the network without weights.

    Where several architectures agree, the choice is, in this order: the name that the checkpoint stores under
    ``arch``; torchvision, when the file is named as torchvision's own download is; the longest model name that the
    file name contains; a network of sharefold's own; timm before torchvision (their common networks compute the
    same); the shortest name, then the alphabet. Buffers do not count: BatchNorm counters and constant tables may be
    absent.

    Args:
        shapes: name -> shape.
        file: its name is a hint.
        hints: what the checkpoint stores beside its weights; a text ``arch`` is used.
    """
    index = complete_index()
    options: list[_Fit] = []
    for record, classes, channels in index.find(shapes):
        head = frozenset(rule[0] for rule in record.pattern.classes)
        options += [(entry, entry.base(classes, channels), head) for entry in record.entries]
    ordered, rule = _order(options, file, hints or {})
    for _, base, head in ordered:
        # The index may come from another version of the libraries: what it promises is checked.
        if fits(shapes, base):
            twins = tuple(b for _, b, _ in ordered if b is not base)
            return Match(base, tuple(map(label_of, twins)), rule, head, twins)
    return None


def _nearest(shapes: Shapes, file: str) -> Match:
    found: list[tuple[int, str, Difference]] = []
    for record in complete_index().nearest(shapes, _TRIED):
        entry = min(record.entries, key=_plainness)
        base = entry.base(*_counts_nearby(record, shapes))
        try:
            difference = compare(shapes, build_on_meta(base))
        except SharefoldError:
            continue
        head = frozenset(rule[0] for rule in record.pattern.classes)
        if not len(difference):
            return Match(base, (), "found without the index", head)
        if head and set(difference.missing) == head and len(difference) == len(head):
            backbone = {**base, "kwargs": {**base["kwargs"], "num_classes": 0}}
            if entry.library == "timm" and fits(shapes, backbone):
                return Match(backbone, (), "without its classifier")
        found.append((len(difference), label_of(base), difference))
    if not found:
        raise SharefoldError(
            f"no architecture matches {file} ({len(shapes)} tensors) and none shares a tensor name with it: "
            "name its architecture with --arch"
        )
    found.sort(key=lambda item: item[:2])
    nearest = " | ".join(f"{label} ({difference})" for _, label, difference in found[:_NAMED])
    raise SharefoldError(
        f"no architecture matches {file} ({len(shapes)} tensors): nearest are {nearest}: "
        "name the architecture and its arguments with --arch"
    )


def named_architecture(library: str, name: str, kwargs: dict[str, Any], shapes: Shapes) -> Match:
    """A given architecture with the class and channel counts that the file has, unless ``kwargs`` sets them.

    Raises:
        SharefoldError: it cannot be built with these arguments.
    """
    with limited_modules(len(shapes), name):  # the arguments may be a stranger's
        build_on_meta(make_base(library, name, kwargs))
    records = list(describe(library, name, kwargs))
    record = next((r for r in records if read_counts(r.pattern, shapes) is not None), records[-1])
    classes, channels = _counts_nearby(record, shapes)
    base = record.entries[0].base(
        None if "num_classes" in kwargs else classes, None if "in_chans" in kwargs else channels
    )
    return Match(base, (), "named by the user", frozenset(rule[0] for rule in record.pattern.classes))


def _counts_nearby(record: Record, shapes: Shapes) -> tuple[int | None, int | None]:
    """Counts by whichever tensors of the pattern the file has, so that a wrong one does not hide all else."""
    counts: list[int | None] = []
    for rules in (record.pattern.classes, record.pattern.channels):
        present = [rule for rule in rules if rule[0] in shapes]
        count = None
        for name, axis, a, b in present:
            shape = shapes[name]
            if len(shape) > axis and shape[axis] > b and (shape[axis] - b) % a == 0:
                count = (shape[axis] - b) // a
                break
        counts.append(count)
    return counts[0], counts[1]


def fits(shapes: Shapes, base: dict[str, Any]) -> bool:
    """Whether a file with these tensors is one of the architecture ``base``."""
    try:
        return len(compare(shapes, build_on_meta(base))) == 0
    except SharefoldError:
        return False


def _order(options: list[_Fit], file: str, hints: Mapping[str, Any]) -> tuple[list[_Fit], str]:
    """Options by the rules of :func:`exact_match`, and the rule that put the first one first."""
    if len(options) < 2:
        return options, "only match"
    own, arch, basename = set(own_models()), hints.get("arch"), Path(file).name
    ordered = sorted(options, key=lambda option: (option[0].name not in own, *_plainness(option[0])))
    stored = arch.partition(".")[0] if isinstance(arch, str) else None
    contained = [option for option in ordered if _contains(basename.lower(), option[0].name)]
    preferred = {
        "named in the checkpoint": [option for option in ordered if option[0].name == stored],
        "file name of torchvision's download": [o for o in ordered if _is_torchvision_file(o[0], basename)],
        "name in the file name": sorted(contained, key=lambda option: -len(option[0].name)),
    }
    for rule, chosen in preferred.items():
        if chosen:
            return [chosen[0], *(option for option in ordered if option is not chosen[0])], rule
    return ordered, "plainest name"


def _plainness(entry: Entry) -> tuple[bool, int, str]:
    return entry.library != "timm", len(entry.name), entry.name


def _contains(stem: str, name: str) -> bool:
    return re.search(rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9])", stem) is not None


def _is_torchvision_file(entry: Entry, name: str) -> bool:
    return entry.library == "torchvision" and name in torchvision_urls(entry.name)


def label_of(base: dict[str, Any]) -> str:
    """How ``--arch`` names it."""
    return f"{SOURCE_PREFIXES[base['library']]}:{base['name']}"
