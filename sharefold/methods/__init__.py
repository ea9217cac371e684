"""Methods: each proposes candidates for a group of layers and applies the chosen one."""

from sharefold.methods.contract import Choice, Method, Solution
from sharefold.methods.registry import AUTO, METHODS, method_named

__all__ = ["AUTO", "METHODS", "Choice", "Method", "Solution", "method_named"]
