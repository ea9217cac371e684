"""Networks of the user's own class: ``FILE.py:FACTORY``, Python code that the user names and that builds the dense network.

Only what is typed by the user gets here. No file that sharefold reads can name code.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from torch import Tensor, nn

from sharefold.architectures.shapes import compare, shapes_of
from sharefold.errors import SharefoldError
from sharefold.sources.unwrap import PREFIXES, under
from sharefold.untrusted import expanded, printable

_FORM = re.compile(r"(.+\.py):([A-Za-z_]\w*)", re.DOTALL)
_FILE = re.compile(r"\.py(:|$)")


def is_own(arch: str | None) -> bool:
    """Whether ``arch`` names a Python file, rather than an architecture of a library."""
    return arch is not None and _FILE.search(arch) is not None


def own_network(arch: str) -> nn.Module:
    """Runs the file and calls FACTORY, a class or function without arguments; the network as it comes, in eval mode.

    Args:
        arch: ``FILE.py:FACTORY``. The file finds what lies beside it, as when Python runs it.

    Raises:
        SharefoldError: no such file or name in it, the file or FACTORY fails, or what it gives is no network.
    """
    found = _FORM.fullmatch(arch)
    if found is None:
        raise SharefoldError(f"--arch {arch}: want FILE.py:FACTORY, a class or function in the file that builds the network")
    path, name = expanded(found.group(1)), found.group(2)
    where = f"--arch {printable(arch)}"
    if not path.is_file():
        raise SharefoldError(f"{where}: there is no file {printable(str(path))}: check the path")
    with _beside(path):
        factory = getattr(_run(path, where), name, None)
        if not callable(factory):
            raise SharefoldError(f"{where}: the file has no class or function {name}")
        try:
            network = factory()
        except (Exception, SystemExit) as error:  # the user's code raises what it likes
            hint = "it must need no arguments" if isinstance(error, TypeError) else "see that it runs in Python"
            raise SharefoldError(f"{where}: {name}() fails ({_reason(error)}): {hint}") from error
    if not isinstance(network, nn.Module):
        raise SharefoldError(f"{where}: {name}() gives a {type(network).__name__}: want the network, a torch.nn.Module")
    return network.eval()


def fitting_part(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What in ``state`` is ``model``: trainers store networks under a name. All of it where no part fits."""
    for prefix in ("", *PREFIXES):
        part = under(state, prefix)
        if not len(compare(shapes_of(part), model)):
            return part
    return state


def _run(path: Path, where: str) -> ModuleType:
    name = path.stem
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) != str(path.resolve()):
        name = f"sharefold_own_{name}"  # never in the place of another module
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None, "the suffix is .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and copies look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # scripts read a command line, or end by themselves
        del sys.modules[name]
        hint = "see that Python can import it"
        if isinstance(error, ImportError) and "no known parent package" in str(error):
            hint = f"a file of a package is imported from one beside it: from {path.resolve().parent.name}.{path.stem} import ..."
        raise SharefoldError(f"{where}: the file fails ({_reason(error)}): {hint}") from error
    return module


@contextmanager
def _beside(path: Path) -> Iterator[None]:
    """The file's folder is where imports look first."""
    before = list(sys.path)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        yield
    finally:
        sys.path[:] = before


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return printable(f"{type(error).__name__}: {lines[0]}"[:200] if lines else type(error).__name__)
