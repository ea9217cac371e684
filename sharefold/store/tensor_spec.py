"""How the tensors of a network are stored: what a user asks for, and what was decided for every tensor."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sharefold.budget import parse_budget
from sharefold.errors import SharefoldError
from sharefold.store.rans import LARGEST

FORMAT = 1
# Row scales lie on a grid of sixteenth octaves below the tensor's largest, so that one byte holds a scale.
OCTAVE = 16
_ATTRIBUTE = "sharefold_store"
KINDS = ("raw", "fp16", "fill", "int", "grid", "codebook", "coded")
HINT = "use fp16, int2 to int8, kmeans2 to kmeans8, or mixed:SIZE such as mixed:0.4MB"


@dataclass(frozen=True)
class StoreRequest:
    """What a user asks for.

    Attributes:
        kind: ``"fp16"``, ``"grid"`` (integers of fixed width), ``"codebook"`` or ``"coded"`` (entropy coded).
        bits: width of a grid or codebook index.
        step: of "coded": rounding step relative to every layer's output, the larger the smaller the file.
        budget: of "coded": bytes of the whole file; the step is then chosen.
    """

    kind: str
    bits: int = 16
    step: float = 0.0
    budget: int | None = None


def parse_store(text: str | StoreRequest) -> StoreRequest:
    """Reads ``fp16``, ``int4``, ``kmeans4``, ``mixed:0.4MB`` (whole file) or ``mixed:step=0.003``.

    Raises:
        SharefoldError: none of these.
    """
    if isinstance(text, StoreRequest):
        return text
    name = text.strip().lower()
    if name == "fp16":
        return StoreRequest("fp16")
    match = re.fullmatch(r"(int|kmeans)([2-8])", name)
    if match:
        return StoreRequest("grid" if match[1] == "int" else "codebook", int(match[2]))
    match = re.fullmatch(r"mixed:step=([0-9.e-]+)", name)
    if match:
        try:
            step = float(match[1])
        except ValueError:
            step = 0.0
        if 0 < step < 1:
            return StoreRequest("coded", step=step)
    elif name.startswith("mixed:"):
        budget = parse_budget(text.strip()[6:])
        # A bare number or "400k" can only be a size here.
        if budget.unit in ("bytes", "parameters") and not budget.share:
            return StoreRequest("coded", budget=int(budget.value))
    raise SharefoldError(f"store {text!r} is not understood: {HINT}")


@dataclass
class TensorSpec:
    """How one tensor is stored.

    Attributes:
        kind: ``raw`` as it is, ``fp16``, ``fill`` (one value), ``int`` (an integer tensor, packed), ``grid`` (packed
            codes times a row scale), ``codebook`` (packed indices of levels times a row scale), ``coded`` (as grid,
            entropy coded, any integer).
        bits: of ``grid`` and ``codebook``.
        top: the largest row scale.
        scales: row scale r is ``top * 2^(-scales[r] / 16)``.
        levels: of ``codebook``, ascending float16 values.
    """

    kind: str
    bits: int = 0
    top: float = 0.0
    scales: list[int] = field(default_factory=list)
    levels: list[float] = field(default_factory=list)

    def row_scales(self) -> Tensor:
        """(O, 1) float32."""
        table = torch.tensor([self.top * 2.0 ** (-k / OCTAVE) for k in range(256)], dtype=torch.float64)
        return table[torch.tensor(self.scales, dtype=torch.int64)].float().unsqueeze(1)

    def codes(self, matrix: Tensor, scales: Tensor | None = None) -> Tensor:
        """Nearest codes (O, N) int64 of a matrix (O, N): signed integers, or indices of levels.

        ``scales`` are the row scales, when the caller has them at hand.
        """
        return self._nearest_codes(matrix.detach().float().cpu() / (self.row_scales() if scales is None else scales)).long()

    def _nearest_codes(self, ratio: Tensor) -> Tensor:
        """Of values in units of the row scale; integers of a floating type where codes are numbers."""
        if self.kind == "codebook":
            levels = self._levels(ratio)
            return torch.bucketize(ratio, (levels[1:] + levels[:-1]) / 2)
        return ratio.round().clamp(-self.limit, self.limit)

    def _levels(self, like: Tensor) -> Tensor:
        return torch.tensor(self.levels, dtype=like.dtype, device=like.device)

    def nearest(self, ratio: Tensor) -> Tensor:
        """The nearest values that codes can stand for, of any shape and on any device, in units of the row scale."""
        codes = self._nearest_codes(ratio)
        return self._levels(ratio)[codes] if self.kind == "codebook" else codes

    def values(self, codes: Tensor, scales: Tensor | None = None) -> Tensor:
        """The matrix (O, N) float32 that ``codes`` stand for."""
        scales = self.row_scales() if scales is None else scales
        if self.kind == "codebook":
            return torch.tensor(self.levels, dtype=torch.float32)[codes] * scales
        return codes.float() * scales

    @property
    def limit(self) -> int:
        """The largest integer code."""
        return LARGEST if self.kind == "coded" else 2 ** (self.bits - 1) - 1

    def snapped(self, tensor: Tensor) -> Tensor:
        """The nearest value of ``tensor`` that the file can hold; same shape, type and device."""
        if self.kind == "fp16":
            return tensor.half().to(tensor.dtype)
        if self.kind not in ("grid", "codebook", "coded"):
            return tensor
        matrix = tensor.detach().reshape(len(self.scales), -1)
        return self.values(self.codes(matrix)).reshape(tensor.shape).to(tensor)


def rows_of(tensor: Tensor) -> int:
    """How many row scales a tensor has: a vector is one row."""
    return tensor.shape[0] if tensor.dim() > 1 else 1


def scaled(kind: str, scales: Tensor, bits: int = 0) -> TensorSpec:
    """A spec whose row scales are those nearest on the grid to ``scales`` (O,)."""
    scales = scales.detach().double().cpu()
    top = float(scales.max().float())
    codes = (OCTAVE * torch.log2(top / scales)).round().clamp(0, 255).long()
    return TensorSpec(kind, bits, top, codes.tolist())


@dataclass
class StoreSpec:
    """How every tensor of a state dict is stored; tensors that are not named are kept as they are."""

    tensors: dict[str, TensorSpec]

    def fits(self, tensors: dict[str, Tensor]) -> bool:
        """Whether every tensor lies exactly on its grid, so that the file loses nothing."""
        return all(
            name in tensors and bool((spec.snapped(tensors[name]) == tensors[name]).all())
            for name, spec in self.tensors.items()
        )


def carried_spec(model: nn.Module) -> StoreSpec | None:
    """How the tensors of ``model`` were rounded; None for full precision."""
    spec = getattr(model, _ATTRIBUTE, None)
    return spec if isinstance(spec, StoreSpec) else None


def carry_spec(model: nn.Module, spec: StoreSpec | None) -> None:
    """Leaves ``spec`` on the model for ``save``, or takes it off."""
    if spec is not None:
        setattr(model, _ATTRIBUTE, spec)
    elif hasattr(model, _ATTRIBUTE):
        delattr(model, _ATTRIBUTE)
