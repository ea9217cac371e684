"""How networks are run here: where they compute, on copies of images, in eval mode."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from sharefold.errors import SharefoldError
from sharefold.inputs import Input, Inputs, call, elements
from sharefold.tensor_values import has_values
from sharefold.untrusted import first_line, quoted

# Pixels of an image from which on channels last is faster.
LARGE_IMAGE = 96 * 96
# Packages whose networks take them so.
PACKAGES = ("timm.", "torchvision.", "segmentation_models_pytorch.", "ultralytics.", "sharefold.")
_PLAIN: WeakSet[type] = WeakSet()  # but not these
# Numbers of the images of a batch: larger batches leave the processor's caches, and take twice as long an image.
BATCH_ELEMENTS = 1 << 22
Images = TypeVar("Images", Tensor, Inputs, Input)
COMPUTED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def device_of(model: nn.Module) -> torch.device:
    """Where ``model`` computes: the device of its first parameter, the CPU where it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def usable_device(device: torch.device | str, cpu: str = "cpu") -> torch.device:
    """``device``, after a try whether tensors can be made there.

    Args:
        cpu: what messages advise in its place.

    Raises:
        SharefoldError: there is no such device here.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise SharefoldError(f"device {quoted(device)} is not known: use cpu, cuda or cuda:N") from error
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = first_line(error).split(". ")[0]
        raise SharefoldError(f"device '{found}' cannot be used here ({reason}): try {cpu}") from error
    return found


def dtype_of(model: nn.Module) -> torch.dtype:
    """What ``model`` takes images in: the type of its first parameter of a floating type to compute in, float32 without one."""
    return next((p.dtype for p in model.parameters() if p.dtype in COMPUTED), torch.float32)


def as_input(model: nn.Module, images: Images) -> Images:
    """A copy of ``images`` where ``model`` computes, and, if they are of a floating type, in the type that it computes in; of
    several inputs each by itself.

    Large images lie channels last on a CPU, which its convolutions take faster; networks keep the order on their way. Those of
    libraries alone: code that calls ``view`` on a map, as users' often does, wants the other order.
    """
    if isinstance(images, Inputs):
        return images.each(lambda tensor: as_input(model, tensor))
    device, dtype = device_of(model), dtype_of(model) if images.is_floating_point() else images.dtype
    large = device.type == "cpu" and images.ndim == 4 and images.shape[2] * images.shape[3] >= LARGE_IMAGE
    layout = torch.channels_last if large and _takes_channels_last(model) else torch.preserve_format
    return images.to(device, dtype, copy=True, memory_format=layout)


def keep_plain(model: nn.Module) -> bool:
    """From now on networks of this class get images in the plain order; False where they do already."""
    changed = _takes_channels_last(model)
    _PLAIN.add(type(model))
    return changed


def _takes_channels_last(model: nn.Module) -> bool:
    return type(model).__module__.startswith(PACKAGES) and type(model) not in _PLAIN


def check_shapes(model: nn.Module) -> None:
    """Checks that every parameter and buffer has a shape.

    Raises:
        SharefoldError: lazy modules that have not run yet.
    """
    if any(nn.parameter.is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise SharefoldError(f"model: {type(model).__name__} has lazy modules without shapes: run it once first")


def check_values(model: nn.Module, what: str = "model") -> None:
    """Checks that every parameter and buffer holds values.

    Args:
        what: ``model`` in the message.

    Raises:
        SharefoldError: names the first one that is on the meta device.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not has_values(tensor):
            reason = f"{name} is on the meta device and has no values"
            raise SharefoldError(f"{what}: {reason}: load them with assign=True, or build the network elsewhere")


def check_open(model: nn.Module) -> None:
    """Checks that no part of ``model`` is compiled or a TorchScript program: hooks are not called there, or not allowed.

    Raises:
        SharefoldError: names the first part that is.
    """
    for name, module in model.named_modules():
        where = f"its part {name}" if name else "it"
        if isinstance(module, torch.jit.ScriptModule):
            raise SharefoldError(
                f"model: {where} is a TorchScript program: pass the network that it was made from, and script it once converted"
            )
        if isinstance(getattr(module, "_orig_mod", None), nn.Module):
            raise SharefoldError(f"model: {where} is compiled: pass the network itself (_orig_mod) and compile it once converted")


def run_on(model: nn.Module, images: Input) -> Any:
    """What ``model`` makes of :func:`as_input` of ``images``: some networks write into their input."""
    return call(model, as_input(model, images))


def has_doubles(device: torch.device) -> bool:
    """Whether ``device`` knows float64 (Apple's GPUs do not)."""
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except TypeError:
        return False
    return True


@contextmanager
def random_kept(*models: nn.Module) -> Iterator[None]:
    """The generators of torch (on the CPU and on GPUs where ``models`` are), numpy and Python are as before at the end: some
    networks draw random numbers whenever they run."""
    devices = {p.device.index or 0 for model in models for p in model.parameters() if p.device.type == "cuda"}
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Models in eval mode without gradients; every module's own mode comes back at the end."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


_alone = threading.Lock()
_inside, _threads = 0, 1  # how many are within `one_thread`, and what the first of them found


@contextmanager
def one_thread() -> Iterator[None]:
    """While active, torch computes by one CPU thread; the setting of before comes back with the last to leave."""
    global _inside, _threads
    with _alone:
        if _inside == 0:
            _threads = torch.get_num_threads()
            torch.set_num_threads(1)
        _inside += 1
    try:
        yield
    finally:
        with _alone:
            _inside -= 1
            if _inside == 0:
                torch.set_num_threads(_threads)


def evenly(count: int, most: int) -> Tensor:
    """Indices of at most ``most`` of ``count`` things, evenly spaced from the first to the last."""
    return torch.linspace(0, count - 1, min(most, count)).long()


def batch_of(images: Input, most: int = 250, least: int = 1) -> int:
    """How many of ``images`` (n, C, H, W) a forward pass without gradients takes at best, between ``least`` and ``most``."""
    return batch_within(BATCH_ELEMENTS, elements(images), most, least)


def batch_within(elements: int, each: int, most: int, least: int = 1) -> int:
    """Images a batch: as many as have ``elements`` numbers in all at ``each`` an image, between ``least`` and ``most``."""
    return max(least, min(most, elements // max(1, each)))


def runs_within(limit: int, needs: Sequence[int]) -> list[list[int]]:
    """Indices of ``needs``, in order, cut into runs of at most ``limit`` together; what needs more alone is a run of its own."""
    runs: list[list[int]] = []
    size = 0
    for index, need in enumerate(needs):
        if not runs or size + need > limit:
            runs.append([])
            size = 0
        runs[-1].append(index)
        size += need
    return runs
