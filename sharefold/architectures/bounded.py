"""Building what a file asks for without believing its sizes.

First the network is built on the meta device, where tensors have shapes and no memory, and compared with the tensors of the
file; only then for real, with parameters still on the meta device, since those of the file take their places.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook, register_module_parameter_registration_hook

from sharefold.errors import SharefoldError

# A network may have so many more modules and parameters than its file has tensors: those that share, and modules without any.
_MODULES_PER_TENSOR, _FREE_MODULES = 16, 8192
_FREE_BUFFERS = 1 << 26


@contextmanager
def limited_modules(tensors: int, where: str) -> Iterator[None]:
    """While active, networks of far more parts than a file of ``tensors`` tensors can be about are refused.

    Raises:
        SharefoldError: within, when the limit is passed.
    """
    left = _FREE_MODULES + _MODULES_PER_TENSOR * tensors

    def count(owner: nn.Module, name: str, part: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise SharefoldError(f"{where}: its architecture has far more layers than the file has tensors: it is damaged")

    handles = [register_module_module_registration_hook(count), register_module_parameter_registration_hook(count)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """While active, parameters keep their shapes only; buffers are real, also those that no file holds."""

    def emptied(owner: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if type(parameter) is not nn.Parameter or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(emptied)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def check_buffers(model: nn.Module, held: int, where: str) -> None:
    """Refuses a network whose buffers, which building allocates, a file with ``held`` bytes of tensors does not explain.

    Those that no file holds are meant: tables of positions and the like are under two thirds of the weights in timm's networks
    at their own image sizes.

    Args:
        model: on any device, the meta device included.

    Raises:
        SharefoldError: they have more than twice the bytes, and 64 MB.
    """
    found = sum(t.numel() * t.element_size() for t in model.buffers())
    if found > 2 * held + _FREE_BUFFERS:
        raise SharefoldError(
            f"{where}: its network has {found:,} bytes of buffers, far more than the {held:,} bytes of its tensors explain: give "
            "its builder smaller windows or images, or it is damaged"
        )
