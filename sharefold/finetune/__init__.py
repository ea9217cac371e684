"""Fine-tuning of shared networks: ``sharefold.finetune(model, train, val, teacher=teacher, epochs=10)``.

The package is callable, because ``sharefold.finetune`` is at once this package and the verb. Nothing heavy is imported
until the verb is used.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sharefold.finetune.config import FinetuneConfig

if TYPE_CHECKING:
    from sharefold.finetune.loop import FinetuneReport, finetune

__all__ = ["FinetuneConfig", "FinetuneReport", "finetune"]


def __getattr__(name: str) -> Any:
    if name in {"FinetuneReport", "finetune"}:
        from sharefold.finetune import loop

        return getattr(loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Verb(ModuleType):
    """A module that can be called like the function it is named after."""

    def __call__(self, *args: Any, **kwargs: Any) -> FinetuneReport:
        return self.finetune(*args, **kwargs)


sys.modules[__name__].__class__ = _Verb
