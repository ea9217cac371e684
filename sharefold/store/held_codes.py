"""Networks whose rounded tensors stay small in memory: layers hold the codes of a file and make numbers of them when they run."""

from __future__ import annotations

from collections import Counter
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sharefold.errors import SharefoldError
from sharefold.layers.weight_cache import Keeper
from sharefold.store.tensor_spec import StoreSpec, TensorSpec, rows_of

HELD = ("fp16", "grid", "codebook", "coded")


class Codes(nn.Module):
    """Numbers out of codes, bit for bit those of ``spec.values``; a parametrization of one tensor.

    Args:
        spec: how the tensor was rounded.
        like: the tensor, for its shape and type.
    """

    type_of: Tensor
    scales: Tensor
    levels: Tensor

    def __init__(self, spec: TensorSpec, like: Tensor) -> None:
        super().__init__()
        self.spec, self.shape = spec, like.shape
        # Empty, but it goes with the network to other number types, which the numbers then have.
        self.register_buffer("type_of", torch.empty(0, dtype=like.dtype))
        # Bits of float32 as whole numbers, which stay what they are when the network goes to another type.
        scales = spec.row_scales() if spec.kind != "fp16" else torch.empty(0)
        self.register_buffer("scales", scales.view(torch.int32))
        self.register_buffer("levels", torch.tensor(spec.levels, dtype=torch.float32).view(torch.int32))

    def forward(self, codes: Tensor) -> Tensor:
        if self.spec.kind == "fp16":
            return codes.view(torch.float16).to(self.type_of.dtype)
        numbers = self.levels.view(torch.float32)[codes.int()] if self.spec.kind == "codebook" else codes.float()
        return (numbers * self.scales.view(torch.float32)).reshape(self.shape).to(self.type_of.dtype)

    def right_inverse(self, tensor: Tensor) -> tuple[Tensor]:
        if self.spec.kind == "fp16":
            return (tensor.half().view(torch.int16),)
        codes = self.spec.codes(tensor.detach().reshape(rows_of(tensor), -1)).to(tensor.device)
        kind = torch.uint8 if self.spec.kind == "codebook" else torch.int8 if int(codes.abs().max()) <= 127 else torch.int16
        return (codes.to(kind),)


@torch.no_grad()
def hold_codes_(model: nn.Module, spec: StoreSpec) -> int:
    """Replaces the matrices of ``model`` that lie on the grids of ``spec`` by their codes, in place.

    Layers put their weights together at every run and keep none of them. The network is for inference: what holds codes has no
    gradient, and cannot be saved or expanded.

    Returns:
        How many tensors are held as codes.
    """
    places = Counter(id(parameter) for parameter in _every(model))
    held = 0
    for name, entry in spec.tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        tensor = module._parameters.get(leaf)
        if tensor is None or tensor.dim() < 2 or places[id(tensor)] > 1 or entry.kind not in HELD:
            continue
        tensor.requires_grad_(False)
        parametrize.register_parametrization(module, leaf, Codes(entry, tensor).to(tensor.device), unsafe=True)
        held += 1
    if held:
        for module in model.modules():
            if isinstance(module, Keeper):
                module.keep_nothing()
    return held


def check_holds_none(model: nn.Module, what: str) -> None:
    """Checks that no layer of ``model`` holds codes.

    Raises:
        SharefoldError: one does.
    """
    for name, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList) and isinstance(module[0], Codes):
            layer = name.partition(".parametrizations")[0]
            raise SharefoldError(f"{what}: layer {layer!r} holds the codes of its file: load the network without keep_codes")


def _every(model: nn.Module) -> list[nn.Parameter]:
    return [cast(nn.Parameter, p) for module in model.modules() for p in module._parameters.values() if p is not None]
