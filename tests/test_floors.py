"""The order of the house: read from the sources, so that a breach fails here and not in a reader's head.

Every file stands on a floor; it may import from its own floor and from those below. Files of one floor may import each
other as long as no circle arises.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Bottom to top. A name stands for a file or a folder of sharefold/.
FLOORS = (
    ("errors", "version", "budget", "checksum", "exchange", "files", "inputs", "metrics", "options", "offline",
     "ownership", "safetensors_file", "tensor_values", "untrusted"),
    ("solvers", "layers", "state_dicts", "models", "running"),
    ("settings", "graph"),
    ("plans", "outputs"),
    ("data", "procedural", "measure"),
    ("calibration", "tasks"),
    ("methods", "recipes"),
    ("repair",),
    ("format", "store"),
    ("architectures",),
    ("convert", "round", "planner", "card", "blank", "checkpoint"),
    ("sources", "export", "export_inputs", "export_outputs", "onnx_codes", "bench", "report", "hub", "sweep", "finetune",
     "verify"),
    ("demo",),
    ("cli",),
)
# They load what they offer on first use, so that the command line starts at once.
LAZY = {"sharefold", "sharefold.finetune"}
@dataclass(frozen=True)
class Import:
    """One import of a module of ours; ``inside``: in a function; ``typing``: for the type checker alone."""

    source: str
    target: str
    inside: bool = False
    typing: bool = False
    by_name: bool = False


@cache
def modules() -> dict[str, Path]:
    found = {}
    for folder, package in (("sharefold", "sharefold"), ("cli", "cli")):
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(p for p in parts if p != "__init__")])] = file
    return found


def imports_of(name: str, file: Path) -> Iterator[Import]:
    known = modules()

    def visit(node: ast.AST, inside: bool, typing: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in known:
                    yield Import(name, alias.name, inside, typing)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            for alias in node.names:
                target = f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base
                if target in known:
                    yield Import(name, target, inside, typing)
        elif isinstance(node, ast.Call) and _is_import_module(node.func) and node.args:
            given = node.args[0]
            if isinstance(given, ast.Constant) and str(given.value).split(".")[0] in ("sharefold", "sharefold_cli"):
                yield Import(name, str(given.value), inside, typing, by_name=True)
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside, typing or guarded)

    yield from visit(ast.parse(file.read_text()), False, False)


def _is_import_module(function: ast.expr) -> bool:
    called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return called in ("import_module", "__import__")


@cache
def imports() -> tuple[Import, ...]:
    return tuple(found for name, file in modules().items() for found in imports_of(name, file))


def floor(module: str) -> int:
    first = "cli" if module.split(".")[0] == "cli" else (module.split(".") + [""])[1]
    return next((i for i, names in enumerate(FLOORS) if first in names), -1)


def test_every_file_has_a_floor() -> None:
    without = [name for name in modules() if name != "sharefold" and floor(name) < 0]
    assert without == [], "give it a place in FLOORS"


def test_nothing_imports_upward() -> None:
    upward = {
        (found.source, found.target)
        for found in imports()
        if found.source not in LAZY and floor(found.target) > floor(found.source) and not found.by_name
    }
    assert upward == set()


def test_no_import_of_ours_inside_a_function_or_by_name() -> None:
    inside = {
        (found.source, found.target)
        for found in imports()
        if (found.inside or found.by_name) and found.source not in LAZY and found.source.startswith("sharefold")
    }
    assert inside == set()


def test_no_circle_between_files() -> None:
    """Imports for the type checker count too: whom one must read first to understand a file."""
    edges: dict[str, set[str]] = {name: set() for name in modules()}
    for found in imports():
        if found.source in LAZY and found.inside:
            continue
        edges[found.source].add(found.target)
        # Importing a module runs the __init__ of its folder first, except for files of that folder.
        parts = found.target.split(".")
        for end in range(2, len(parts)):
            package = ".".join(parts[:end])
            if package in edges and not found.source.startswith(package):
                edges[found.source].add(package)
    circles = {frozenset(component) for component in components(edges) if len(component) > 1}
    assert circles == set()


def components(edges: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components (Tarjan 1972, https://doi.org/10.1137/0201010)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def enter(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in edges[node]:
            if other not in order:
                enter(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            part = []
            while not part or part[-1] != node:
                part.append(stack.pop())
            found.append(part)

    for node in edges:
        if node not in order:
            enter(node)
    return found


def test_components_finds_circles() -> None:
    found = components({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"d"}})
    assert sorted(sorted(part) for part in found) == [["a", "b", "c"], ["d"], ["e"]]


def test_file_names_occur_once() -> None:
    stems = Counter(file.stem for name, file in modules().items() if name.startswith("sharefold") and file.stem != "__init__")
    assert [stem for stem, count in stems.items() if count > 1] == []


MOST_PARAMETERS = 6
# Constructors that read worse with a record.
MORE_PARAMETERS = {
    "sharefold.calibration.statistics.Statistics.__init__": "made in one place, from CalibrationOptions and its choices",
    "sharefold.outputs.comparison.Comparison.__init__": "each stands for a step that is done here where it is not given",
    "sharefold.models.preact_resnet.PreActResNet.__init__": "the names by which timm makes a network",
}


def long_signatures() -> Iterator[str]:
    """Public functions, methods and constructors with more parameters than a reader keeps in mind; layers' constructors take
    their tensors, one a parameter."""

    def visit(node: ast.AST, scope: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                if not child.name.startswith("_"):
                    yield from visit(child, f"{scope}.{child.name}")
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                given = child.args.posonlyargs + child.args.args + child.args.kwonlyargs
                count = sum(argument.arg not in ("self", "cls") for argument in given) + (child.args.vararg is not None)
                public = child.name == "__init__" or not child.name.startswith("_")
                if public and count > MOST_PARAMETERS and not (child.name == "__init__" and "sharefold.layers." in scope):
                    yield f"{scope}.{child.name}"
            elif isinstance(child, (ast.If, ast.Try, ast.With)):
                yield from visit(child, scope)

    for name, file in modules().items():
        if name.split(".")[0] == "sharefold":
            yield from visit(ast.parse(file.read_text()), name)


def test_public_functions_take_few_parameters() -> None:
    assert sorted(long_signatures()) == sorted(MORE_PARAMETERS), "put the rest into an option record"
