"""Scripts of benchmarks/ and scripts/ as modules: they are no packages."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from doc_blocks import ROOT


def load_script(path: str, name: str | None = None) -> ModuleType:
    """The script at ``path`` below the project's root, under ``name`` or its own in ``sys.modules``.

    Executed once: a second copy's classes would be others, and could not be pickled.
    """
    file = ROOT / path
    name = name or file.stem
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(file):
        return known
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
