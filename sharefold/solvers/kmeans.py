"""Weight sharing by clustering under the data norm, at three grains.

- layers: whole matrices fall into sub-groups, each tied to one matrix;
- filters: the rows of all layers share a codebook of rows;
- kernels: the h x w slices of all layers share a codebook of slices. Product quantisation of weights under output
  errors follows And the Bit Goes Down (arXiv 1907.05686).

Rows may carry a scale. Assignments are exact minimisers given the codebook (for slices one input channel at a
time), codebooks exact weighted least squares given the assignments, so the objective never rises.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sharefold.errors import SharefoldError
from sharefold.options import chosen
from sharefold.solvers.cg import LinearSystem, conjugate_gradient
from sharefold.solvers.data_norm import Problem, eigen_psd, moment_floors
from sharefold.solvers.solve_options import SolveOptions
from sharefold.solvers.tie import RowSolver, best_scales

SEED_SLICES = 50_000
CHUNK = 2**24


@dataclass(frozen=True)
class ClusterOptions(SolveOptions):
    """Alternations of assignments and codebooks.

    Attributes:
        restarts: seedings to try, the best is kept; None takes 5 for whole layers, which are few, and 1 otherwise.
    """

    rounds: int = 15
    restarts: int | None = None


@dataclass
class ClusterSolution:
    """Codes into a codebook, with optional row scales.

    Attributes:
        grain: "layer", "filter" or "kernel".
        codes: int64, (K,), (K, O) or (K, O, I).
        codebook: (C, O, N), (C, N) or (C, h * w).
        scale: (K, O), or None.
        errors: relative data-norm errors (K,).
        history: the objective (weighted squared errors, summed); non-increasing.
    """

    grain: str
    codes: Tensor
    codebook: Tensor
    scale: Tensor | None
    errors: Tensor
    history: list[float] = field(default_factory=list)

    @property
    def approximation(self) -> Tensor:
        """The composed matrices (K, O, N)."""
        value = self.codebook[self.codes]
        if self.grain == "kernel":
            value = value.flatten(2)
        return value if self.scale is None else self.scale.unsqueeze(2) * value

    @property
    def parameters(self) -> int:
        """Numbers kept: codebook and scales."""
        return self.codebook.numel() + (0 if self.scale is None else self.scale.numel())

    @property
    def bits(self) -> int:
        """Bits of the packed codes."""
        return self.codes.numel() * code_bits(self.codebook.shape[0])


def code_bits(clusters: int) -> int:
    """Bits of one code."""
    return max(0, clusters - 1).bit_length()


def cost(grain: str, clusters: int, problem: Problem, scale: bool = True) -> tuple[int, int]:
    """(parameters, bits of the codes) of a group clustered at this grain."""
    members, rows, columns = problem.weights.shape
    inputs = columns // problem.taps
    entry, codes = {
        "layer": (rows * columns, members),
        "filter": (columns, members * rows),
        "kernel": (problem.taps, members * rows * inputs),
    }[grain]
    return clusters * entry + int(scale) * members * rows, codes * code_bits(clusters)


def solve(
    problem: Problem,
    clusters: int,
    grain: str = "filter",
    *,
    scale: bool = True,
    generator: torch.Generator | None = None,
    options: ClusterOptions | None = None,
    **settings: Any,
) -> ClusterSolution:
    """Cluster a group at one grain.

    Args:
        clusters: codebook entries, 1 .. the number of things clustered.
        grain: "layer", "filter" or "kernel".
        scale: one scale per layer and output channel.
        generator: seeds k-means++; None seeds with 0.
        options, settings: a record, or its fields by keyword.

    Raises:
        SharefoldError: unknown grain, or a cluster count that does not fit.
    """
    options = chosen(options, settings, ClusterOptions)
    members, rows, columns = problem.weights.shape
    things = {"layer": members, "filter": members * rows, "kernel": members * rows * (columns // problem.taps)}
    if grain not in things:
        raise SharefoldError(f"cluster: grain {grain!r}: expected one of {', '.join(things)}")
    if not 1 <= clusters <= things[grain]:
        raise SharefoldError(f"cluster: {clusters} clusters: this group has 1 to {things[grain]} {grain}s")
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    dtype = problem.weights.dtype
    problem = problem.working()
    work = _Slices(problem, options.ridge) if grain == "kernel" else _Rows(problem, options.ridge, grain)
    restarts = options.restarts
    if restarts is None:
        restarts = 5 if grain == "layer" and 1 < clusters < members else 1
    codes, codebook, scales, history = min(
        (work.run(clusters, scale, options.rounds, options.tol, generator) for _ in range(max(1, restarts))),
        key=lambda run: run[3][-1],
    )
    solution = ClusterSolution(grain, codes, codebook.to(dtype), scales.to(dtype) if scale else None, codebook, history)
    solution.errors = problem.errors(solution.approximation).to(dtype)
    return solution


class _Rows:
    """Layer and filter grain: both cluster rows, at layer grain all rows of a layer together."""

    def __init__(self, problem: Problem, ridge: float, grain: str) -> None:
        self.problem = problem
        self.grain = grain
        self.solver = RowSolver(problem, ridge)
        self.image = self.solver.times_moment(problem.weights)
        self.norms = (self.image * problem.weights).sum(dim=2)
        self.mass = problem.objective_weights[:, None] * problem.row_metric

    def rows_of(self, codebook: Tensor, codes: Tensor) -> Tensor:
        return codebook[codes]

    def entry_errors(self, entries: Tensor, scale: bool) -> Tensor:
        """Errors of every row with every entry: (K, O, C) for filters (C, N), (K, C) for layers (C, O, N)."""
        result = []
        for k in range(self.problem.members):
            moment, ridge = self.solver.moments[k], self.solver.ridge[k]
            if self.grain == "filter":
                image = entries @ moment + ridge * entries
                cross, norm = (
                    self.problem.weights[k] @ image.T,
                    (image * entries).sum(dim=1).expand(self.problem.rows, -1),
                )
                result.append(self.mass[k][:, None] * _gap(self.norms[k][:, None], cross, norm, scale))
                continue
            image = entries @ moment + ridge * entries
            cross, norm = (image * self.problem.weights[k]).sum(dim=2), (image * entries).sum(dim=2)
            result.append((self.mass[k] * _gap(self.norms[k], cross, norm, scale)).sum(dim=1))
        return torch.stack(result)

    def seed(self, clusters: int, scale: bool, generator: torch.Generator) -> Tensor:
        """k-means++: entries drawn with probability proportional to the error of the best entry so far."""
        things = self.problem.weights.flatten(0, 1) if self.grain == "filter" else self.problem.weights
        nearest = self.mass * self.norms
        nearest = (nearest if self.grain == "filter" else nearest.sum(dim=1)).flatten()
        picked: list[int] = []
        for _ in range(clusters):
            picked.append(_draw(nearest, picked, generator))
            nearest = torch.minimum(nearest, self.entry_errors(things[picked[-1:]], scale).flatten())
        return things[picked].clone()

    def scales(self, chosen: Tensor, previous: Tensor) -> Tensor:
        """Best scales (K, O) for the chosen rows (K, O, N)."""
        return best_scales(self.image, chosen, self.solver.times_moment(chosen), previous)

    def update(self, codebook: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        clusters = codebook.shape[0]
        members, rows, columns = self.problem.weights.shape
        if self.grain == "filter":
            slots, count = codes, clusters
        else:
            slots, count = codes[:, None] * rows + torch.arange(rows, device=codes.device), clusters * rows
        mixture = self.mass.new_zeros(members, count).scatter_add_(1, slots, self.mass * scales.square())
        weighted = (self.mass * scales).unsqueeze(2) * self.image
        rhs = weighted.new_zeros(count, columns).index_add_(0, slots.flatten(), weighted.flatten(0, 1))
        return self.solver.solve(mixture, rhs, codebook.reshape(count, columns), steps=15).reshape_as(codebook)

    def revive(self, codebook: Tensor, codes: Tensor, errors: Tensor) -> Tensor:
        """Give unused entries the worst fitted rows, for the next assignment to use."""
        used = torch.zeros(codebook.shape[0], dtype=torch.bool, device=codes.device)
        used[codes.flatten()] = True
        idle = (~used).nonzero().flatten()
        if idle.numel():
            things = self.problem.weights.flatten(0, 1) if self.grain == "filter" else self.problem.weights
            codebook = codebook.clone()
            codebook[idle] = things[errors.flatten().topk(idle.numel()).indices]
        return codebook

    def run(
        self, clusters: int, scale: bool, rounds: int, tol: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, list[float]]:
        codebook = self.seed(clusters, scale, generator)
        ones = torch.ones_like(self.mass)
        history: list[float] = []
        best: tuple[Tensor, Tensor, Tensor] | None = None
        for _ in range(rounds + 1):
            errors, codes = self.entry_errors(codebook, scale).min(dim=-1)
            scales = self.scales(self.rows_of(codebook, codes), ones) if scale else ones
            value = float(errors.clamp_min(0).sum())
            if history and not value <= history[-1]:
                break
            history.append(value)
            best = (codes, codebook, scales)
            if len(history) > 1 and history[-2] - value <= tol * history[-2]:
                break
            codebook = self.revive(self.update(codebook, codes, scales), codes, errors)
        assert best is not None
        return *best, history


def _gap(own: Tensor, cross: Tensor, norm: Tensor, scale: bool) -> Tensor:
    """``|| w - s c ||^2`` from inner products, at the best s or at s = 1."""
    if not scale:
        return own - 2 * cross + norm
    safe = norm > torch.finfo(norm.dtype).tiny
    return own - torch.where(safe, cross.square() / torch.where(safe, norm, torch.ones_like(norm)), 0 * cross)


def _draw(mass: Tensor, taken: list[int], generator: torch.Generator) -> int:
    """An index with probability proportional to ``mass``; any untaken one where all mass is spent."""
    weight = mass.clamp_min(0).double().cpu()
    weight[taken] = 0
    if float(weight.sum()) <= 0:
        weight = torch.ones_like(weight)
        weight[taken] = 0
    total = weight.cumsum(0)
    # Not multinomial: that refuses more than 2^24 categories.
    point = torch.rand((), generator=generator, dtype=torch.float64, device=generator.device).cpu() * total[-1]
    return int(torch.searchsorted(total, point, right=True).clamp_max(weight.numel() - 1))


class _Slices:
    """Kernel grain: codes (K, O, I) into h * w vectors."""

    def __init__(self, problem: Problem, ridge: float) -> None:
        self.problem = problem
        self.taps = problem.taps
        members, _, columns = problem.weights.shape
        self.inputs = columns // self.taps
        self.floors = moment_floors(problem, ridge)[:, None, None]
        self.mass = problem.objective_weights[:, None] * problem.row_metric
        self.target = self.times_moment(problem.weights)
        split = problem.second.reshape(members, self.inputs, self.taps, self.inputs, self.taps)
        eye = torch.eye(self.taps, dtype=split.dtype, device=split.device)
        self.blocks = split.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2) + self.floors[..., None] * eye

    def times_moment(self, matrices: Tensor) -> Tensor:
        return matrices @ self.problem.second + self.floors * matrices

    def compose(self, codebook: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        return scales.unsqueeze(2) * codebook[codes].flatten(2)

    def objective(self, approx: Tensor) -> float:
        gap = self.problem.weights - approx
        return float((self.mass * (gap * self.times_moment(gap)).sum(dim=2)).sum())

    def seed(self, scales: Tensor, clusters: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """k-means++ and a few Lloyd rounds in one common metric of a slice: a start for the exact rounds."""
        slices = (self.problem.weights / scales.unsqueeze(2)).reshape(-1, self.taps)
        metric = torch.einsum("k,kits->ts", self.mass.sum(dim=1), self.blocks)
        values, vectors = eigen_psd(metric)
        white = slices @ (vectors * values.sqrt())
        heavy = (self.mass * scales.square()).unsqueeze(2).expand(-1, -1, self.inputs).reshape(-1)
        sample, weight = white, heavy
        if white.shape[0] > SEED_SLICES:
            index = torch.randperm(white.shape[0], generator=generator, device=generator.device)[:SEED_SLICES]
            sample, weight = white[index.to(white.device)], heavy[index.to(white.device)]
        centres = sample.new_empty(clusters, self.taps)
        nearest = weight * sample.square().sum(dim=1)
        picked: list[int] = []
        for c in range(clusters):
            picked.append(_draw(nearest, picked, generator))
            centres[c] = sample[picked[-1]]
            nearest = torch.minimum(nearest, weight * (sample - centres[c]).square().sum(dim=1))
        for _ in range(10):
            codes = _closest(sample, centres)
            total = torch.zeros_like(centres[:, 0]).index_add_(0, codes, weight)
            sums = torch.zeros_like(centres).index_add_(0, codes, weight[:, None] * sample)
            centres = torch.where(total[:, None] > 0, sums / total.clamp_min(1e-30)[:, None], centres)
        codes = _closest(white, centres).reshape(*self.mass.shape, self.inputs)
        return codes, (centres / values.sqrt()) @ vectors.T

    def assign(self, codebook: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        """One sweep over the input channels, each given its exactly best codes while the others stay."""
        codes = codes.clone()
        gap = self.problem.weights - self.compose(codebook, codes, scales)
        for i in range(self.inputs):
            part = slice(i * self.taps, (i + 1) * self.taps)
            blocks = self.blocks[:, i]
            current = scales.unsqueeze(2) * codebook[codes[:, :, i]]
            gradient = gap @ self.problem.second[:, :, part] + self.floors * gap[:, :, part]
            pull = current @ blocks + gradient
            norms = torch.einsum("ct,kts,cs->kc", codebook, blocks, codebook)
            costs = scales.square().unsqueeze(2) * norms.unsqueeze(1) - 2 * scales.unsqueeze(2) * (pull @ codebook.T)
            codes[:, :, i] = costs.argmin(dim=2)
            gap[:, :, part] += current - scales.unsqueeze(2) * codebook[codes[:, :, i]]
        return codes

    def update(self, codebook: Tensor, codes: Tensor, scales: Tensor, steps: int = 10) -> Tensor:
        """Codebook by conjugate gradients on the normal equations, preconditioned entry by entry."""
        clusters, flat = codebook.shape[0], codes.flatten()
        weight = (self.mass * scales).unsqueeze(2)

        def gather(image: Tensor) -> Tensor:
            return codebook.new_zeros(clusters, self.taps).index_add_(0, flat, (weight * image).reshape(-1, self.taps))

        members = codes.shape[0]
        slots = torch.arange(members * self.inputs, device=codes.device).reshape(members, 1, self.inputs)
        mass = codebook.new_zeros(clusters * members * self.inputs)
        share = (self.mass * scales.square()).unsqueeze(2).expand_as(codes)
        mass.index_add_(0, (codes * members * self.inputs + slots).flatten(), share.reshape(-1))
        local = torch.einsum("ckj,kjts->cts", mass.reshape(clusters, members, self.inputs), self.blocks)
        idle = mass.reshape(clusters, -1).sum(dim=1) <= 0
        local[idle] = torch.eye(self.taps, dtype=local.dtype, device=local.device)
        values, vectors = eigen_psd(local)

        def precondition(residual: Tensor) -> Tensor:
            return (vectors @ ((vectors.transpose(1, 2) @ residual.unsqueeze(2)) / values.unsqueeze(2))).squeeze(2)

        def apply(entries: Tensor) -> Tensor:
            return gather(self.times_moment(self.compose(entries, codes, scales)))

        return conjugate_gradient(LinearSystem(apply, gather(self.target), precondition), codebook, steps=steps)

    def run(
        self, clusters: int, scale: bool, rounds: int, tol: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, list[float]]:
        ones = torch.ones_like(self.mass)
        scales = self.problem.weights.square().mean(dim=2).sqrt() if scale else ones
        scales = torch.where(scales > 0, scales, ones)
        codes, codebook = self.seed(scales, clusters, generator)
        history = [self.objective(self.compose(codebook, codes, scales))]
        for _ in range(rounds):
            before = (codes, codebook, scales)
            codes = self.assign(codebook, codes, scales)
            codebook = self.update(codebook, codes, scales)
            if scale:
                rows = codebook[codes].flatten(2)
                scales = best_scales(self.target, rows, self.times_moment(rows), scales)
            value = self.objective(self.compose(codebook, codes, scales))
            if not value <= history[-1]:
                codes, codebook, scales = before
                break
            history.append(value)
            if history[-2] - value <= tol * history[-2]:
                break
        return codes, codebook, scales, history


def _closest(points: Tensor, centres: Tensor) -> Tensor:
    """Index of the nearest centre (M,) of points (M, t), in chunks."""
    half = centres.square().sum(dim=1) / 2
    step = max(1, CHUNK // centres.shape[0])
    return torch.cat([(half - part @ centres.T).argmin(dim=1) for part in points.split(step)])
