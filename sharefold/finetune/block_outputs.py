"""Watching the outputs of the same blocks in student and teacher."""

from __future__ import annotations

import re
from collections.abc import Callable, Container
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from sharefold.errors import SharefoldError
from sharefold.layers import STOCK_LAYERS, SharedConv


def _weighted_layers(module: nn.Module) -> int:
    return sum(isinstance(m, (*STOCK_LAYERS, SharedConv)) for m in module.modules())


def giving_tensors(model: nn.Module, run: Callable[[], object]) -> set[str]:
    """Names of the modules that give a tensor while ``run`` runs ``model``: not of those whose parts are called one by one."""
    found: set[str] = set()

    def note(name: str) -> Any:
        return lambda module, inputs, output: found.add(name) if isinstance(output, Tensor) else None

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def matching_blocks(
    student: nn.Module, teacher: nn.Module, pattern: str = "auto", giving: Container[str] | None = None
) -> list[str]:  # fmt: skip
    """Names of modules to compare, present in both networks, in the teacher's order.

    ``auto`` takes the repeated blocks: members of a Sequential, ModuleList or ModuleDict with at least two weighted
    layers in the teacher, the innermost where they nest, and of these only modules in ``giving`` (:func:`giving_tensors`) where
    that is known. Else ``pattern`` must match a name as a whole.

    Raises:
        SharefoldError: nothing matches.
    """
    both = {name for name, _ in student.named_modules()}
    modules = {name: module for name, module in teacher.named_modules() if name and name in both}
    if pattern != "auto":
        chosen = [name for name in modules if re.fullmatch(pattern, name)]
    else:
        holders = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
        parents = {name: teacher.get_submodule(name.rpartition(".")[0]) for name in modules}
        blocks = [n for n, m in modules.items() if isinstance(parents[n], holders) and _weighted_layers(m) >= 2]
        blocks = [n for n in blocks if not isinstance(modules[n], (nn.ModuleList, nn.ModuleDict))]
        blocks = [n for n in blocks if giving is None or n in giving]
        chosen = [n for n in blocks if not any(other.startswith(n + ".") for other in blocks)]
    if not chosen:
        raise SharefoldError(
            f"finetune: block_names={pattern!r}: student and teacher have no such block in common: name some with a "
            "regular expression, or set block_match to 0"
        )
    return chosen


class Taps:
    """Keeps the last output of the named modules while active; use as a context manager."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.model, self.names = model, names
        self._seen: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._seen[name] = output

        return hook

    def outputs(self) -> list[Tensor]:
        """The outputs since the last call, in the order of the names; they are forgotten here."""
        seen, self._seen = self._seen, {}
        missing = [name for name in self.names if not isinstance(seen.get(name), Tensor)]
        if missing:
            raise SharefoldError(f"finetune: block {missing[0]!r} did not return a tensor: name other blocks to match")
        return [seen[name] for name in self.names]

    def __enter__(self) -> Taps:
        self._hooks = [self.model.get_submodule(n).register_forward_hook(self._keep(n)) for n in self.names]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        self._seen = {}
