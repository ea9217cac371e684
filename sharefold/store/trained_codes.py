"""What training moves of a rounded network: positions behind its codes, gains of its rows, and everything else that is stored.

Behind every code stands a position, which moves and is rounded in the forward pass, by the straight-through estimator (Bengio et
al., https://arxiv.org/abs/1308.3432). It starts where the value was when it was rounded, and not at the code: weights that lie
between two codes have a short way to the other. A penalty on codes that are not zero holds an entropy coded file at its size.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sharefold.repair.learned import adamw, group_of
from sharefold.store.quantize import StoreReport
from sharefold.store.size import file_bytes
from sharefold.store.tensor_spec import OCTAVE, StoreSpec, TensorSpec

# Learning rates for one of 1: of positions, in codes, and of the logarithms of rows' gains.
POSITION, GAIN = 0.1, 0.5
# AdamW's mean of squared gradients would otherwise look back further than most runs are long.
BETAS = (0.9, 0.99)
# At the end of an epoch the penalty grows by this, times the logarithm of the file's size over the size that is aimed at.
PENALTY_RATE = 1.0
# That size, as a share of the largest one allowed.
AIM = 0.995


class TrainedCodes:
    """What stands behind the tensors of ``model``, which lies on the grids of ``report.spec``.

    ``rows`` are matrices on grids, ``others`` everything else that is stored as halves or on a grid: offsets, mostly. Tensors of
    one value stay as they are, since a file holds them as one number.
    """

    paste = 0.0  # codes that are nearly right learn less from images that are far from any (docs/log.md)

    def __init__(self, model: nn.Module, report: StoreReport) -> None:
        self.model, self.spec = model, report.spec
        self.limit = None if report.request.kind != "coded" else report.request.budget or report.bytes
        self.penalty = 0.0
        self.tensors = {name: p for name, p in model.named_parameters() if name in self.spec.tensors and p.is_floating_point()}
        self.rows: dict[str, _Rows] = {}
        self.others: dict[str, nn.Parameter] = {}
        for name, tensor in self.tensors.items():
            entry = self.spec.tensors[name]
            if entry.kind in ("coded", "grid", "codebook") and tensor.ndim > 1:
                self.rows[name] = _Rows(tensor, entry, report.positions.get(name))
            elif tensor.numel() and bool((tensor != tensor.flatten()[0]).any()):
                self.others[name] = nn.Parameter(tensor.detach().float().clone())

    def optimizers(self, step: float) -> list[torch.optim.Optimizer]:
        positions = [rows.position for rows in self.rows.values()]
        gains = [rows.gain for rows in self.rows.values()]
        groups: list[dict[str, Any]] = [{"params": positions, "lr": POSITION * step}, {"params": gains, "lr": GAIN * step}]
        return [adamw([*groups, *(group_of(other, step) for other in self.others.values())], BETAS)]

    @torch.no_grad()
    def take_gradients(self) -> None:
        for name, rows in self.rows.items():
            rows.take(self.tensors[name], self.penalty)
        for name, other in self.others.items():
            gradient = self.tensors[name].grad
            other.grad = None if gradient is None else gradient.float()

    @torch.no_grad()
    def show(self) -> None:
        for name, rows in self.rows.items():
            self.tensors[name].copy_((rows.nearest() * rows.scale()).reshape(self.tensors[name].shape))
        self._show_others()

    def _show_others(self) -> None:
        for name, other in self.others.items():
            self.tensors[name].copy_(self.spec.tensors[name].snapped(other.detach()))

    def epoch_ends(self) -> None:
        if self.limit is not None and self.finite():
            size = file_bytes(self.model, self._on_grids())
            self.penalty = max(0.0, self.penalty + PENALTY_RATE * math.log(size / (AIM * self.limit)))
            self.show()

    def finite(self) -> bool:
        moved = [part for rows in self.rows.values() for part in (rows.position, rows.gain)]
        return all(bool(tensor.isfinite().all()) for tensor in (*moved, *self.others.values(), *self.model.parameters()))

    @torch.no_grad()
    def _on_grids(self) -> StoreSpec:
        """Puts every row on the nearest scale that a file can hold; gives how everything is then stored."""
        found: dict[str, TensorSpec] = dict(self.spec.tensors)
        for name, rows in self.rows.items():
            found[name] = entry = rows.stored()
            values = rows.nearest() * entry.row_scales().to(rows.position)
            self.tensors[name].copy_(values.reshape(self.tensors[name].shape))
        self._show_others()
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
        self.mean_square = torch.zeros_like(ratio)

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

    def take(self, tensor: Tensor, penalty: float) -> None:
        if tensor.grad is None:  # nothing of what is compared depends on it
            self.gain.grad = self.position.grad = None
            return
        gradient = tensor.grad.float().reshape(self.position.shape)
        self.gain.grad = (gradient * tensor.reshape(self.position.shape)).sum(1, keepdim=True)
        self.position.grad = wanted = gradient * self.scale()
        self.mean_square.lerp_(wanted.square(), 1 - BETAS[1])
        if penalty:
            # Within a step of zero it falls with the position, so that weights which are zero stay where they are.
            wanted.add_(self.position.detach().clamp(-1, 1), alpha=penalty * float(wanted.square().mean().sqrt()))

    def costs(self) -> Tensor:
        """(O, N) what it would cost to make a code 0, by the mean square of its gradients; infinite where it is not 1 or -1.

        How near a position is to zero does not tell: columns that were rounded later have made up for the code as it is.
        """
        return torch.where(self.nearest().abs() == 1, self.mean_square, math.inf)

    def drop(self, dearest: float) -> None:
        costs = self.costs()
        self.position.masked_fill_((costs <= dearest) & costs.isfinite(), 0.0)
