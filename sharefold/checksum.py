"""Whether tensors are still what was written: a CRC-32 over a file's text and tensors, and no NaN or infinity.

A checksum tells damage, not intent: who changes a file on purpose writes a new checksum, too.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from sharefold.errors import SharefoldError

ALGORITHM = "crc32"


def checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Eight hexadecimal digits over ``text`` and names, types, shapes and bytes of ``tensors``, whatever their order.

    About 1 GB a second; no copy of a contiguous tensor on the CPU is made.
    """
    found = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found = zlib.crc32(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode(), found)
        if tensor.numel():
            found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


def not_finite(tensor: Tensor) -> str:
    """``"NaN"`` or ``"infinity"`` where a floating tensor holds some, else ``""``; two passes, no copy."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
        return ""
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    values = values.float() if values.element_size() == 1 else values  # 8-bit floats have few operators
    least, most = (float(end) for end in torch.aminmax(values.detach()))
    if math.isfinite(least) and math.isfinite(most):
        return ""
    return "NaN" if math.isnan(least) or math.isnan(most) else "infinity"


def check_types(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuses types that a safetensors file cannot hold (complex128), naming the first tensor.

    Raises:
        SharefoldError: some tensor has one.
    """
    kinds: dict[torch.dtype, bool] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in kinds:
            try:
                kinds[tensor.dtype] = bool(save({"": torch.zeros(1, dtype=torch.uint8).to(tensor.dtype)}))
            except (KeyError, SafetensorError, NotImplementedError):
                kinds[tensor.dtype] = False
        if not kinds[tensor.dtype]:
            raise SharefoldError(f"output {where}: tensor {name!r} is of {tensor.dtype}, which safetensors files cannot hold: "
                                 "give it another type, or keep it out of the state dict")  # fmt: skip


def check_finite(tensors: Mapping[str, Tensor], where: str, advice: str) -> None:
    """Refuses NaN and infinity, naming the first tensor.

    Raises:
        SharefoldError: some tensor holds one.
    """
    for name, tensor in tensors.items():
        what = not_finite(tensor)
        if what:
            raise SharefoldError(f"weights hold {what}: {name} in {where}: {advice}")
