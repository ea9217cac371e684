"""One block run N times: convolutions shared by all iterations, norms of every iteration's own."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sharefold.errors import SharefoldError
from sharefold.layers.bank import not_replicated
from sharefold.layers.form import STOCK_LAYERS


class _Running(threading.local):
    """Which iteration runs in this thread, by the ``id`` of the place."""

    def __init__(self) -> None:
        self.steps: dict[int, int] = {}


_running = _Running()


class PerIteration(nn.ModuleList):
    """A place in the block that holds another module in every iteration."""

    step = 0  # which one runs, for compilers, which know no threads

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self[self.step](x)
        step = _running.steps.get(id(self))
        if step is None:
            raise SharefoldError("a part of a repeated block was run outside of its iterations: run the whole block")
        return self[step](x)


class RepeatedBlock(nn.Module):
    """One block for N iterations (layer reuse, https://arxiv.org/abs/1901.09615); itself the first of them.

    The other iterations are :class:`Again` modules at the places of the other blocks, so that every iteration's output
    can still be looked at under the name of the block that it replaces. :func:`repeat_blocks` makes them all.

    Args:
        blocks: N modules of one structure. The first one becomes the block; the norms of all of them are kept.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.count = len(blocks)
        self.block = blocks[0]
        for name in own_modules(blocks[0]):
            parent, _, leaf = name.rpartition(".")
            setattr(self.block.get_submodule(parent), leaf, PerIteration(b.get_submodule(name) for b in blocks))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, 0)

    def run(self, x: Tensor, step: int) -> Tensor:
        """Iteration ``step`` on ``x``, whose shape it keeps."""
        places = [module for module in self.block.modules() if isinstance(module, PerIteration)]
        if torch.compiler.is_compiling():
            for place in places:
                place.step = step
            return self.block(x)
        steps = {id(place): step for place in places}
        # What a backward pass has set below comes back: the whole network may be computed again in the midst of it.
        before = {key: _running.steps[key] for key in steps if key in _running.steps}
        _running.steps.update(steps)
        try:
            y = self.block(x)
        finally:
            for key in steps:
                _running.steps.pop(key, None)
            _running.steps.update(before)
        if isinstance(y, Tensor) and y.requires_grad:
            # Activation checkpointing runs parts of the block again while gradients go through it, first of all through `y`.
            y.register_hook(lambda gradient: _running.steps.update(steps))
        return y

    def unrolled(self) -> list[nn.Module]:
        """N separate blocks that compute the same in sequence, each with tensors of its own."""
        return [self._iteration(step) for step in range(self.count)]

    def _iteration(self, step: int) -> nn.Module:
        block = copy.deepcopy(self.block)
        for name, module in list(block.named_modules()):
            if isinstance(module, PerIteration):
                parent, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(parent), leaf, cast(nn.Module, module[step]))
        return block

    def extra_repr(self) -> str:
        return f"iterations={self.count}"


class Again(nn.Module):
    """Iteration ``step`` of a repeated block, to which it holds a reference that torch does not register again."""

    first: RepeatedBlock

    def __init__(self, first: RepeatedBlock, step: int) -> None:
        super().__init__()
        self.__dict__["first"] = first
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.first.run(x, self.step)

    _replicate_for_data_parallel = not_replicated

    def extra_repr(self) -> str:
        return f"iteration={self.step}"


def repeat_blocks(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """What goes to the places of ``blocks``: the repeated block, then its other iterations."""
    first = RepeatedBlock(blocks)
    return [first, *(Again(first, step) for step in range(1, len(blocks)))]


def resolve(model: nn.Module, name: str) -> Any:
    """The module or tensor called ``name`` in the dense network, also inside of a repeated block; or by the name that it has in
    this one.

    Raises:
        AttributeError: there is none.
    """
    found: Any = model
    step = 0
    for part in name.split(".") if name else []:
        if isinstance(found, RepeatedBlock) and part == "block" and not hasattr(found.block, "block"):
            found = found.block
            continue
        if isinstance(found, PerIteration):
            if part.isdigit() and not hasattr(found[step], part):
                found = found[int(part)]
                continue
            found = found[step]
        if isinstance(found, Again):
            found, step = found.first.block, found.step
        elif isinstance(found, RepeatedBlock):
            found, step = found.block, 0
        found = getattr(found, part)
    return found[step] if isinstance(found, PerIteration) else found


def own_modules(block: nn.Module) -> list[str]:
    """Names of the modules in ``block`` that every iteration has for itself."""
    return [
        name
        for name, module in block.named_modules()
        if name and not isinstance(module, STOCK_LAYERS) and not any(module.children())
        and (any(True for _ in module.parameters()) or any(True for _ in module.buffers()))
    ]  # fmt: skip


def shared_parameters(block: nn.Module) -> list[str]:
    """Names of the parameters in ``block`` that all iterations use, repeats of one tensor left out."""
    own = own_modules(block)
    return [
        name for name, _ in block.named_parameters() if not any(name.startswith(f"{module}.") for module in own)
    ]
