"""How long and how exactly a solver alternates; every solver that has more than these adds them in a record of its own."""

from __future__ import annotations

from dataclasses import dataclass

from sharefold.solvers.data_norm import RIDGE


@dataclass(frozen=True)
class SolveOptions:
    """Alternations of a solver.

    Attributes:
        rounds: most of them.
        tol: stop when a round lowers the objective by less than this fraction.
        ridge: floor of the moments, relative to their mean diagonal.
    """

    rounds: int = 10
    tol: float = 1e-4
    ridge: float = RIDGE
