"""Several costs as one, so that options are found that are worth having where more than one thing is bounded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from sharefold.layers import ConvForm
from sharefold.methods import Candidate, LayerMethod
from sharefold.planner.costs import Cost
from sharefold.plans import GroupPlan

Prices = tuple[float, ...]


class Blend(Cost):
    """A weighted sum of costs, each a share of the dense network's.

    Options are chosen by every cost alone and by the mean of all; what each costs in every unit is remembered.

    Args:
        costs: of one network.
        weights: of each; by default equal ones.
        known: what was priced before by a blend of the same costs.
    """

    unit = "of all together"
    settles = False

    def __init__(self, costs: Sequence[Cost], weights: Sequence[float] = (), known: dict[Any, np.ndarray] | None = None) -> None:
        self.costs = tuple(costs)
        self.weights = np.array(weights or [1 / len(self.costs)] * len(self.costs))
        self.scale = self.weights / np.array([max(cost.total, 1e-300) for cost in self.costs])
        self.total = float(self.weights.sum())
        self.known: dict[Any, np.ndarray] = {} if known is None else known

    @property
    def directions(self) -> Sequence[Blend]:
        ones = np.eye(len(self.costs)).tolist()
        return [*(Blend(self.costs, weights, self.known) for weights in ones), self]

    def dense(self, name: str) -> float:
        return float(self.scale @ self._dense(name))

    def shared(
        self, names: Sequence[str], forms: Sequence[ConvForm], method: LayerMethod, candidate: Candidate, stay: Sequence[int]
    ) -> float:
        key = _key([names[k] for k in stay], method.name, candidate.options)
        if key not in self.known:
            self.known[key] = np.array([cost.shared(names, forms, method, candidate, stay) for cost in self.costs])
        return float(self.scale @ self.known[key])

    def member(self, names: Sequence[str], forms: Sequence[ConvForm], method: LayerMethod, candidate: Candidate) -> float:
        key = "member", _key(names, method.name, candidate.options)
        if key not in self.known:
            self.known[key] = np.array([cost.member(names, forms, method, candidate) for cost in self.costs])
        return float(self.scale @ self.known[key])

    def _dense(self, name: str) -> np.ndarray:
        if name not in self.known:
            self.known[name] = np.array([cost.dense(name) for cost in self.costs])
        return self.known[name]

    def prices(self, members: Sequence[str], plans: Sequence[GroupPlan]) -> Prices:
        """What a unit of layers costs in every unit, in one of the ways that were priced before: under ``plans``, which some
        direction of this blend has priced; layers in none of them as they are."""
        rest = set(members) - {name for plan in plans for name in plan.members}
        found = [self._dense(name) for name in members if name in rest]
        found += [self.known[_key(plan.members, plan.method, plan.options)] for plan in plans]
        return tuple(float(amount) for amount in sum(found, np.zeros(len(self.costs))))


def _key(names: Sequence[str], method: str, options: dict[str, Any]) -> tuple[tuple[str, ...], str, str]:
    return tuple(names), method, json.dumps(options, sort_keys=True)
