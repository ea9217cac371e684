"""Refinement of a network that was rounded: its codes, the scales of its rows and its offsets learn what the original says.

Behind every code stands a position, which moves and is rounded in the forward pass; gradients go straight through (Bengio et al.,
https://arxiv.org/abs/1308.3432). It starts where the value was when it was rounded, and not at the code: weights that lie between
two codes have a short way to the other. A price on codes that are not zero holds an entropy coded file at its size: it rises
while the file is too large and falls while there is room.
"""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sharefold.budget import Effort
from sharefold.options import RefineOptions
from sharefold.plans import Plan
from sharefold.repair.confidence import Confidence
from sharefold.repair.learned import adamw, group_of
from sharefold.repair.refine import DEFAULT_SECONDS, checked, clock_for, training
from sharefold.repair.step_record import StepRecord
from sharefold.repair.work import Work
from sharefold.state_dicts import trial
from sharefold.store.quantize import StoreReport
from sharefold.store.settle import settle_rounded
from sharefold.store.size import file_bytes
from sharefold.store.tensor_spec import OCTAVE, StoreRequest, StoreSpec, TensorSpec, carry_spec, parse_store

# Steps of a position and of a row's gain, in those of a code and in its logarithm, for a step of 1 of a tensor's own size.
POSITION, GAIN = 0.1, 0.5
# Adam's memory of squared gradients: the usual 1,000 updates are more than a whole run has.
BETAS = (0.9, 0.99)
# What a file too large by a factor of e adds to the price at the end of an epoch, in gradients; and the file that is aimed at.
RISE, AIM = 1.0, 0.995
# The scale of the logits is free in training.
WIDEST = 4.0
NAME = "refine codes"


def refine_codes(work: Work, report: StoreReport, options: RefineOptions) -> StepRecord:
    """Trains ``work.model``, which was rounded as ``report`` says, in place.

    It is kept only if the divergence falls and the file has the size that it had, or that was asked for. ``report`` is then
    brought up to date.
    """
    model, guard = work.model, work.guard
    before = guard.current(model)
    options = checked(options)
    clock, codes = clock_for(work, options), Codes(model, report)
    kept, after = False, math.nan
    try:
        with trial(model) as tried:
            with closing(training(work, codes, clock, options, Confidence(work))) as loop:
                for _ in loop:
                    pass
            if codes.finite() and (spec := codes.settled()) is not None:
                found = replace(report, spec=spec, bytes=file_bytes(model, spec))
                now = guard.divergence(model)
                guard.settle(now)
                factors = settle_rounded(work, found, WIDEST)
                after = guard.divergence(model) if factors else now
                if guard.better(after, before):
                    kept = True
                    tried.keep()
                    report.spec, report.bytes = found.spec, found.bytes
    finally:
        carry_spec(model, report.spec)
    guard.settle(after if kept else before)
    details = {
        "epochs": clock.epochs(), "seconds": clock.elapsed(), "changed": round(codes.changed(), 4), "file_bytes": report.bytes,
    }  # fmt: skip
    return StepRecord(NAME, kept, "", before, after, clock.elapsed(), details, guard.images)


def efforts(effort: Effort | None, plan: Plan) -> tuple[Effort | None, Effort | None]:
    """How much of ``effort`` is for the network before it is rounded, and how much for its codes: half of it each, or all for one
    of them where the other has nothing to mend."""
    coarse = bool(plan.store) and worth_refining(parse_store(plan.store or ""))
    if effort is None or not coarse:
        return effort, None
    if not plan.groups:
        return None, effort
    if effort.epochs is None and effort.seconds is None:
        effort = Effort(seconds=DEFAULT_SECONDS)
    epochs, seconds = effort.epochs, effort.seconds
    half = Effort(None if epochs is None else -(-epochs // 2), None if seconds is None else seconds / 2)
    return half, half


def worth_refining(request: StoreRequest) -> bool:
    """Whether what ``request`` asks for is coarse enough to be mended: not halves, or eight bits a weight."""
    return request.kind == "coded" or (request.kind in ("grid", "codebook") and request.bits < 8)


class Codes:
    """The positions, gains and offsets behind the tensors of ``model``, which lies on the grids of ``report.spec``.

    Offsets are the vectors of more than one value: those of one value are stored as one number.
    """

    def __init__(self, model: nn.Module, report: StoreReport) -> None:
        self.model, self.spec = model, report.spec
        self.limit = None if report.request.kind != "coded" else report.request.budget or report.bytes
        self.price = 0.0
        self.tensors = {name: p for name, p in model.named_parameters() if name in self.spec.tensors and p.is_floating_point()}
        self.rows: dict[str, _Rows] = {}
        self.offsets: dict[str, nn.Parameter] = {}
        for name, tensor in self.tensors.items():
            entry = self.spec.tensors[name]
            if entry.kind in ("coded", "grid", "codebook") and tensor.ndim > 1:
                self.rows[name] = _Rows(tensor, entry, report.positions.get(name))
            elif tensor.numel() and bool((tensor != tensor.flatten()[0]).any()):
                self.offsets[name] = nn.Parameter(tensor.detach().float().clone())

    def optimizers(self, step: float) -> list[torch.optim.Optimizer]:
        positions = [rows.position for rows in self.rows.values()]
        gains = [rows.gain for rows in self.rows.values()]
        groups: list[dict[str, Any]] = [{"params": positions, "lr": POSITION * step}, {"params": gains, "lr": GAIN * step}]
        return [adamw([*groups, *(group_of(offset, step) for offset in self.offsets.values())], BETAS)]

    @torch.no_grad()
    def take_gradients(self) -> None:
        for name, rows in self.rows.items():
            rows.take(self.tensors[name], self.price)
        for name, offset in self.offsets.items():
            gradient = self.tensors[name].grad
            offset.grad = None if gradient is None else gradient.float()

    @torch.no_grad()
    def show(self) -> None:
        for name, rows in self.rows.items():
            self.tensors[name].copy_((rows.nearest() * rows.scale()).reshape(self.tensors[name].shape))
        self._show_offsets()

    def _show_offsets(self) -> None:
        for name, offset in self.offsets.items():
            self.tensors[name].copy_(self.spec.tensors[name].snapped(offset.detach()))

    def epoch_ends(self) -> None:
        if self.limit is not None and self.finite():
            size = file_bytes(self.model, self._on_grids())
            self.price = max(0.0, self.price + RISE * math.log(size / (AIM * self.limit)))
            self.show()

    def finite(self) -> bool:
        moved = [part for rows in self.rows.values() for part in (rows.position, rows.gain)]
        return all(bool(tensor.isfinite().all()) for tensor in (*moved, *self.offsets.values(), *self.model.parameters()))

    @torch.no_grad()
    def _on_grids(self) -> StoreSpec:
        """Puts every row on the nearest scale that a file can hold; gives how everything is then stored."""
        found: dict[str, TensorSpec] = dict(self.spec.tensors)
        for name, rows in self.rows.items():
            found[name] = entry = rows.stored()
            values = rows.nearest() * entry.row_scales().to(rows.position)
            self.tensors[name].copy_(values.reshape(self.tensors[name].shape))
        self._show_offsets()
        return StoreSpec(found)

    def settled(self) -> StoreSpec | None:
        """As the file will hold it. Where that is too large, codes of 1 that the loss feels least become 0, as few as will do, by
        doubling; None if it does not fit even so."""
        spec = self._on_grids()
        most = sum(rows.position.numel() for rows in self.rows.values())
        count = max(64, most // 4096)
        while self.limit is not None and file_bytes(self.model, spec) > self.limit:
            if count >= most:
                return None
            self._drop(count)
            spec, count = self._on_grids(), 2 * count
        return spec

    @torch.no_grad()
    def _drop(self, count: int) -> None:
        costs = torch.cat([rows.costs().flatten() for rows in self.rows.values()])
        dearest = float(costs.kthvalue(min(count, costs.numel())).values)
        for rows in self.rows.values():
            rows.drop(dearest)

    def changed(self) -> float:
        """Share of the codes that are others than before."""
        changed = sum(int((rows.nearest() != rows.first).sum()) for rows in self.rows.values())
        return changed / max(1, sum(rows.first.numel() for rows in self.rows.values()))


class _Rows:
    """One matrix: positions (O, N) in steps of their rows, and the logarithms of what the rows' scales are multiplied by."""

    def __init__(self, tensor: Tensor, entry: TensorSpec, position: Tensor | None) -> None:
        self.entry = entry
        self.first_scale = entry.row_scales().to(tensor.device)
        ratio = tensor.detach().float().reshape(len(entry.scales), -1) / self.first_scale
        self.position = nn.Parameter(ratio)
        self.first = self.nearest()
        if position is not None and position.shape == ratio.shape:
            # Where something has been changed since it was rounded, the value itself is all that is known.
            self.position = nn.Parameter(position.to(ratio))
            self.position.data = torch.where(self.nearest() == self.first, self.position.data, ratio)
        self.gain = nn.Parameter(torch.zeros_like(self.first_scale))
        self.felt = torch.zeros_like(ratio)

    def nearest(self) -> Tensor:
        return self.entry.nearest(self.position.detach())

    def _shift(self) -> Tensor:
        """(O, 1) by how many places of the file's grid the rows' scales have risen."""
        return (self.gain.detach() * (OCTAVE / math.log(2))).round()

    def scale(self) -> Tensor:
        return self.first_scale * torch.exp2(self._shift() / OCTAVE)

    def stored(self) -> TensorSpec:
        places = torch.tensor(self.entry.scales) - self._shift().flatten().cpu().long()
        above = min(0, int(places.min()))
        top = float(torch.tensor(self.entry.top * 2.0 ** (-above / OCTAVE), dtype=torch.float32))
        return replace(self.entry, top=top, scales=(places - above).clamp(max=255).tolist())

    def take(self, tensor: Tensor, price: float) -> None:
        if tensor.grad is None:  # nothing of what is compared depends on it
            self.gain.grad = self.position.grad = None
            return
        gradient = tensor.grad.float().reshape(self.position.shape)
        self.gain.grad = (gradient * tensor.reshape(self.position.shape)).sum(1, keepdim=True)
        self.position.grad = wanted = gradient * self.scale()
        self.felt.lerp_(wanted.square(), 1 - BETAS[1])
        if price:
            # Within a step of zero the price falls with the position, so that weights which are zero stay where they are.
            wanted.add_(self.position.detach().clamp(-1, 1), alpha=price * float(wanted.square().mean().sqrt()))

    def costs(self) -> Tensor:
        """(O, N) what it would cost to make a code 0, by the mean square of its gradients; infinite where it is not 1 or -1.

        How near a position is to the next code says nothing of that: what was rounded after it has made up for it as it is.
        """
        return torch.where(self.nearest().abs() == 1, self.felt, math.inf)

    def drop(self, dearest: float) -> None:
        costs = self.costs()
        self.position.masked_fill_((costs <= dearest) & costs.isfinite(), 0.0)
