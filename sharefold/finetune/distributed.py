"""Which of how many processes this is, and the few collectives the loop needs.

The launcher is torchrun or ``accelerate launch``: both set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT,
on one machine or many, and that is all that is read here. Without them a run is alone and nothing is initialised.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharefold.errors import SharefoldError
from sharefold.running import usable_device


@dataclass(frozen=True)
class World:
    """This process among its peers, and the device it works on."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over processes, a new tensor."""
        values = values.detach().clone()
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def largest(self, values: list[float]) -> list[float]:
        """Elementwise maximum over processes."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def from_first(self, value: Any) -> Any:
        """The first process's ``value``, on every process (so that only one needs to see the run's folder)."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Returns once every process is here."""
        if self.size > 1:
            dist.barrier()


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """``auto``: this process's GPU, else mps, else the CPU. Raises SharefoldError for a device that is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", local_rank)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SharefoldError(f"device: {name!r}: use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SharefoldError(f"device: {name}: this machine has no usable CUDA GPU: use --device cpu")
        device = torch.device("cuda", device.index if device.index is not None else local_rank)
    return usable_device(device)


@contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """Joins the processes of the launcher (nccl on GPUs, gloo otherwise) and leaves them at the end.

    A process group that the caller has initialised is used and left alone.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    where = pick_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if dist.is_available() and dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), where)
    elif size == 1:
        yield World(0, 1, where)
    else:
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
        try:
            yield World(rank, size, where)
        finally:
            # Reducers hold the group and lie in cycles. One that is left is taken apart as the interpreter ends, when its threads
            # can no longer be joined, and now and then a process is aborted.
            gc.collect()
            dist.destroy_process_group()
