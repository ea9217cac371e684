"""Sequential refit: every converted layer's coefficients again, on the inputs that the converted network gives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from sharefold.layers import (
    Again,
    ConvForm,
    RepeatedBlock,
    SharedConv,
    absorb_scale,
    affine,
    any_form_of,
    form_of,
    resolve,
    shift_output,
    takes_scale,
    weight_matrix,
)
from sharefold.methods.fold import kept_rows
from sharefold.plans import GroupPlan
from sharefold.repair.coefficients import RIDGES, Linear, best_ridge, best_step, fitted, halves_of, sums_of
from sharefold.repair.lockstep import Visited, Wanted, walk
from sharefold.repair.means import give_mean
from sharefold.repair.own_factors import has_own_factors, own_factors
from sharefold.repair.partial import Journal, Partial
from sharefold.repair.rectified import Front, best_step_behind, rectified
from sharefold.repair.samples import Samples
from sharefold.repair.work import Work
from sharefold.solvers.moments import Moments
from sharefold.state_dicts import trial

# A channel that its norm makes this much weaker than others does not make up for a shortcut's error: it would have to shout,
# and its squared error would decide for all channels.
HEARD = 0.1
# A channel's outputs are made stronger at most so many times.
MOST_RESTORED = 2.0


class Refit:
    """Solves the linear part of every shared layer again, in forward order, for the original layer's output.

    Of a layer that shares nothing all factors are solved again, as its group in the plan says. With a = F x~ the responses
    of the layer's filters on the converted prefix and y the original output, both centred: C = (Y A^T + rho C0)(A A^T + rho
    I)^-1; the difference of the means goes into the bias or the BatchNorm's mean; behind a ReLU coefficients are solved
    once more for what it lets through, elsewhere outputs get back variance that they have lost. The pull rho is chosen
    by cross-validation, and how far each layer goes on images that decide. Where all of it does harm, all layers may go a
    part of the way (``way`` in the record), or the first layers alone keep what they got; the record's ``steps`` are
    theirs.
    """

    name = "refit"

    def refusal(self, work: Work) -> str:
        if work.cal.graph.fx_graph is None:
            return "the network has no fx graph"
        if not _refittable(work):
            return "no layer has a linear part or a norm of its own"
        return ""

    def run(self, work: Work) -> Partial:
        graph, parts = work.cal.graph, work.cal.refit_parts
        assert graph.fx_graph is not None
        layers = _refittable(work)
        plans = {name: group for group in work.plan.sharing for name in group.members}
        rows, readers = kept_rows(work.plan.narrowing), _readers(work)
        steps: dict[str, float] = {}
        journal = Journal()

        def visit(at: Visited) -> None:
            stays = at.norm is not None and work.plan.protects(at.norm)
            # Norms of the base have the widths of the converted network's.
            at = replace(at, original=work.base.original, norm_stays=stays)
            samples = _with_addend(at)
            fit, decide = samples.of(parts.fit), samples.of(parts.decide)
            with journal.entry(_tensors(at)):
                step = _visit(at, fit, decide if len(decide) else fit, plans.get(at.name), at.name in readers)
            steps[at.name] = round(step, 3)
            if work.progress:
                work.progress("refitting", len(steps), len(layers))

        wanted = {name: Wanted(form, graph.layers[name].norm, True, rows.get(name)) for name, form in layers.items()}
        walk(graph.fx_graph, work.cal.original, work.model, work.cal.refit_images, wanted, visit)

        def details(kept: int) -> Mapping[str, Any]:
            return {"layers": len(steps), "kept_layers": kept, "steps": dict(list(steps.items())[: kept or None])}

        return Partial(len(journal), journal.keep, details, journal.go)


def _tensors(at: Visited) -> list[Tensor]:
    """All that a visit may write into."""
    modules = [at.layer, *([] if at.norm is None else [resolve(at.model, at.norm)])]
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def _with_addend(at: Visited) -> Samples:
    """The samples of a layer that is added to a shortcut without a ReLU behind: its wanted output makes up for the error that
    came through there. Behind a ReLU :meth:`_Task.rectify` sees to that."""
    samples = at.samples
    if at.rectifier is None or at.rectifier.rectified or samples.wanted is None or samples.given is None:
        return samples
    missing = samples.wanted - samples.given
    if at.norm is not None:
        scale, _ = affine(resolve(at.original, at.norm))
        usable = scale.abs() > HEARD * scale.abs().mean()
        missing = torch.where(usable, missing / torch.where(usable, scale, 1.0), 0.0).to(missing)
    return replace(samples, y=samples.y + missing)


def _visit(at: Visited, fit: Samples, decide: Samples, plan: GroupPlan | None, reader: bool) -> float:
    """Refits one layer; gives how far it went, 0 to 1. ``reader``: a dense layer that makes up for channels that went."""
    layer = at.layer
    if isinstance(layer, SharedConv) and layer.linear_part() is None or not isinstance(layer, SharedConv) and not reader:
        return _rescale(at, fit)
    task = _Task(at, layer, fit, decide)
    task.refit()
    if plan is not None and isinstance(layer, SharedConv) and has_own_factors(layer, plan):
        with trial(layer) as tried:
            own_factors(at, fit, plan)
            other = _Task(at, layer, fit, decide)
            other.refit()
            if other.error() < task.error():
                task, task.step = other, 1.0
                tried.keep()
    if at.rectifier is not None and at.rectifier.rectified:
        task.rectify()
    else:
        task.restore()
    task.settle()
    return task.step


class _Task:
    """The coefficients of one layer over its samples; positions come last: (G, M, P) and (G, O/G, P)."""

    def __init__(self, at: Visited, layer: nn.Module, fit: Samples, decide: Samples) -> None:
        self.at, self.fit, self.decide = at, fit, decide
        self.layer: Any = layer
        self.step = 0.0
        self.groups, self.outputs = fit.x.shape[1], fit.y.shape[1]
        part = layer.linear_part() if isinstance(layer, SharedConv) else None
        self.flat = None if part is None else part[0].detach().flatten(1).float()  # of filters (M, I/g, h, w)
        coefficients = cast(Tensor, layer.weight).flatten(1) if part is None else part[1]  # (O, M)
        weight = coefficients.detach().cpu().double().reshape(self.groups, -1, coefficients.shape[1])
        self.free = at.owner is not None
        self.map = Linear(weight, self._constant(weight))
        even, odd, self.fit_sums = halves_of(self._responses(fit), self._rows(fit.y), fit.image)
        self.decide_sums = sums_of(self._responses(decide), self._rows(decide.y))
        self.ridge = RIDGES[-1] if even is None or odd is None else best_ridge((even, odd), self.map, self.free)

    def _responses(self, samples: Samples) -> Tensor:
        return samples.x.permute(1, 2, 0) if self.flat is None else torch.einsum("pgn,mn->gmp", samples.x, self.flat)

    def _rows(self, values: Tensor) -> Tensor:
        """(P, O) -> (G, O/G, P)."""
        return values.reshape(len(values), self.groups, -1).permute(1, 2, 0)

    def _constant(self, weight: Tensor) -> Tensor:
        """What the network adds to the product with the responses, as the original's output has it: bias and norm's mean."""
        bias = self.layer.bias
        constant = weight.new_zeros(self.outputs) if bias is None else bias.detach().to(weight)
        if self.at.norm is not None:
            norms = (resolve(net, self.at.norm) for net in (self.at.model, self.at.original))
            ours, theirs = (getattr(norm, "running_mean", None) for norm in norms)
            if ours is not None and theirs is not None and ours.shape == theirs.shape:
                constant = constant + (theirs.double() - ours.double()).to(weight)
        return constant.reshape(self.groups, -1)

    def refit(self) -> None:
        """Least squares on the images that fit, as far as it helps on those that decide."""
        if self.fit_sums is None or self.decide_sums is None:
            return
        new = fitted(self.fit_sums, self.map, self.ridge, self.free)
        if new is not None:
            self.step = best_step(self.map, new, self.decide_sums)
            self.map = self.map.towards(new, self.step)
            self._write()

    def error(self) -> float:
        """On the samples that decide."""
        return float("inf") if self.decide_sums is None else self.map.error(self.decide_sums)

    def rectify(self) -> None:
        """Solves once more for what a ReLU behind the layer lets through."""
        if not self.free:
            return
        new = rectified(self._responses(self.fit), self._front(self.fit), self.map, self.ridge)
        if new is not None:
            step = best_step_behind(self.map, new, self._responses(self.decide), self._front(self.decide))
            self.map, self.step = self.map.towards(new, step), max(self.step, step)

    def restore(self) -> None:
        """Gives every output that was fitted the variance that it has in the original, where it has less.

        Least squares on damaged inputs answers nearer to the mean than it should, and so do the layers behind, until little is
        left of what the network has to say (as where networks are averaged: https://arxiv.org/abs/2211.08403).
        """
        sums = self.fit_sums
        if not self.free or sums is None or self.step == 0:
            return
        weight, constant = self.map.weight, self.map.constant
        covariance = sums.gram - sums.mean.unsqueeze(2) * sums.mean.unsqueeze(1)
        given = ((weight @ covariance) * weight).sum(2)
        # Of the layer's own output, without what makes up for a shortcut's error and may not be known to it.
        wanted = self.at.samples.y.double().var(0, unbiased=False).reshape(constant.shape).to(given)
        factor = (wanted / given).sqrt().clamp(1.0, MOST_RESTORED)
        factor = torch.where((wanted > 0) & (given > 0), factor, 1.0)
        mean = (weight @ sums.mean.unsqueeze(2)).squeeze(2)  # of the outputs, which stays
        self.map = Linear(weight * factor.unsqueeze(2), constant + (1 - factor) * mean)

    def _front(self, samples: Samples) -> Front:
        ones = samples.y.new_ones(self.outputs)
        scale, shift = ones, torch.zeros_like(ones)
        if self.at.norm is not None:
            # The difference of the means is in the map's constant, so both sides have the original's norm.
            scale, shift = (part.float() for part in affine(resolve(self.at.original, self.at.norm)))
        scale, shift = (part.reshape(self.groups, -1, 1) for part in (scale, shift))
        target, offset = scale * self._rows(samples.y) + shift, shift
        if samples.wanted is not None and samples.given is not None:
            target, offset = target + self._rows(samples.wanted), shift + self._rows(samples.given)
        return Front(scale, offset, target)

    @torch.no_grad()
    def _write(self) -> None:
        weight = self.map.weight.flatten(0, 1).to(next(self.layer.parameters()))
        if self.flat is None:
            self.layer.weight.copy_(weight.reshape(self.layer.weight.shape))
        else:
            self.layer.set_linear_part(weight)

    def settle(self) -> None:
        """Writes the map into the layer, and its constant into the bias or the norm."""
        self._write()
        if self.free:
            constant = self.map.constant.flatten().to(next(self.layer.parameters()))
            give_mean(self.at.original, self.at.model, self.layer, self.at.norm, constant)


def _refittable(work: Work) -> dict[str, ConvForm]:
    """Layers with a linear part, and layers of shared weights whose norm behind them is their own; their forms."""
    model, found, readers = work.model, {}, _readers(work)
    repeated = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, RepeatedBlock | Again))
    for name, record in work.cal.graph.layers.items():
        layer = resolve(model, name)
        form = any_form_of(layer)
        if form is None:
            continue
        if name in readers or (isinstance(layer, SharedConv) and layer.linear_part() is not None):
            found[name] = form
        elif isinstance(layer, SharedConv) or (repeated and name.startswith(repeated)):
            norm = None if record.norm is None or work.plan.protects(record.norm) else resolve(model, record.norm)
            if norm is not None and takes_scale(norm):
                found[name] = form
    return found


def _readers(work: Work) -> set[str]:
    """Dense layers that make up for channels that were left out in front of them, and are not frozen."""
    names = {name for group in work.plan.narrowing for name in group.options["readers"]}
    layers = {name: resolve(work.model, name) for name in names}
    return {
        name for name, layer in layers.items()
        if not isinstance(layer, SharedConv) and layer.weight.requires_grad and form_of(layer) is not None
    }  # fmt: skip


def _rescale(at: Visited, fit: Samples) -> float:
    """For a layer without tensors of its own: the best scale and offset per channel, in the norm behind it."""
    layer: Any = at.layer
    weight = weight_matrix(layer).detach().float()
    groups = fit.x.shape[1]
    a = torch.einsum("pgn,gon->pgo", fit.x, weight.reshape(groups, -1, weight.shape[1])).flatten(1).double()
    if layer.bias is not None:
        a = a + layer.bias.detach().double()
    moments = Moments()
    moments.add(fit.y.double().T.unsqueeze(1), a.T.unsqueeze(1))  # every channel for itself, of wanted and given outputs
    sums = moments.pairs(centered=True)
    if sums is None:
        return 0.0
    mean_a, mean_y, variance, cross = (part.flatten() for part in (sums.mean_y, sums.mean, sums.variance, sums.cross))
    scale = torch.where(variance > 0, cross / variance.clamp_min(1e-30), torch.ones_like(variance))
    old, new = (resolve(net, cast(str, at.norm)) for net in (at.original, at.model))
    new.load_state_dict(old.state_dict())
    shift_output(new, (mean_y - scale * mean_a).float())
    absorb_scale(new, scale.float())
    return 1.0
