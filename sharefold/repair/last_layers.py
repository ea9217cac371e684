"""The last layers, fitted to what the original's give on the features that the converted network gives them.

A last layer that is shared or factored is part of the sequential refit. One that stays dense is not, and it is right for
features that badly damaged layers no longer give.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharefold.inputs import Input
from sharefold.layers import STOCK_LAYERS, checked_form, form_of, matrix_of
from sharefold.layers.norm_fusion import fused_for_inference
from sharefold.repair.coefficients import Linear, best_ridge, best_step, fitted, halves_of, sums_of
from sharefold.repair.output_layers import output_layers, watched
from sharefold.repair.work import Work
from sharefold.running import batch_of, evaluating, run_on

# Numbers of all inputs that a layer is fitted to: of maps, evenly spaced positions.
ENTRIES = 1 << 24


class LastLayers:
    """Least squares for weight and bias of every dense layer whose output is one of the network's."""

    name = "head"

    def refusal(self, work: Work) -> str:
        return "" if _pairs(work) else "no output is that of a dense Linear or convolution with a bias"

    @torch.no_grad()
    def run(self, work: Work) -> Mapping[str, Any] | None:
        cal = work.cal
        parts = cal.fit_images, cal.decide_images
        with evaluating(cal.original, work.model), fused_for_inference(cal.original, work.model, norms=cal.norms):
            found = [
                _fit(head, *(_rows_of(cal.original, work.model, head, wanted, images) for images in parts))
                for head, wanted in _pairs(work)
            ]
        steps = [round(step, 3) for step in found if step is not None]
        return {"steps": steps} if steps else None


def _fit(head: Any, fit: Rows, decide: Rows) -> float | None:
    """Solves ``head`` and gives how far it went, 0 to 1; None where there is no finite solution."""
    form = checked_form("", head)
    start = Linear(matrix_of(head.weight.detach().cpu().double(), form)[None], head.bias.detach().cpu().double()[None])
    even, odd, whole = halves_of(*fit.pairs, fit.image)
    decide_sums = sums_of(*decide.pairs)
    if even is None or odd is None or whole is None or decide_sums is None:
        return None
    new = fitted(whole, start, best_ridge((even, odd), start, True), True)
    if new is None:
        return None
    step = best_step(start, new, decide_sums)
    found = start.towards(new, step)
    head.weight.copy_(form.native(found.weight[0]).reshape(head.weight.shape))
    head.bias.copy_(found.constant[0])
    return step


def _pairs(work: Work) -> list[tuple[Any, nn.Module]]:
    """Dense layers of the converted network whose outputs are its own, and those of the original that give the same outputs."""
    reading, images = work.cal.reading, work.cal.images[work.cal.parts.fit[:2]]
    ours, theirs = (output_layers(reading, net, images, _dense) for net in (work.model, work.cal.original))
    found = [(ours[name], theirs[name]) for name in ours if name in theirs]
    names = {id(module): name for name, module in work.model.named_modules()}
    return [
        (head, wanted) for head, wanted in found
        if _solvable(head) and type(head) is type(wanted) and not work.plan.protects(names[id(head)])
    ]  # fmt: skip


def _dense(module: nn.Module) -> bool:
    return type(module) in STOCK_LAYERS


def _solvable(module: nn.Module) -> bool:
    """With a bias, not frozen, and of a form that least squares can be set up for."""
    form = form_of(module)
    if form is None or form.groups != 1 or form.padding_mode != "zeros" or isinstance(form.padding, str):
        return False
    own = dict(module.named_parameters(recurse=False))
    return set(own) == {"weight", "bias"} and all(p.requires_grad and p.is_floating_point() for p in own.values())


@dataclass(frozen=True)
class Rows:
    """Features (n, F) of a last layer, the outputs (n, O) that are wanted for them, and the image (n,) that each is of."""

    features: Tensor
    wanted: Tensor
    image: Tensor

    @property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """As :func:`sums_of` takes them: (1, F, n) and (1, O, n)."""
        return self.features.T[None], self.wanted.T[None]


def _rows_of(original: nn.Module, model: nn.Module, head: nn.Module, wanted_head: nn.Module, images: Input) -> Rows:
    features, wanted, index = [], [], []
    done = 0
    with watched(head) as seen, watched(wanted_head) as seen_wanted:
        for batch in images.split(batch_of(images)):
            seen.clear()
            seen_wanted.clear()
            run_on(model, batch)
            run_on(original, batch)
            rows, targets = _rows(head, seen[0][0], seen_wanted[0][1], len(images))
            features.append(rows.double().cpu())
            wanted.append(targets.double().cpu())
            each = max(1, len(rows) // len(batch))
            index.append(done + torch.arange(len(rows)) // each)
            done += len(batch)
    return Rows(torch.cat(features), torch.cat(wanted), torch.cat(index))


def _rows(head: nn.Module, inputs: Tensor, outputs: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Features (rows, F) and outputs (rows, O) of evenly spaced positions of a batch."""
    form = form_of(head)
    if form is not None and form.convolves:
        padding = cast(tuple[int, int], form.padding)
        maps, wanted = (part.flatten(0, -4) for part in (form.as_maps(inputs), form.outputs_as_maps(outputs)))
        columns = F.unfold(maps, form.kernel_size, form.dilation, padding, form.stride)
        every = _spacing(columns.shape[1], images * columns.shape[2] * (len(maps) // len(inputs)))
        x, y = columns[..., ::every], wanted.flatten(2)[..., ::every]
        return x.transpose(1, 2).flatten(0, 1), y.transpose(1, 2).flatten(0, 1)
    x, y = inputs.reshape(-1, inputs.shape[-1]), outputs.reshape(-1, outputs.shape[-1])
    every = _spacing(x.shape[1], images * len(x) // len(inputs)) if inputs.ndim > 2 else 1
    return x[::every], y[::every]


def _spacing(features: int, rows: int) -> int:
    """Odd, so that the sampled columns of a map shift from row to row."""
    return max(1, rows * features // ENTRIES) // 2 * 2 + 1
