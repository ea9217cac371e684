"""docs/api/ is what the docstrings and signatures say, complete, linked, and the same on every machine."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from doc_blocks import ROOT
from script_loader import load_script

import sharefold

FOLDER = ROOT / "docs" / "api"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("scripts/api_reference.py")


@pytest.fixture(scope="module")
def pages(script: ModuleType) -> dict[str, str]:
    return script.pages()


def test_the_pages_are_those_of_the_docstrings(pages: dict[str, str]) -> None:
    committed = {path.name: path.read_text() for path in FOLDER.iterdir()}
    stale = [name for name in pages.keys() | committed.keys() if pages.get(name) != committed.get(name)]
    assert not stale, f"{sorted(stale)}: run python scripts/api_reference.py"


def test_every_public_name_has_an_entry(script: ModuleType, pages: dict[str, str]) -> None:
    assert all(f"\n## `sharefold.{name}`\n" in pages["sharefold.md"] for name in sharefold.__all__)
    listed = re.findall(r"^- \[`(\w+)`\]\((\w+)\.md#", pages["README.md"], flags=re.M)
    names = [
        (name, script.page_name(module).removesuffix(".md"))
        for module in script.MODULES for name in script.public(importlib.import_module(module))
    ]  # fmt: skip
    assert listed == names and len(names) > 60


def test_links_lead_to_headings(script: ModuleType, pages: dict[str, str]) -> None:
    anchors = {
        name: set(script.anchors(re.findall(r"^#+ `(.*)`$", text, flags=re.M)).values()) for name, text in pages.items()
    }
    links = [link for text in pages.values() for link in re.findall(r"\]\(([^)]+)\)", text)]
    assert len(links) > 100
    assert "sharefold.md#sharefoldplan-1" in links  # Plan, after plan
    for link in links:
        page, _, fragment = link.partition("#")
        assert page in pages and (not fragment or fragment in anchors[page]), link


def test_nothing_depends_on_the_machine(pages: dict[str, str]) -> None:
    text = "\n".join(pages.values())
    assert not re.search(r"\b0x[0-9a-f]{6,}|<factory>|<class '|<function|object at", text)
    assert str(ROOT) not in text and str(Path.home()) + "/" not in text
    assert ":func:" not in text and ":class:" not in text and not re.search(r"(?<!`)``(?!`)", text)


@dataclass
class Sample:
    """A sample; see :func:`sharefold.plan`.

    Attributes:
        names: texts, ``"a"``
            and more.
        size: a number * 2.
    """

    names: list[str]
    size: int = 3
    options: dict[str, Any] = field(default_factory=dict)

    def call(self, first: int, /, *rest: Any, run: Callable[[], None] = print, **more: Any) -> str:
        return f"{first}{rest}{run}{more}"


@dataclass
class Plain:
    value: float = 1e-4


def test_signatures(script: ModuleType) -> None:
    wide = script.signature(sharefold.open_source, "def open_source").splitlines()
    assert wide[:3] == ["def open_source(", "    source: str | Path,", "    options: OpenOptions | None = None,"]
    assert wide[3] == "    *," and wide[-1] == ") -> Source"
    assert script.signature(Sample, "class Sample") == (
        "class Sample(names: list[str], size: int = 3, options: dict[str, Any] = {})"
    )
    assert script.signature(Sample.call, "def call") == (
        "def call(self, first: int, /, *rest: Any, run: Callable[[], None] = print, **more: Any) -> str"
    )
    assert list(script.class_entry("Plain", Plain, {})) == ["```py\nclass Plain(value: float = 0.0001)\n```"]


def test_docstrings(script: ModuleType) -> None:
    links = {"sharefold.plan": "sharefold.md#sharefoldplan"}
    assert list(script.prose(script.doc_of(Sample), links)) == [
        "A sample; see [`sharefold.plan`](sharefold.md#sharefoldplan).",
        "**Attributes**",
        '- `names`: texts, `"a"`\n  and more.\n- `size`: a number \\* 2.',
    ]
    text = "Two kinds::\n\n    one <two>\n\n====  =====\n``a`` x|y\n====  =====\n\nReturns:\n    What it is.\n\n>>> 1 + 1\n2"
    assert list(script.prose(text, {})) == [
        "Two kinds:", "```text\none <two>\n```", "| | |\n|---|---|\n| `a` | x\\|y |", "**Returns**", "What it is.",
        "```pycon\n>>> 1 + 1\n2\n```",
    ]  # fmt: skip
