"""The terms of the fine-tuning loss, each a plain function of tensors.

    L = (1 - a) CE + a T^2 KL(teacher || student) + b MSE(block outputs) + lambda R(banks)

Distillation: Hinton et al. 2015, https://arxiv.org/abs/1503.02531. R: Kang & Kim, "Deeply Shared Filter Bases for
Parameter-Efficient CNNs", NeurIPS 2021, https://arxiv.org/abs/2006.05066, with its three published ways of averaging.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharefold.format import carried_config
from sharefold.layers import bank_key, banks, shared_layers


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher/T) || softmax(student/T)), mean over the batch; both (B, classes) logits."""
    log_p = F.log_softmax(student.float() / temperature, dim=1)
    log_q = F.log_softmax(teacher.float() / temperature, dim=1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


def moments(output: Tensor) -> Tensor:
    """(2, C): mean and mean square of each channel of a block's output, (B, C, ...) or tokens (B, n, C)."""
    channels = output.float().movedim(2 if output.ndim == 3 else 1, 0).flatten(1)
    return torch.stack([channels.mean(1), channels.square().mean(1)])


def spread(moments: Tensor) -> float:
    """Variance of a block's output within its channels, mean over channels, from :func:`moments`."""
    return float((moments[1] - moments[0].square()).mean().clamp_min(1e-12))


def block_error(student: Sequence[Tensor], teacher: Sequence[Tensor], spreads: Sequence[float]) -> Tensor:
    """Mean over blocks of the mean squared difference over the teacher's spread; pairs of equal shape.

    The division makes a block that speaks in large numbers count no more than a quiet one. The spreads are numbers
    fixed beforehand, so that the error of a batch is the mean of the errors of its parts.
    """
    pairs = zip(student, teacher, spreads, strict=True)
    return torch.stack([(s.float() - t.float()).square().mean() / scale for s, t, scale in pairs]).mean()


@dataclass
class Bases:
    """One orthogonality problem: a bank's filters as rows, and the unique filters of the layers that use it.

    shared: (S, N) rows.  unique: one (U, N) per layer, only read by the form ``with-unique``.
    kind: banks of one kind are averaged together by the form ``separate``.
    """

    shared: Tensor
    unique: list[Tensor]
    kind: str = ""


def _deviation(left: Tensor, right: Tensor) -> Tensor:
    """(L, R) inner products minus the identity, squared; rows of ``right`` start with those of ``left``."""
    product = left @ right.T
    eye = torch.eye(*product.shape, dtype=product.dtype, device=product.device)
    return (product - eye).square()


def _mean_of(parts: Iterable[Tensor]) -> Tensor:
    parts = list(parts)
    return torch.stack([p.sum() for p in parts]).sum() / sum(p.numel() for p in parts)


def orthogonality(bases: Sequence[Bases], form: str = "mean") -> Tensor:
    """Deviation from orthonormal rows: a scalar.

    ``mean``: squared entries of B B^T - I of all banks, summed, over the number of all entries.
    ``separate``: the same for each kind of bank (3x3, 1x1, ...) on its own, the means added.
    ``with-unique``: shared rows against shared and unique rows, and the unique rows of a layer among themselves (those
    of different layers are free to agree), summed, over the number of entries so visited.
    """
    if not bases:
        return torch.zeros(())
    if form == "mean":
        return _mean_of(_deviation(b.shared, b.shared) for b in bases)
    if form == "separate":
        kinds = dict.fromkeys(b.kind for b in bases)
        means = [_mean_of(_deviation(b.shared, b.shared) for b in bases if b.kind == kind) for kind in kinds]
        return torch.stack(means).sum()
    if form == "with-unique":
        parts = []
        for b in bases:
            parts.append(_deviation(b.shared, torch.cat([b.shared, *b.unique])))
            parts.extend(_deviation(u, u) for u in b.unique)
        return _mean_of(parts)
    raise ValueError(f"unknown form {form!r}")


def _rows(filters: Tensor) -> Tensor:
    return filters.reshape(filters.shape[0], -1).float()


def collect_bases(model: nn.Module, *, joint: bool = False, skip: str = "") -> list[Bases]:
    """The orthogonality problems of a converted model, views of its live parameters.

    joint: banks of one stage with rows of one length become one matrix. skip: regular expression (``re.search``) of
    bank names to leave out. Banks without a basis (tied kernels, codebooks) have nothing to keep orthogonal, and pivoted ones
    cannot be so (:mod:`sharefold.finetune.whole`). Stage and role come from the plan that the model carries; without one
    each bank is alone, and its kernel size is its kind.
    """
    config = carried_config(model)
    plans = {bank_key(group.name): group for group in (config.plan.groups if config else [])}
    unique: dict[int, list[Tensor]] = {}
    for layer in shared_layers(model).values():
        own = layer.own_filters
        if layer.bank is not None and own is not None and own.numel():
            unique.setdefault(id(layer.bank), []).append(_rows(own))
    merged: dict[tuple[object, ...], Bases] = {}
    for name, bank in banks(model).items():
        basis = getattr(bank, "basis", None)
        if not isinstance(basis, Tensor) or bank.pivots is not None or (skip and re.search(skip, name)):
            continue
        rows = _rows(basis)
        group = plans.get(name)
        key = (group.stage, rows.shape[1]) if joint and group else (name,)
        mine = Bases(rows, unique.get(id(bank), []), kind=(group and group.role) or str(tuple(basis.shape[2:])))
        if key in merged:
            first = merged[key]
            mine = Bases(torch.cat([first.shared, rows]), first.unique + mine.unique, first.kind)
        merged[key] = mine
    return list(merged.values())
