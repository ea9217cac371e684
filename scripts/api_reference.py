"""Writes docs/api/, the API reference, from the signatures and docstrings of what is public.

    python scripts/api_reference.py             # write the pages, and drop those of modules that are gone
    python scripts/api_reference.py --check     # exit 1 when a page is out of date

Public is what a module's ``__all__`` names; where there is none, its own functions and classes without an underscore.
The pages hold nothing that depends on the machine: defaults are printed as they are written, never with an address.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import inspect
import json
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).parent.parent / "docs" / "api"
MODULES = (
    "sharefold", "sharefold.sources", "sharefold.data", "sharefold.graph", "sharefold.planner", "sharefold.methods",
    "sharefold.recipes", "sharefold.store", "sharefold.finetune", "sharefold.export", "sharefold.hub", "sharefold.bench",
    "sharefold.sweep", "sharefold.report",
)  # fmt: skip
NOTE = "<!-- Written by scripts/api_reference.py from the docstrings: change those, then run it. -->"
WIDTH = 100
_HEADING = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Warns):")
_ITEM = re.compile(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*): (.*)", re.DOTALL)
_CODE = re.compile(r"``(?P<code>.+?)``|:\w+:`~?(?P<role>[^`]+)`|`(?P<plain>[^`]+)`", re.DOTALL)
_RULE = re.compile(r"=+( +=+)+")


def pages() -> dict[str, str]:
    """File name -> text of every page."""
    entries = {name: public(importlib.import_module(name)) for name in MODULES}
    links: dict[str, str] = {}
    for module in reversed(MODULES):  # a name that two pages have is linked where it comes first
        marks = anchors(headings(module, entries[module]))
        for name, thing in entries[module].items():
            links[f"{module}.{name}"] = links[name] = f"{page_name(module)}#{marks[f'{module}.{name}']}"
            if inspect.isclass(thing):
                links |= {f"{name}.{key}": f"{page_name(module)}#{marks[f'{name}.{key}']}" for key in members(thing)}
        links[module] = page_name(module)
    texts = {page_name(module): module_page(module, entries[module], links) for module in MODULES}
    return {"README.md": index_page(entries, links), **texts}


def page_name(module: str) -> str:
    return f"{module.removeprefix('sharefold.')}.md"


def headings(module: str, entries: Mapping[str, Any]) -> Iterator[str]:
    """Every heading of a module's page, in order."""
    yield module
    for name, thing in entries.items():
        yield f"{module}.{name}"
        if inspect.isclass(thing):
            yield from (f"{name}.{key}" for key in members(thing))


def anchors(headings: Iterable[str]) -> dict[str, str]:
    """Heading -> the fragment that GitHub makes of it; ``Plan`` and ``plan`` get one name, so the later is numbered."""
    found: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for heading in headings:
        mark = re.sub(r"[^\w-]", "", heading.lower())
        found[heading] = f"{mark}-{seen[mark]}" if seen[mark] else mark
        seen[mark] += 1
    return found


def public(module: ModuleType) -> dict[str, Any]:
    """Public name -> object, in the order in which the module names or defines them."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            name for name, value in vars(module).items()
            if not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value))
            and value.__module__ == module.__name__
        ]  # fmt: skip
    return {name: getattr(module, name) for name in names}


def members(cls: type) -> dict[str, Any]:
    """Public methods and properties that the class itself defines."""
    kinds = (property, functools.cached_property, classmethod, staticmethod)
    return {
        name: value for name, value in vars(cls).items()
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, kinds))
    }  # fmt: skip


def index_page(entries: dict[str, dict[str, Any]], links: Mapping[str, str]) -> str:
    """Every module, and every public name with its first sentence."""
    parts = [NOTE, "# API reference", "What may be imported. Everything else may change without notice."]
    for module, found in entries.items():
        lines = []
        for name, thing in found.items():
            first = "" if is_data(thing) else summary(doc_of(thing))
            line = f"- [`{name}`]({links[f'{module}.{name}']})"
            lines.append(f"{line}: {inline(first, {})}" if first else line)
        parts += [f"## [`{module}`]({page_name(module)})", inline(summary(doc_of(importlib.import_module(module))), {}),
                  "\n".join(lines)]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def module_page(module: str, entries: Mapping[str, Any], links: Mapping[str, str]) -> str:
    parts = [NOTE, f"# `{module}`", *prose(doc_of(importlib.import_module(module)), links)]
    for name, thing in entries.items():
        parts.append(f"## `{module}.{name}`")
        if is_data(thing):
            parts.append(data(name, thing))
        elif inspect.isclass(thing):
            parts += class_entry(name, thing, links)
        else:
            parts += [fenced(signature(thing, f"def {name}")), *prose(doc_of(thing), links)]
    return "\n\n".join(parts) + "\n"


def class_entry(name: str, cls: type, links: Mapping[str, str]) -> Iterator[str]:
    """Constructor, docstring, settings, then members."""
    bases = [base.__name__ for base in cls.__bases__ if base is not object]
    made = "__init__" in vars(cls) or "__new__" in vars(cls)
    yield fenced(signature(cls, f"class {name}") if made else f"class {name}({', '.join(bases)})".replace("()", ""))
    if made and bases:
        yield "Derived from " + ", ".join(f"`{base}`" for base in bases) + "."
    yield from prose(doc_of(cls), links)
    if dataclasses.is_dataclass(cls):
        helped = [(field.name, field.metadata["help"]) for field in dataclasses.fields(cls) if "help" in field.metadata]
        if helped:
            yield "\n".join(f"- `{key}`: {inline(text, links)}" for key, text in helped)
    for member, value in members(cls).items():
        yield f"### `{name}.{member}`"
        if isinstance(value, property | functools.cached_property):
            getter = value.fget if isinstance(value, property) else value.func
            kind = returned(getter)
            yield fenced(f"{member}: {kind}" if kind else member)
            yield from prose(doc_of(getter), links)
            continue
        wrapped = isinstance(value, classmethod | staticmethod)
        decorator = f"@{type(value).__name__}\n" if wrapped else ""
        function = value.__func__ if wrapped else value
        yield fenced(decorator + signature(function, f"def {member}"))
        yield from prose(doc_of(function), links)


def is_data(thing: Any) -> bool:
    return not callable(thing)


def data(name: str, value: Any) -> str:
    """A public constant: the keys of a table, or the value itself."""
    if isinstance(value, Mapping):
        return f"A `{type(value).__name__}` with the keys " + ", ".join(f"`{key}`" for key in value) + "."
    # The version would make the page change with every release, an address with every run.
    if name == "__version__" or type(value).__repr__ is object.__repr__:
        return f"A `{type(value).__name__}`."
    return f"`{value!r}`"


def signature(function: Any, head: str) -> str:
    """``head(parameters) -> result``, on one line where it fits."""
    found = inspect.signature(function)
    written: list[str] = []
    kinds = [parameter.kind for parameter in found.parameters.values()]
    starred = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.KEYWORD_ONLY}
    for index, parameter in enumerate(found.parameters.values()):
        if parameter.kind is parameter.KEYWORD_ONLY and starred.isdisjoint(kinds[:index]):
            written.append("*")
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        text = stars + parameter.name
        if parameter.annotation is not parameter.empty:
            text += f": {annotation(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            text += f" = {default(function, parameter)}"
        written.append(text)
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.POSITIONAL_ONLY not in kinds[index + 1 :]:
            written.append("/")
    tail = "" if inspect.isclass(function) else f" -> {returned(function)}"
    line = f"{head}({', '.join(written)}){tail}"
    if len(line) <= WIDTH:
        return line
    return f"{head}(\n" + "".join(f"    {text},\n" for text in written) + f"){tail}"


def returned(function: Any) -> str:
    kind = inspect.signature(function).return_annotation
    return "" if kind is inspect.Signature.empty else annotation(kind)


def annotation(kind: Any) -> str:
    return kind if isinstance(kind, str) else inspect.formatannotation(kind)


def default(owner: Any, parameter: inspect.Parameter) -> str:
    """The default value as one would write it."""
    value = parameter.default
    if dataclasses.is_dataclass(owner):
        field = next((field for field in dataclasses.fields(owner) if field.name == parameter.name), None)
        if field is not None and field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
    if inspect.isroutine(value) or inspect.isclass(value):
        return value.__qualname__
    return json.dumps(value) if isinstance(value, str) else repr(value)


def doc_of(thing: Any) -> str:
    """The docstring; not the signature that ``dataclass`` puts in its place."""
    text = inspect.cleandoc(thing.__doc__ or "")
    made = inspect.isclass(thing) and dataclasses.is_dataclass(thing) and text.startswith(f"{thing.__name__}(")
    return "" if made else text


def summary(doc: str) -> str:
    """The first sentence."""
    first = " ".join(doc.partition("\n\n")[0].split())
    return re.split(r"(?<=[a-z`)0-9])\.(?= [A-Z`])", first)[0].rstrip(".:")


def prose(doc: str, links: Mapping[str, str]) -> Iterator[str]:
    """A docstring as Markdown blocks."""
    for block in blocks(doc):
        lines = block.splitlines()
        heading = _HEADING.fullmatch(lines[0])
        if heading:
            yield f"**{heading[1]}**"
            yield section(textwrap.dedent("\n".join(lines[1:])), links)
        elif lines[0].startswith(">>>"):
            yield fenced(re.sub(" *# doctest:.*", "", block), "pycon")
        elif _RULE.fullmatch(lines[0]):
            yield table(lines, links)
        elif lines[0].startswith("    "):
            yield fenced(textwrap.dedent(block), "text")
        else:
            yield inline(re.sub("::$", ":", block), links)


def blocks(doc: str) -> Iterator[str]:
    """Paragraphs; a section with its heading is one."""
    current: list[str] = []
    for line in doc.splitlines():
        ends = not line.strip() if not (current and _HEADING.fullmatch(current[0])) else line and not line.startswith(" ")
        if ends or _HEADING.fullmatch(line):
            if any(text.strip() for text in current):
                yield "\n".join(current).strip("\n")
            current = []
        if line.strip() or current:
            current.append(line)
    if current:
        yield "\n".join(current).rstrip()


def section(text: str, links: Mapping[str, str]) -> str:
    """``name: text`` entries as a list; any other text as it stands."""
    entries = re.split(r"\n(?=\S)", text.strip())
    found = [_ITEM.fullmatch(entry) for entry in entries]
    if not all(found):
        return inline(textwrap.dedent(text).strip(), links)
    lines = []
    for match in found:
        assert match is not None
        names = ", ".join(f"`{name}`" for name in match[1].split(", "))
        body = "\n".join(line.strip() for line in match[2].splitlines())
        lines.append(f"- {names}: {textwrap.indent(inline(body, links), '  ').strip()}")
    return "\n".join(lines)


def table(lines: list[str], links: Mapping[str, str]) -> str:
    """A table between rules of ``=``, whose columns are those of the rules."""
    starts = [match.start() for match in re.finditer("=+", lines[0])]
    ends = [*starts[1:], None]
    rows = [
        [inline(line[start:end].strip(), links).replace("|", "\\|") for start, end in zip(starts, ends, strict=True)]
        for line in lines if not _RULE.fullmatch(line)
    ]  # fmt: skip
    head = "|" + " |" * len(starts)
    return "\n".join([head, "|" + "---|" * len(starts), *("| " + " | ".join(row) + " |" for row in rows)])


def inline(text: str, links: Mapping[str, str]) -> str:
    """reStructuredText's code and roles as Markdown's, roles with a link where the name has an entry."""
    result, at = "", 0
    for match in _CODE.finditer(text):
        result += escaped(text[at : match.start()])
        at = match.end()
        name = match["role"]
        if name is None:
            result += f"`{match['code'] or match['plain']}`"
            continue
        link = links.get(name) or links.get(name.rpartition(".")[2])
        result += f"[`{name}`]({link})" if link else f"`{name}`"
    return result + escaped(text[at:])


def escaped(text: str) -> str:
    return re.sub(r"([<*])", r"\\\1", text)


def fenced(text: str, language: str = "py") -> str:
    return f"```{language}\n{text}\n```"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is out of date")
    check = parser.parse_args().check
    wanted = pages()
    present = {path.name: path.read_text() for path in FOLDER.glob("*.md")}
    stale = sorted(name for name in wanted.keys() | present.keys() if wanted.get(name) != present.get(name))
    for name in stale:
        print(f"docs/api/{name} is out of date" if check else f"docs/api/{name}", file=sys.stderr)
        if check:
            continue
        FOLDER.mkdir(exist_ok=True)
        if name in wanted:
            (FOLDER / name).write_text(wanted[name])
        else:
            (FOLDER / name).unlink()
    return int(check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
