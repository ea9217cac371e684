"""sharefold: turn a pretrained CNN into a smaller one whose layers share parameters.

>>> cal = sharefold.calibrate(model, images)                # doctest: +SKIP
>>> plan = sharefold.plan(model, "50%", cal)                # doctest: +SKIP
>>> report = sharefold.convert_(model, plan, cal)           # doctest: +SKIP
>>> sharefold.save(model, "resnet50-shared")                # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import Any

from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.version import __version__

# Name -> module; loaded on first use, so that `import sharefold` stays cheap and the command line starts at once.
_LAZY = {
    "calibrate": "sharefold.calibration.calibrate",
    "Calibration": "sharefold.calibration.calibrate",
    "plan": "sharefold.planner",
    "convert_": "sharefold.convert",
    "Conversion": "sharefold.convert",
    "round_": "sharefold.round",
    "Plan": "sharefold.plans",
    "CalibrationOptions": "sharefold.options",
    "PlanOptions": "sharefold.options",
    "ConvertOptions": "sharefold.options",
    "RefineOptions": "sharefold.options",
    "RoundOptions": "sharefold.options",
    "GroupOptions": "sharefold.options",
    "OpenOptions": "sharefold.options",
    "ExportOptions": "sharefold.options",
    "RunOptions": "sharefold.options",
    "VerifyOptions": "sharefold.options",
    "GroupPlan": "sharefold.plans",
    "build_plan": "sharefold.recipes",
    "save": "sharefold.checkpoint",
    "load": "sharefold.checkpoint",
    "expand": "sharefold.checkpoint",
    "analyze": "sharefold.graph",
    "open_source": "sharefold.sources",
    "evaluate_task": "sharefold.tasks",
    "TaskOptions": "sharefold.tasks",
    "TaskReport": "sharefold.tasks",
}

__all__ = ["SharefoldError", "SharefoldWarning", "__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name == "finetune":  # the package, which can be called: the function of its name would hide what else is in there
        return importlib.import_module("sharefold.finetune")
    if name not in _LAZY:
        raise AttributeError(f"module 'sharefold' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "finetune"])
