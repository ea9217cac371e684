"""What tensors hold, kept and written back in place, wherever their elements lie in memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from sharefold.errors import SharefoldWarning


def is_expanded(tensor: Tensor) -> bool:
    """Whether elements of ``tensor`` are one element in memory, as ``expand`` makes them: torch refuses to write to it."""
    return tensor.layout == torch.strided and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def has_values(tensor: Tensor) -> bool:
    """False on the meta device, where tensors are shapes alone; some subclasses name it and hold values elsewhere."""
    return not tensor.is_meta or tensor.data_ptr() != 0


def write(tensor: Tensor, value: Tensor) -> None:
    """``tensor.copy_(value)`` that also takes an expanded ``tensor``: ``value`` is the same along the axes that were expanded."""
    if is_expanded(tensor):
        for axis, stride in enumerate(tensor.stride()):
            if stride == 0:
                tensor, value = tensor.narrow(axis, 0, 1), value.narrow(axis, 0, 1)
    tensor.copy_(value)


def same_values(first: Tensor, second: Tensor) -> bool:
    """Whether both hold the same, NaN where the other has NaN; False where torch cannot compare them, as sparse tensors."""
    try:
        return torch.equal(first, second) or (
            first.shape == second.shape and bool(((first == second) | ((first != first) & (second != second))).all())
        )
    except RuntimeError:
        return False


class TensorValues:
    """What ``tensors`` hold now, in which memory, and whether they get gradients.

    Args:
        tensors: of any kind; they may share memory.
        let_go: whether they are no longer part of a graph of gradients afterwards, even if they are of one now.
    """

    def __init__(self, tensors: Iterable[Tensor], let_go: bool = False) -> None:
        self._before = [
            (tensor, tensor.detach(), tensor.detach().clone(), tensor.requires_grad, tensor.grad_fn is not None and not let_go)
            for tensor in tensors
        ]

    def put_back(self) -> bool:
        """Writes to those alone that have changed; gives whether there were any.

        Warns:
            SharefoldWarning: one could not be written to. All others are put back.
        """
        changed = False
        for tensor, memory, value, flag, in_graph in self._before:
            try:
                # A run with gradients leaves its graph behind.
                if tensor.grad_fn is not None and not in_graph:
                    tensor.detach_()
                changed = _put_back(tensor, memory, value) or changed
                if tensor.requires_grad != flag:
                    tensor.requires_grad_(flag)
            except RuntimeError as error:
                changed, reason = True, " ".join(str(error).split())[:200]
                warnings.warn(
                    f"model: a tensor {tuple(value.shape)} could not be put back ({reason}): load its values anew",
                    SharefoldWarning, stacklevel=2,
                )  # fmt: skip
        return changed


def _put_back(tensor: Tensor, memory: Tensor, value: Tensor) -> bool:
    """Whether it was elsewhere or held something else."""
    moved = _moved(tensor, memory)
    # By value: batch_norm writes its statistics without a new version.
    if not moved and same_values(tensor, value):
        return False
    # Tensors of inference mode can be written to within it alone. Leaving it turns gradients on.
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        if moved:
            tensor.data = memory
        if not same_values(tensor, value):
            write(tensor, value)
    return True


def _moved(tensor: Tensor, memory: Tensor) -> bool:
    """Whether ``tensor`` is no longer in ``memory``: ``model.to(...)`` gives parameters another one."""
    if tensor.device != memory.device or tensor.dtype != memory.dtype or tensor.shape != memory.shape:
        return True
    return tensor.layout == torch.strided and tensor.data_ptr() != memory.data_ptr()
