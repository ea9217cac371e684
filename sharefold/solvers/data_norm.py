"""The data norm: second moments of a layer's inputs and the output error they measure.

For a layer with im2col matrix ``W`` (O x N), input patches ``x`` with ``S = E[x x^T]`` and row weights ``D^2``::

    err(What) = || D (W - What) S^(1/2) ||_F^2 / || D W S^(1/2) ||_F^2

which is the relative error of the layer's output on the images ``S`` was collected from. The same norm is behind
SVD-LLM (arXiv 2403.07378), BALF (arXiv 2509.25136) and RegMean (arXiv 2212.09849).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from sharefold.errors import SharefoldError

Pair = int | Sequence[int]
FLOAT64_LIMIT = 1024
# The same where errors are estimated, for plans: in float32 they agree to four digits, in half the time.
ESTIMATE_LIMIT = 200
# Floor that solvers add to moments, relative to their mean diagonal.
RIDGE = 1e-6
PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def _pair(value: Pair) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, second = value
    return int(first), int(second)


def pad_amounts(
    padding: Pair | str, kernel: tuple[int, int], dilation: tuple[int, int] = (1, 1)
) -> tuple[int, int, int, int]:
    """Padding as (left, right, top, bottom); a sequence of four is taken to be in that order already.

    ``"same"`` puts the odd pixel right and below, as ``torch.nn.Conv2d`` does.
    """
    if isinstance(padding, str):
        if padding == "valid":
            return 0, 0, 0, 0
        if padding != "same":
            raise SharefoldError(f"padding: {padding!r}: expected 'same', 'valid', an int, a pair or four ints")
        high, wide = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        return wide // 2, wide - wide // 2, high // 2, high - high // 2
    if not isinstance(padding, int) and len(padding) == 4:
        left, right, top, bottom = (int(p) for p in padding)
        return left, right, top, bottom
    high, wide = _pair(padding)
    return wide, wide, high, high


def sample_rows(x: Tensor, positions: int | None, generator: torch.Generator | None = None) -> Tensor:
    """Rows of a Linear layer's input (B, ..., C): up to ``positions`` per image, as (P, 1, C)."""
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    length = rows.shape[1]
    if positions is not None and positions < length:
        index = _random_positions(rows.shape[0], length, positions, generator, x.device)
        rows = rows.gather(1, index.unsqueeze(2).expand(-1, -1, rows.shape[2]))
    return rows.reshape(-1, 1, x.shape[-1])


def _random_positions(
    images: int, length: int, positions: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """``positions`` distinct indices below ``length`` for every image, (images, positions), on ``device``."""
    drawn = torch.rand(images, length, generator=generator, device=None if generator is None else generator.device)
    return drawn.to(device).topk(positions, dim=1).indices  # sorting is what a GPU is there for


@dataclass(frozen=True)
class Window:
    """How a convolution walks over its input, everything as for ``torch.nn.Conv2d``.

    Attributes:
        padding: an int, a pair (vertical, horizontal), "same", "valid", or four ints (left, right, top, bottom).
    """

    kernel_size: Pair
    stride: Pair = 1
    padding: Pair | str = 0
    dilation: Pair = 1
    groups: int = 1
    padding_mode: str = "zeros"


def sample_patches(
    x: Tensor, window: Window | None, positions: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """im2col patches of a convolution's input at randomly chosen output positions.

    Only the sampled positions are gathered, so memory is B * positions * C * h * w and not that of a full unfold.

    Args:
        x: input map (B, C, H, W); without a ``window`` the input (B, ..., C) of a Linear layer.
        positions: output positions per image, drawn without replacement; None or too many takes all of them.

    Returns:
        (P, groups, C / groups * h * w), ordered as ``F.unfold`` orders them (channel, then kernel row and column).

    Raises:
        SharefoldError: the kernel does not fit the padded input, or an unknown padding.
    """
    if window is None:
        return sample_rows(x, positions, generator)
    kernel, step, spread = _pair(window.kernel_size), _pair(window.stride), _pair(window.dilation)
    pads = pad_amounts(window.padding, kernel, spread)
    if any(pads):
        if window.padding_mode not in PAD_MODES:
            raise SharefoldError(f"padding mode: {window.padding_mode!r}: expected one of {', '.join(PAD_MODES)}")
        x = F.pad(x, pads, mode=PAD_MODES[window.padding_mode])
    images, channels, height, width = x.shape
    out_h = (height - spread[0] * (kernel[0] - 1) - 1) // step[0] + 1
    out_w = (width - spread[1] * (kernel[1] - 1) - 1) // step[1] + 1
    if out_h < 1 or out_w < 1:
        raise SharefoldError(f"patches: kernel {kernel} does not fit the padded input {height} x {width}")
    length = out_h * out_w
    if positions is None or positions >= length:
        index = torch.arange(length, device=x.device).expand(images, length)
    else:
        index = _random_positions(images, length, positions, generator, x.device)
    corner = (index // out_w) * step[0] * width + (index % out_w) * step[1]
    rows = torch.arange(kernel[0], device=x.device) * spread[0] * width
    cols = torch.arange(kernel[1], device=x.device) * spread[1]
    offsets = (rows.unsqueeze(1) + cols.unsqueeze(0)).flatten()
    taps = offsets.numel()
    places = (corner.unsqueeze(2) + offsets).flatten(1)
    if x.is_contiguous(memory_format=torch.channels_last):  # the channels of a place are neighbours
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
        found = pixels[torch.arange(images, device=x.device)[:, None], places].unflatten(1, (-1, taps)).transpose(2, 3)
    else:
        flat = places.unsqueeze(1).expand(-1, channels, -1)
        found = x.flatten(2).gather(2, flat).reshape(images, channels, -1, taps).transpose(1, 2)
    return found.reshape(-1, window.groups, channels // window.groups * taps)


def working_dtype(columns: int, dtype: torch.dtype, estimate: bool = False) -> torch.dtype:
    """float64 where it is affordable (``columns`` up to 1024, 200 for estimates) or already used, else float32."""
    most = min(ESTIMATE_LIMIT, FLOAT64_LIMIT) if estimate else FLOAT64_LIMIT
    return torch.float64 if dtype == torch.float64 or columns <= most else torch.float32


def eigen_psd(matrix: Tensor, floor: float = 1e-10) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., N), clipped from below at ``floor`` times the largest, and eigenvectors (..., N, N).

    Clipping keeps rank-deficient moments of small calibration sets usable; an all-zero matrix clips at ``floor``.
    """
    values, vectors = torch.linalg.eigh((matrix + matrix.transpose(-1, -2)) / 2)
    top = values[..., -1:].clamp_min(0)
    top = torch.where(top > 0, top, torch.ones_like(top))
    lowest = max(floor, torch.finfo(matrix.dtype).eps)
    return torch.maximum(values, lowest * top), vectors


def solve_psd(matrix: Tensor, rhs: Tensor, ridge: float = 0.0) -> Tensor:
    """Solve ``matrix @ X = rhs`` for symmetric positive semi-definite (..., n, n), robust to rank deficiency.

    Cholesky where it goes through, eigenvalues with a floor where it does not. ``ridge`` is relative to the mean
    diagonal.
    """
    if ridge:
        scale = matrix.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None] * ridge
        matrix = matrix + scale * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not bool(info.any()):
        solution = torch.cholesky_solve(rhs, factor)
        if bool(torch.isfinite(solution).all()):
            return solution
    values, vectors = eigen_psd(matrix)
    return vectors @ ((vectors.transpose(-1, -2) @ rhs) / values.unsqueeze(-1))


@dataclass
class Problem:
    """A group of K same-shape layers (or conv groups of layers) as one batched problem.

    Attributes:
        weights: im2col matrices (K, O, N), N = I / groups * h * w.
        moments: ``E[x x^T]`` (K, N, N), centred where a bias or BatchNorm absorbs the mean; None means identity.
        row_weights: squared output scales ``D^2`` (K, O); None means ones.
        kernel: (h, w).
        layer_weights: (K,) factors of the layers in the summed error; None means 1 / energy (relative errors).
        estimate: errors are wanted to compare forms by, not a solution to keep.
    """

    weights: Tensor
    moments: Tensor | None = None
    row_weights: Tensor | None = None
    kernel: tuple[int, int] = (1, 1)
    layer_weights: Tensor | None = None
    estimate: bool = False
    _energy: Tensor | None = field(default=None, repr=False, compare=False)
    _weighted: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        members, rows, columns = self.weights.shape
        if self.moments is None:
            eye = torch.eye(columns, dtype=self.weights.dtype, device=self.weights.device)
            self.moments = eye.expand(members, columns, columns)
        if self.row_weights is None:
            self.row_weights = self.weights.new_ones(members, rows)
        for label, value, shape in (
            ("moments", self.moments, (members, columns, columns)),
            ("row weights", self.row_weights, (members, rows)),
            ("layer weights", self.layer_weights, (members,)),
        ):
            if value is not None and tuple(value.shape) != shape:
                raise SharefoldError(f"problem: {label} have shape {tuple(value.shape)}: expected {shape}")
        taps = self.kernel[0] * self.kernel[1]
        if columns % taps:
            raise SharefoldError(f"problem: {columns} columns are no multiple of the {self.kernel} kernel")

    @property
    def members(self) -> int:
        return self.weights.shape[0]

    @property
    def rows(self) -> int:
        return self.weights.shape[1]

    @property
    def columns(self) -> int:
        return self.weights.shape[2]

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def second(self) -> Tensor:
        """The moments (K, N, N); never None once constructed."""
        assert self.moments is not None
        return self.moments

    @property
    def row_metric(self) -> Tensor:
        """The row weights (K, O); never None once constructed."""
        assert self.row_weights is not None
        return self.row_weights

    @property
    def weighted(self) -> Tensor:
        """``W_k S_k`` (K, O, N), computed once."""
        if self._weighted is None:
            self._weighted = self.weights @ self.second
        return self._weighted

    def apply_left(self, value: Tensor) -> Tensor:
        """``D_k^2`` times (K, O, M)."""
        return self.row_metric.unsqueeze(2) * value

    def _norm(self, value: Tensor, image: Tensor) -> Tensor:
        return (self.apply_left(value) * image).sum(dim=(1, 2)).clamp_min(0)

    @property
    def energy(self) -> Tensor:
        """``|| D_k W_k S_k^(1/2) ||^2`` (K,)."""
        if self._energy is None:
            self._energy = self._norm(self.weights, self.weighted)
        return self._energy

    @property
    def objective_weights(self) -> Tensor:
        """Factors (K,) of the squared errors in the sum that solvers minimise."""
        if self.layer_weights is not None:
            return self.layer_weights.to(self.weights)
        energy = self.energy
        return torch.where(energy > 0, 1 / energy.clamp_min(torch.finfo(energy.dtype).tiny), torch.zeros_like(energy))

    def squared_errors(self, approx: Tensor) -> Tensor:
        """``|| D_k (W_k - approx_k) S_k^(1/2) ||^2`` (K,) for approximations (K, O, N)."""
        gap = self.weights - approx.to(self.weights)
        return self._norm(gap, gap @ self.second)

    def errors(self, approx: Tensor) -> Tensor:
        """Relative data-norm errors (K,) of the approximations (K, O, N); 0 for a layer that outputs nothing."""
        energy = self.energy
        squared = self.squared_errors(approx)
        return torch.where(energy > 0, squared / energy.clamp_min(torch.finfo(energy.dtype).tiny), 0 * squared)

    def error_sum(self, approx: Tensor) -> float:
        """The objective of the solvers: squared errors times ``objective_weights``, summed."""
        return float((self.objective_weights * self.squared_errors(approx)).sum())

    def working(self) -> Problem:
        """The same problem in the working precision (:func:`working_dtype`)."""
        return self.to(working_dtype(self.columns, self.weights.dtype, self.estimate))

    def for_estimates(self) -> Problem:
        """The same problem, solved in as little precision as estimates of errors need."""
        return Problem(self.weights, self.moments, self.row_weights, self.kernel, self.layer_weights, True)

    def to(self, dtype: torch.dtype) -> Problem:
        """The same problem with every tensor in ``dtype``; itself when nothing changes."""
        tensors = (self.weights, self.second, self.row_metric, self.layer_weights)
        if all(t is None or t.dtype == dtype for t in tensors):
            return self
        weights, moments, row_weights, layer_weights = (None if t is None else t.to(dtype) for t in tensors)
        assert weights is not None
        return Problem(weights, moments, row_weights, self.kernel, layer_weights, self.estimate)

    def select(self, index: Sequence[int] | Tensor) -> Problem:
        """The problem restricted to some of its layers."""
        index = torch.as_tensor(index, device=self.weights.device)
        factors = None if self.layer_weights is None else self.layer_weights[index]
        return Problem(self.weights[index], self.second[index], self.row_metric[index], self.kernel, factors, self.estimate)


def moment_floors(problem: Problem, ridge: float) -> Tensor:
    """Ridge (K,) to add to every moment: ``ridge`` times its mean diagonal; a layer without any input counts as 1."""
    diagonal = problem.second.diagonal(dim1=1, dim2=2).mean(dim=1)
    return ridge * torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal))
