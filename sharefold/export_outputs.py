"""What an exported file can hold of what a network returns."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from sharefold.errors import SharefoldError
from sharefold.untrusted import quoted

CONSTANTS = (bool, int, float, str)


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors in containers that torch knows, in order."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def check_returned(said: Any, format: str) -> None:
    """Checks that a file of this format can hold what a network returned; None is left out of ONNX graphs.

    Raises:
        SharefoldError: an object that torch.export does not know, a constant for ONNX, no tensor at all.
    """
    for leaf in tree_leaves(said):
        if leaf is None or isinstance(leaf, Tensor):
            continue
        if not isinstance(leaf, CONSTANTS):
            raise SharefoldError(
                f"export: the network returns an object of the class {type(leaf).__name__}, which torch.export does not know: "
                "return tensors, in a tuple, list or dict"
            )
        if format == "onnx":
            other = "" if isinstance(leaf, str) else ", or use --format pt2"
            raise SharefoldError(
                f"export: the network returns the constant {quoted(leaf, 40)}, and ONNX holds tensors alone: leave it out of "
                f"what forward returns{other}"
            )
    if not tensors_in(said):
        raise SharefoldError("export: the network returns no tensor: there is nothing to export")
