"""What a plan may cost, in every unit that is bounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sharefold.budget import Budget
from sharefold.errors import SharefoldError
from sharefold.planner.costs import Cost

# Plans do not depend on the order in which a budget names its parts.
ORDER = ("parameters", "macs", "seconds")


class Unreachable(SharefoldError):
    """A budget that no plan meets."""


@dataclass(frozen=True)
class Bounds:
    """Limits that hold together.

    Attributes:
        units: what is bounded, each once, as in ``ORDER``.
        costs: of the dense network.
        limits: one each.
        parts: what the user wrote of each.
    """

    units: tuple[str, ...] = ()
    costs: tuple[Cost, ...] = ()
    limits: tuple[float, ...] = ()
    parts: tuple[str, ...] = ()

    @classmethod
    def of(cls, budgets: Sequence[Budget], costs: Sequence[Cost]) -> Bounds:
        """Of ``budgets`` and the costs that they bound, in any order."""
        known = {
            budget.unit: (cost, budget.limit(cost.total), budget.text) for budget, cost in zip(budgets, costs, strict=True)
        }
        return cls._of(known)

    @classmethod
    def _of(cls, known: dict[str, tuple[Cost, float, str]]) -> Bounds:
        units = tuple(unit for unit in ORDER if unit in known)
        found = [known[unit] for unit in units]
        return cls(units, tuple(f[0] for f in found), tuple(f[1] for f in found), tuple(f[2] for f in found))

    def below(self, cost: Cost, limit: int) -> Bounds:
        """The same with at most ``limit`` parameters, which ``cost`` counts."""
        known = dict(zip(self.units, zip(self.costs, self.limits, self.parts, strict=True), strict=True))
        if "parameters" not in known or known["parameters"][1] > limit:
            known["parameters"] = cost, limit, f"{limit} parameters"
        return self._of(known)

    def expected(self, spent: Sequence[float], parameters: int) -> str:
        """What a plan is expected to cost, for its source.

        Args:
            parameters: said in place of what is priced, where positions of pivots count too.
        """
        said = [parameters if unit == "parameters" else amount for unit, amount in zip(self.units, spent, strict=True)]
        texts = [f"{cost.text(amount)} of {cost.text(cost.total)}" for cost, amount in zip(self.costs, said, strict=True)]
        return f"{' and '.join(texts)} expected"
