"""What a network takes: one tensor, or several that belong together, as one batch.

Everything that runs networks hands batches on without asking how many tensors they are. So several tensors behave here as one
does: they have a length, are cut and indexed together, and move together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sharefold.errors import SharefoldError


class Inputs:
    """Several tensors (n, ...), one a parameter of ``forward``, in its order; their shapes and types may differ.

    Args:
        tensors: at least one; their first axes count the samples.
        what: who asks, for messages.

    Raises:
        SharefoldError: something that is no tensor, a tensor without an axis, or other lengths.
    """

    def __init__(self, tensors: Sequence[Tensor], what: str = "inputs") -> None:
        self.tensors = tuple(tensors)
        if not self.tensors:
            raise SharefoldError(f"{what}: there are no tensors: pass one for every input of the network")
        for place, tensor in enumerate(self.tensors, 1):
            if not isinstance(tensor, Tensor):
                raise SharefoldError(f"{what}: input {place} is a {type(tensor).__name__}: pass a tensor for every input")
            if tensor.ndim == 0:
                raise SharefoldError(f"{what}: input {place} is a single number: pass tensors (n, ...), a row a sample")
        if len({len(tensor) for tensor in self.tensors}) > 1:
            found = ", ".join(str(len(tensor)) for tensor in self.tensors)
            raise SharefoldError(f"{what}: the inputs are of {found} samples: pass as many of each, in one order")

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: slice | Tensor) -> Inputs:
        return self.each(lambda tensor: tensor[index])

    def each(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """What ``function`` makes of every tensor."""
        return Inputs([function(tensor) for tensor in self.tensors])

    def split(self, size: int | list[int]) -> list[Inputs]:
        """Parts of so many samples, as :meth:`torch.Tensor.split` makes them."""
        return [Inputs(parts) for parts in zip(*(tensor.split(size) for tensor in self.tensors), strict=True)]

    def to(self, device: torch.device | str, **how: Any) -> Inputs:
        """Every tensor on ``device``, each in its type; ``how`` as of :meth:`torch.Tensor.to`."""
        return self.each(lambda tensor: tensor.to(device, **how))

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.tensors[0].device

    def __repr__(self) -> str:
        return f"Inputs({shapes_of(self)})"


Input: TypeAlias = Tensor | Inputs
# As users pass it: several tensors as a tuple or a list.
Tensors: TypeAlias = Tensor | Inputs | Sequence[Tensor]
# And batches of such, from a loader.
AnyInput: TypeAlias = Tensors | Iterable[Sequence[Any]]


def each_of(given: Input) -> tuple[Tensor, ...]:
    """The tensors of a batch."""
    return given.tensors if isinstance(given, Inputs) else (given,)


def call(network: Callable[..., Any], given: Input) -> Any:
    """``network(tensor)``, or ``network(tensor, tensor, ...)``."""
    return network(*each_of(given))


def joined(parts: Sequence[Input]) -> Input:
    """Batches of one kind, one after another."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))  # type: ignore[arg-type]
    return Inputs([torch.cat(tensors) for tensors in zip(*map(each_of, parts), strict=True)])


def elements(given: Input) -> int:
    """Numbers in one sample."""
    return sum(tensor[0].numel() for tensor in each_of(given))


def shapes_of(given: Input) -> str:
    """For messages: ``(8, 3, 32, 32)``, and of several with commas between them."""
    return ", ".join(str(tuple(tensor.shape)) for tensor in each_of(given))


def image_shape(given: Input) -> tuple[int, ...]:
    """(C, H, W) of the first input that is an image, a float map; else the shape of the first input's sample."""
    maps = [tensor for tensor in each_of(given) if tensor.ndim == 4 and tensor.is_floating_point()]
    return tuple([*maps, *each_of(given)][0].shape[1:])


def taken(given: Tensors, what: str = "inputs") -> Input:
    """A tuple or list, as users and loaders give several tensors, as :class:`Inputs`, and one of one tensor as that tensor;
    anything else as it is.

    Raises:
        SharefoldError: as :class:`Inputs`.
    """
    if isinstance(given, Tensor | Inputs) or not isinstance(given, tuple | list):
        return given  # type: ignore[return-value]
    found = Inputs(given, what)
    return found if len(found.tensors) > 1 else found.tensors[0]


def parameters_of(model: nn.Module) -> tuple[list[str], int, bool]:
    """Names of the parameters of ``forward`` that tensors can be passed to in order, how many of them have no default, and
    whether any number more may follow (``*args``, or a ``forward`` that does not tell)."""
    parameters = _parameters(model)
    if parameters is None:
        return [], 0, True
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    more = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return [p.name for p in plain], sum(p.default is p.empty for p in plain), more


def _parameters(model: nn.Module) -> list[inspect.Parameter] | None:
    """Those of ``forward``; None where it does not tell."""
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return None


def _by_keyword_alone(model: nn.Module) -> list[str]:
    return [p.name for p in _parameters(model) or () if p.kind is p.KEYWORD_ONLY and p.default is p.empty]


def check_count(model: nn.Module, given: Input, what: str) -> None:
    """Checks that ``forward`` takes as many tensors as are given.

    Raises:
        SharefoldError: it takes others; says which.
    """
    names, needed, more = parameters_of(model)
    if alone := _by_keyword_alone(model):
        raise SharefoldError(f"{what}: forward of {type(model).__name__} takes {', '.join(alone)} by keyword alone: wrap it in a "
                             "network that takes tensors in order")  # fmt: skip
    count = len(each_of(given))
    if count < needed or (count > len(names) and not more):
        least = "" if needed == len(names) and not more else "at least " if count < needed else "at most "
        wanted = needed if count < needed else len(names)
        listed = ", ".join(names[:needed] if count < needed else names)
        tensors = "tensor is" if count == 1 else "tensors are"
        raise SharefoldError(
            f"{what}: {count} {tensors} given, forward of {type(model).__name__} takes {least}{wanted} ({listed}): "
            f"pass {'a tensor' if wanted == 1 else f'a tuple of {wanted} tensors'}"
        )
