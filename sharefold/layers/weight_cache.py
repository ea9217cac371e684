"""Tensors that are made from others, and kept from run to run while those stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from operator import is_
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

Made = TypeVar("Made")


class Kept:
    """One such value; deep copies and pickles of it are empty."""

    def __init__(self) -> None:
        self._entry: _Entry | None = None
        self._ready: _Ready | None = None
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

    def ready(self, x: Tensor) -> Any:
        """What :meth:`get` would give, in a fraction of its time; None where that has to be asked.

        Between two convolutions of a small map nothing else takes as long as finding out that nothing has changed.
        """
        ready = self._ready
        return ready.entry.value if ready is not None and ready.serves(x) else None

    def watch(self, owner: nn.Module, other: str) -> None:
        """From now on :meth:`ready` answers by the tensors of ``owner`` and of its attribute ``other``, a module that torch does
        not know of, or None: they are all that the kept value is made of."""
        entry, ready = self._entry, self._ready
        if entry is None or entry.autocast is not None or (ready is not None and ready.entry is entry):
            return
        second = owner.__dict__[other]
        plain = not owner._modules and (second is None or not second._modules)
        # The value may have been made of other tensors than the kept one, and not been kept.
        if plain and entry.states and entry.holds(entry.mode, tuple(own_tensors(owner, second))):
            self._ready = _Ready(entry, owner, other)

    def unwatch(self) -> None:
        """:meth:`get` is asked the next time; what is kept stays."""
        self._ready = None

    def clear(self) -> None:
        self._entry = self._ready = None

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

    @property
    def autocast(self) -> torch.dtype | None:
        """What autocast computed in, None where it was off."""
        return self.mode[1]

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


class _Ready:
    """An entry, and the places that hold what it was made of."""

    __slots__ = ("addresses", "device", "entry", "last", "other", "owner", "places", "second", "steps", "tensors", "versions")

    def __init__(self, entry: _Entry, owner: nn.Module, other: str) -> None:
        self.entry = entry
        self.steps, _, self.last = entry.mode
        self.owner, self.other, self.second = owner.__dict__, other, owner.__dict__[other]
        modules = [owner] if self.second is None else [owner, self.second]
        held = [tensors for module in modules for tensors in (module._parameters, module._buffers) if tensors]
        self.places = [(tensors, tuple(tensors.values())) for tensors in held]
        self.tensors = [tensor for _, values in self.places for tensor in values if tensor is not None]
        self.device = self.tensors[0].device.type
        self.versions = [tensor._version for tensor in self.tensors]
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]

    def serves(self, x: Tensor) -> bool:
        if type(x) is not Tensor or torch.is_grad_enabled() or x.is_meta:
            return False
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._functorch.is_functorch_wrapped_tensor(x):
            return False
        last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
        if last is not self.last or self.steps != _steps or torch.is_autocast_enabled(self.device):
            return False
        if self.owner.get(self.other) is not self.second:
            return False
        # The same objects first: others may have no memory. Built-in loops, as this is most of what a small layer adds.
        for tensors, values in self.places:
            if len(tensors) != len(values) or not all(map(is_, tensors.values(), values)):
                return False
        if [tensor._version for tensor in self.tensors] != self.versions:
            return False
        return [tensor.data_ptr() for tensor in self.tensors] == self.addresses


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
