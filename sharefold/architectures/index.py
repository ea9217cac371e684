"""The prebuilt table of architectures, found by a hash over the names and shapes of their parameters.

One record stands for all models whose parameters have equal names and shapes. Two things vary freely: the number of
classes and of input channels. A *pattern* lists the tensors that depend on them, as (name, axis, a, b) with
``size = a * n + b`` along that axis, so that both numbers can be read from a file and left out of the hash.
Hashes are sums over tensors, so trying another pattern costs a few additions. For the report on near misses every
record also holds a MinHash sketch (Broder 1997, https://doi.org/10.1109/SEQUEN.1997.666900), whose share of equal
entries estimates the Jaccard similarity of two sets of tensors.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sharefold.architectures.build import make_base
from sharefold.architectures.shapes import Shapes

INDEX_FILE = Path(__file__).with_name("index.npz")
SKETCH = 64
_MASK = (1 << 64) - 1
# Buffers by their last name part: files may lack them, and versions of a library add and drop them.
BUFFER_LEAVES = frozenset(
    {"num_batches_tracked", "running_mean", "running_var"}
    | {"relative_position_index", "relative_coords_table", "attention_bias_idxs", "attn_mask"}
)

Rule = tuple[str, int, int, int]  # name, axis, a, b


@dataclass(frozen=True)
class Pattern:
    """Tensors whose size follows the class count, and those that follow the input channels."""

    classes: tuple[Rule, ...] = ()
    channels: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A buildable model: registry name and arguments; ``classes`` and ``channels`` are what it has by default."""

    library: str
    name: str
    kwargs: dict[str, Any]
    classes: int | None
    channels: int | None

    def base(self, classes: int | None, channels: int | None) -> dict[str, Any]:
        """The recipe for the counts that a file has."""
        kwargs = dict(self.kwargs)
        if classes is not None:
            kwargs["num_classes"] = classes
        if channels is not None and channels != self.channels:
            kwargs["in_chans"] = channels
        return make_base(self.library, self.name, kwargs)


@dataclass
class Record:
    fingerprint: int
    pattern: Pattern
    sketch: npt.NDArray[np.uint32]
    entries: list[Entry] = field(default_factory=list)


@dataclass
class Index:
    records: list[Record]
    versions: dict[str, str]

    def __post_init__(self) -> None:
        self.table = {(record.fingerprint, record.pattern): record for record in self.records}
        self.patterns = sorted({record.pattern for record in self.records}, key=repr)
        self.names = {(entry.library, entry.name) for record in self.records for entry in record.entries}

    def find(self, shapes: Shapes) -> list[tuple[Record, int | None, int | None]]:
        """Records that agree with ``shapes`` exactly, each with the class and channel counts read from it."""
        terms = parameter_terms(shapes)
        total = sum(terms.values())
        found = []
        for pattern in self.patterns:
            read = read_counts(pattern, shapes)
            if read is None:
                continue
            adjusted = total
            for name, text in generalised(pattern, shapes).items():
                adjusted += term(text) - terms[name]
            record = self.table.get((adjusted & _MASK, pattern))
            if record is not None:
                found.append((record, *read))
        return found

    def nearest(self, shapes: Shapes, count: int) -> list[Record]:
        """Records by falling similarity of their tensors to ``shapes``, at most ``count``, none without any overlap."""
        if not self.records:
            return []
        mine = sketch(shapes.items())
        share = (np.stack([record.sketch for record in self.records]) == mine).mean(axis=1)
        order = np.argsort(-share, kind="stable")[:count]
        return [self.records[i] for i in order if share[i] > 0]


def is_parameter(name: str) -> bool:
    return name.rpartition(".")[2] not in BUFFER_LEAVES


def tensor_text(name: str, shape: Iterable[int | str]) -> str:
    return f"{name} {','.join(map(str, shape))}"


@functools.lru_cache(maxsize=200_000)
def term(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def parameter_terms(shapes: Shapes) -> dict[str, int]:
    return {name: term(tensor_text(name, shape)) for name, shape in shapes.items() if is_parameter(name)}


def generalised(pattern: Pattern, shapes: Shapes) -> dict[str, str]:
    """The pattern's tensors with the free sizes replaced by letters."""
    sizes: dict[str, list[int | str]] = {}
    for letter, rules in (("C", pattern.classes), ("I", pattern.channels)):
        for name, axis, _, _ in rules:
            sizes.setdefault(name, list(shapes[name]))[axis] = letter
    return {name: tensor_text(name, size) for name, size in sizes.items()}


def fingerprint(pattern: Pattern, shapes: Shapes) -> int:
    """64-bit hash of all parameters' names and shapes, free sizes left out."""
    free = generalised(pattern, shapes)
    names = (name for name in shapes if is_parameter(name))
    return sum(term(free.get(name) or tensor_text(name, shapes[name])) for name in names) & _MASK


def read_counts(pattern: Pattern, shapes: Shapes) -> tuple[int | None, int | None] | None:
    """Class and channel counts according to the pattern; None where ``shapes`` does not have its form."""
    counts: list[int | None] = []
    for rules in (pattern.classes, pattern.channels):
        seen = set()
        for name, axis, a, b in rules:
            shape = shapes.get(name)
            if shape is None or len(shape) <= axis or (shape[axis] - b) % a or shape[axis] <= b:
                return None
            seen.add((shape[axis] - b) // a)
        if len(seen) > 1:
            return None
        counts.append(seen.pop() if seen else None)
    return counts[0], counts[1]


@functools.lru_cache(maxsize=1)
def _sketch_factors() -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    drawn = np.random.Generator(np.random.PCG64(1997)).integers(0, 2**63, size=(2, SKETCH), dtype=np.uint64)
    return drawn[0] * np.uint64(2) + np.uint64(1), drawn[1]


def sketch(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> npt.NDArray[np.uint32]:
    """(64,) uint32 MinHash of the parameters' names with shapes (first half) and of their names alone (second)."""
    pairs = [(name, shape) for name, shape in shapes if is_parameter(name)]
    both = np.array([term(tensor_text(name, shape)) for name, shape in pairs], dtype=np.uint64)
    names = np.array([term(name) for name, _ in pairs], dtype=np.uint64)
    if not len(pairs):
        return np.full(SKETCH, 2**32 - 1, dtype=np.uint32)
    factors, offsets = _sketch_factors()
    half = SKETCH // 2
    parts = [
        ((values[:, None] * factors[part] + offsets[part]) >> np.uint64(32)).min(axis=0)
        for values, part in ((both, slice(None, half)), (names, slice(half, None)))
    ]
    return np.concatenate(parts).astype(np.uint32)


def versions() -> dict[str, str]:
    return {library: importlib.import_module(library).__version__ for library in ("timm", "torchvision")}


def save_index(index: Index, path: Path = INDEX_FILE) -> None:
    """One ``.npz`` without pickles: fingerprints, sketches and a JSON text with names, arguments and patterns."""
    patterns = {pattern: number for number, pattern in enumerate(index.patterns)}
    text = {
        "versions": index.versions,
        "patterns": [[pattern.classes, pattern.channels] for pattern in index.patterns],
        "records": [
            [patterns[record.pattern], [[e.library, e.name, e.kwargs, e.classes, e.channels] for e in record.entries]]
            for record in index.records
        ],
    }
    encoded = json.dumps(text, separators=(",", ":")).encode()
    np.savez_compressed(
        path,
        fingerprints=np.array([record.fingerprint for record in index.records], dtype=np.uint64),
        sketches=np.stack([record.sketch for record in index.records]),
        text=np.frombuffer(encoded, dtype=np.uint8),
    )


@functools.lru_cache(maxsize=2)
def load_index(path: Path = INDEX_FILE) -> Index:
    with np.load(path, allow_pickle=False) as file:
        text = json.loads(file["text"].tobytes())
        fingerprints, sketches = file["fingerprints"], file["sketches"]
    patterns = [
        Pattern(tuple(map(tuple, classes)), tuple(map(tuple, channels))) for classes, channels in text["patterns"]
    ]
    records = [
        Record(int(fingerprints[i]), patterns[number], sketches[i], [Entry(*entry) for entry in entries])
        for i, (number, entries) in enumerate(text["records"])
    ]
    return Index(records, text["versions"])
