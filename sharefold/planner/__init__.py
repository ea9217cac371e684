"""The planner: every method's candidates for every group, what they cost, what they damage, and the choice."""

from sharefold.planner.candidates import Candidates, find_candidates, find_units
from sharefold.planner.costs import Cost, cost_of
from sharefold.planner.decide import Planner, plan
from sharefold.planner.objectives import OBJECTIVES

__all__ = ["OBJECTIVES", "Candidates", "Cost", "Planner", "cost_of", "find_candidates", "find_units", "plan"]
