"""What a network says, how far another one is from saying the same, and in which figure people should read it."""

from sharefold.outputs.agreement import Agreement, agreement
from sharefold.outputs.comparison import Comparison, Divergences
from sharefold.outputs.divergence import Divergence, divergence_of
from sharefold.outputs.figure import Figure, Target, parse_target
from sharefold.outputs.leaf import Leaf
from sharefold.outputs.own_criterion import Criterion
from sharefold.outputs.reading import OutputReading, read_outputs

__all__ = [
    "Agreement", "Comparison", "Criterion", "Divergence", "Divergences", "Figure", "Leaf", "OutputReading", "Target", "agreement",
    "divergence_of", "parse_target", "read_outputs",
]  # fmt: skip
