"""Tensors that are made from others, and kept from run to run while those stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

Made = TypeVar("Made")


class Kept:
    """One such value; deep copies and pickles of it are empty."""

    def __init__(self) -> None:
        self._entry: _Entry | None = None
        self.never = False  # values are made anew at every run, and no memory is held

    def get(self, x: Tensor | None, sources: Iterable[Tensor], make: Callable[[], Made]) -> Made:
        """What ``make`` makes of ``sources`` for an input ``x``; made anew without one, or where gradients, tracers or
        compilers look on.

        torch counts no writes through ``.data`` and by collectives: :class:`Keeper` says what else makes it forget. Those of
        fused optimizers it does not count either; steps are counted here.
        """
        if self.never or x is None or symbolic(x):
            return make()
        if x.is_cuda and torch.cuda.is_current_stream_capturing():  # recorded: no values yet
            return make()
        if torch.is_grad_enabled():
            self.clear()  # somebody trains
            return make()
        tensors = tuple(sources)
        kind = x.device.type
        mode = _steps, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None, channels_last(x)
        # Read and written as one: networks run in several threads.
        entry = self._entry
        # This is asked at every run of a layer: what follows takes as long as a tenth of a small convolution.
        if entry is not None and entry.holds(mode, tensors):
            return entry.value
        if any(map(_uncounted, tensors)):
            return make()
        entry = _Entry.of(mode, tensors, make())
        # Fake tensors and their like must not outlive the mode that made them.
        parts = entry.value if isinstance(entry.value, tuple) else (entry.value,)
        if all(type(part) in (Tensor, nn.Parameter) for part in parts if part is not None):
            self._entry = entry
        return entry.value

    def clear(self) -> None:
        self._entry = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        copy = Kept()
        copy.never = self.never
        return copy

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


_steps = 0


def _count_step(*_: object) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


class _Entry(NamedTuple):
    """A value and what it was made of.

    A tensor that is freed leaves its address, and its ``id``, to the next one; so both the tensors and their memory are held
    while a later tensor could be taken for them.
    """

    mode: tuple[Any, ...]
    states: tuple[tuple[Tensor, int, int, torch.dtype], ...]
    memory: tuple[Tensor, ...]
    value: Any

    @classmethod
    def of(cls, mode: tuple[Any, ...], tensors: tuple[Tensor, ...], value: Any) -> _Entry:
        states = tuple((t, t._version, t.data_ptr(), t.dtype) for t in tensors)
        return cls(mode, states, tuple(t.detach() for t in tensors), value)

    def holds(self, mode: tuple[Any, ...], tensors: tuple[Tensor, ...]) -> bool:
        if mode != self.mode or len(tensors) != len(self.states):
            return False
        for tensor, (known, version, address, dtype) in zip(tensors, self.states, strict=True):
            # The same tensor first: those without a count of writes are never known.
            if tensor is not known or tensor._version != version or tensor.data_ptr() != address or tensor.dtype != dtype:
                return False
        return True


def own_tensors(*owners: nn.Module | None) -> Iterator[Tensor]:
    """Parameters and buffers of modules and of all within them; of one without children in a tenth of torch's time."""
    for owner in owners:
        if owner is None:
            continue
        if owner._modules:
            yield from owner.parameters()
            yield from owner.buffers()
            continue
        for tensors in (owner._parameters, owner._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    yield tensor


class Keeper(nn.Module):
    """A module that forgets what it keeps at ``train()``, ``eval()``, ``to()`` and their like."""

    def forget(self) -> None:
        for value in vars(self).values():
            if isinstance(value, Kept):
                value.clear()

    def keep_nothing(self) -> None:
        """From now on what it would keep is made anew at every run."""
        self.forget()
        for value in vars(self).values():
            if isinstance(value, Kept):
                value.never = True

    def train(self, mode: bool = True) -> Keeper:
        self.forget()
        super().train(mode)
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Keeper:
        self.forget()  # else the memory on the device that it leaves would be held
        super()._apply(*args, **kwargs)
        return self


def _uncounted(t: Tensor) -> bool:
    """Tensors without an address of their own (in ``vmap`` and the like) or without a count of writes."""
    return t.is_inference() or torch._C._functorch.is_functorch_wrapped_tensor(t)


def channels_last(x: Tensor) -> bool:
    """Whether maps lie with their channels last; not told within ``vmap``, where torch cannot say."""
    if x.ndim != 4 or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    return x.is_contiguous(memory_format=torch.channels_last)


def symbolic(x: Tensor) -> bool:
    """Tracers and compilers must see the composition itself. On the meta device there are no values to keep."""
    return isinstance(x, fx.Proxy) or torch.compiler.is_compiling() or torch.jit.is_tracing() or x.is_meta
