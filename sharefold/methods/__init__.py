"""Methods: each proposes candidates for a group of layers and applies the chosen one."""

from sharefold.methods.contract import Candidate, ConversionStep, LayerMethod, LayerSwap, Solution
from sharefold.methods.registry import AUTO, FOLD, METHODS, RECIPE_STEPS, check_method, method_named, step_named

__all__ = [
    "AUTO", "FOLD", "METHODS", "RECIPE_STEPS", "Candidate", "ConversionStep", "LayerMethod", "LayerSwap", "Solution",
    "check_method", "method_named", "step_named",
]  # fmt: skip
