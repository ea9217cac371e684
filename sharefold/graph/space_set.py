"""Union-find over channel spaces, and the channels of one tensor."""

from __future__ import annotations

from dataclasses import dataclass

from sharefold.graph.records import Space


@dataclass(frozen=True)
class Chan:
    """Channels of a tensor: the space, the axis they lie on, and whether a global pooling made the tensor."""

    space: int
    axis: int
    pooled: bool = False


@dataclass
class _Draft:
    channels: int
    writers: list[str]
    readers: list[str]
    through: list[str]
    gates: list[str]
    reason: str = ""
    whole: str = ""


class SpaceSet:
    """Union-find over channel spaces."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._drafts: list[_Draft] = []

    def new(self, channels: int, reason: str = "") -> int:
        self._parent.append(len(self._parent))
        self._drafts.append(_Draft(channels, [], [], [], [], reason))
        return len(self._parent) - 1

    def find(self, space: int) -> int:
        while self._parent[space] != space:
            self._parent[space] = self._parent[self._parent[space]]
            space = self._parent[space]
        return space

    def __getitem__(self, space: int) -> _Draft:
        return self._drafts[self.find(space)]

    def freeze(self, space: int, reason: str) -> None:
        draft = self[space]
        draft.reason = draft.reason or reason

    def bind(self, space: int, reason: str) -> None:
        """The channels may be permuted, but none can be left out."""
        draft = self[space]
        draft.whole = draft.whole or reason

    def unite(self, first: int, second: int) -> None:
        a, b = sorted((self.find(first), self.find(second)))
        if a == b:
            return
        self._parent[b] = a
        into, other = self._drafts[a], self._drafts[b]
        for key in ("writers", "readers", "through", "gates"):
            mine = getattr(into, key)
            mine.extend(name for name in getattr(other, key) if name not in mine)
        into.reason = into.reason or other.reason
        into.whole = into.whole or other.whole
        if into.channels != other.channels:
            into.reason = into.reason or "layers of different width meet in these channels"

    def records(self) -> dict[int, Space]:
        found = {}
        for space in range(len(self._parent)):
            if self.find(space) == space:
                d = self._drafts[space]
                found[space] = Space(
                    space, d.channels, tuple(d.writers), tuple(d.readers), tuple(d.through),
                    tuple(name for name in d.gates if name in d.writers), bool(d.reason), d.reason,
                    d.whole,
                )  # fmt: skip
        return found
