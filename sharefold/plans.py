"""The plan: what each group of layers will share, decided before anything is touched.

A recipe, the planner and a hand-edited JSON file all produce the same :class:`Plan`; ``convert_`` takes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from sharefold.errors import SharefoldError
from sharefold.layers import is_bank_name
from sharefold.untrusted import is_int, is_number, parse_json, quoted, shown

PLAN_VERSION = 1
# Methods that make layers narrower, before all others: a layer may be in one group of theirs and in one of another method.
NARROWING = frozenset({"fold"})
# Called with (what, done, total) during long work.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class GroupPlan:
    """What one group of layers will share.

    Attributes:
        name: unique name; also the key of the group's bank.
        method: name of a method of :mod:`sharefold.methods`.
        members: qualified names of the layers (or blocks), in forward order.
        options: the method's options; JSON values only.
        params_before, params_after: weights of the members before, and bank plus own tensors after.
        error: expected relative output error, mean over the members, under the data norm; None when not measured.
        stage: number of down-samplings before the group.
        role: place in the block, or "" when roles are mixed.
    """

    name: str
    method: str
    members: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    params_before: int = 0
    params_after: int = 0
    error: float | None = None
    stage: int = 0
    role: str = ""


@dataclass
class Plan:
    """Group plans plus whole-model totals; prints as a table and round-trips through JSON.

    Attributes:
        groups: the groups that change; every other layer stays as it is.
        params_before, params_after: ``sum(p.numel())`` of the whole model.
        source: what decided, such as ``"budget 50%"`` or ``"recipe sharesnet"``.
        store: number types of the saved file as :func:`sharefold.store.parse_store` reads them; "" for float32.
        exclude: regular expression; modules whose name it matches keep every tensor bit for bit, whatever is repaired or stored.
    """

    groups: list[GroupPlan]
    params_before: int
    params_after: int
    source: str = ""
    store: str = ""
    exclude: str = ""

    def protects(self, name: str) -> bool:
        """Whether the module called ``name`` has to stay as it is."""
        return bool(self.exclude) and re.search(self.exclude, name) is not None

    @property
    def narrowing(self) -> list[GroupPlan]:
        """The groups that make layers narrower; they are carried out first."""
        return [group for group in self.groups if group.method in NARROWING]

    @property
    def sharing(self) -> list[GroupPlan]:
        """All other groups; their numbers are about the network that the narrowing ones leave."""
        return [group for group in self.groups if group.method not in NARROWING]

    @property
    def size(self) -> float:
        """Share of the parameters that stays."""
        return self.params_after / max(self.params_before, 1)

    def to_json(self) -> str:
        """The plan as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def to_dict(self) -> dict[str, Any]:
        return {"plan_version": PLAN_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> Plan:
        """Reads :meth:`to_json`'s text.

        Raises:
            SharefoldError: not JSON, not a plan, a newer plan version, or a layer in two groups.
        """
        return cls.from_dict(parse_json(text, where), where)

    @classmethod
    def from_dict(cls, data: Any, where: str = "plan") -> Plan:
        data = unwrapped(data)
        if not isinstance(data, dict) or not isinstance(data.get("groups"), list):
            raise SharefoldError(
                f"{where} holds no list of groups: write one with `sharefold convert ... --dry-run --json`"
            )
        for key, default in (("plan_version", PLAN_VERSION), ("params_before", 0), ("params_after", 0)):
            if not is_int(data.get(key, default)) or not 0 <= data.get(key, default) < 1 << 62:
                raise SharefoldError(f"{where}: {key} must be an integer from 0, not {shown(data[key])}")
        if data.get("plan_version", PLAN_VERSION) > PLAN_VERSION:
            raise SharefoldError(
                f"{where} has plan_version {data['plan_version']}, this sharefold reads up to "
                f"{PLAN_VERSION}: upgrade sharefold"
            )
        store = data.get("store", "")
        if not isinstance(store, str):
            raise SharefoldError(f"{where}: store must be a text such as int8, not {shown(store)}")
        exclude = data.get("exclude", "")
        if not isinstance(exclude, str) or not _is_expression(exclude):
            raise SharefoldError(f"{where}: exclude must be a regular expression, not {shown(exclude)}")
        groups = [_group(entry, index, where) for index, entry in enumerate(data["groups"])]
        owners: dict[bool, dict[str, str]] = {True: {}, False: {}}
        names: set[str] = set()
        for group in groups:
            if group.name in names:
                raise SharefoldError(f"{where}: two groups are named {quoted(group.name)}: rename one")
            names.add(group.name)
            owner = owners[group.method in NARROWING]
            for member in group.members:
                if member in owner:
                    both = f"{quoted(owner[member])} and {quoted(group.name)}"
                    raise SharefoldError(f"{where}: layer {quoted(member)} is in groups {both}: keep it in one")
                owner[member] = group.name
        source = data.get("source", "")
        if not isinstance(source, str):
            raise SharefoldError(f"{where}: source must be a text such as recipe sharesnet, not {shown(source)}")
        return cls(groups, data.get("params_before", 0), data.get("params_after", 0), source, store, exclude)

    def __str__(self) -> str:
        head = ["group", "method", "layers", "options", "params", "kept", "error"]
        rows = [head]
        for g in self.groups:
            error = "" if g.error is None else f"{g.error:.4f}"
            options = ", ".join(f"{k}={v}" for k, v in g.options.items() if not isinstance(v, (list, dict)))
            kept = f"{g.params_after / max(g.params_before, 1):.0%}"
            rows.append(
                [
                    g.name,
                    g.method,
                    str(len(g.members)),
                    options,
                    f"{g.params_before:,} -> {g.params_after:,}",
                    kept,
                    error,
                ]
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        total = f"{self.params_before:,} -> {self.params_after:,} parameters ({self.size:.1%} kept)"
        return "\n".join([*lines, total, *([f"stored as {self.store}"] if self.store else [])])


def unwrapped(data: Any) -> Any:
    """The plan's own object in what ``convert --dry-run --json`` prints around it; anything else as it is."""
    return data["plan"] if isinstance(data, dict) and isinstance(data.get("plan"), dict) else data


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _group(entry: Any, index: int, where: str) -> GroupPlan:
    known = {f.name for f in fields(GroupPlan)}
    if not isinstance(entry, dict) or not {"name", "method", "members"} <= entry.keys():
        raise SharefoldError(f"{where}: group {index} lacks name, method or members: add them")
    unknown, named = entry.keys() - known, quoted(entry["name"])
    if unknown:
        raise SharefoldError(
            f"{where}: group {named} has unknown keys {shown(sorted(unknown))}: known are {sorted(known)}"
        )
    for key in ("name", "method", "role"):
        if not isinstance(entry.get(key, ""), str):
            raise SharefoldError(f"{where}: {key} of group {named} must be a text, not {shown(entry[key])}")
    if not is_bank_name(entry["name"]):
        raise SharefoldError(f"{where}: a group cannot be named {named}, as torch has it taken: rename it")
    for key in ("params_before", "params_after", "stage"):
        if not is_int(entry.get(key, 0)) or not 0 <= entry.get(key, 0) < 1 << 62:
            raise SharefoldError(f"{where}: {key} of group {named} must be an integer from 0, not {shown(entry[key])}")
    error = entry.get("error")
    if error is not None and not is_number(error):
        raise SharefoldError(f"{where}: error of group {named} must be a number or null, not {shown(error)}")
    members = entry["members"]
    if not isinstance(members, (list, tuple)) or not all(isinstance(m, str) for m in members) or not members:
        raise SharefoldError(f"{where}: group {named} needs a list of layer names as members")
    if not isinstance(entry.get("options", {}), dict):
        raise SharefoldError(f"{where}: options of group {named} must be an object")
    return GroupPlan(**{**entry, "members": tuple(members)})
