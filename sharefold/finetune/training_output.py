"""Which output of a network in training mode are the logits that it returns alone in eval mode.

Networks with auxiliary heads (GoogLeNet, https://arxiv.org/abs/1409.4842) return those of every head while they train.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sharefold.errors import SharefoldError
from sharefold.graph.preserved import preserved
from sharefold.outputs.leaves import tensors_of


class OneOutput(nn.Module):
    """A network that returns one tensor of what ``network`` returns.

    Args:
        network: any.
        name: of the tensor, as :func:`sharefold.outputs.leaves.tensors_of` gives it.
    """

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.network, self.name = network, name

    def forward(self, *inputs: Tensor) -> Tensor:
        return tensors_of(self.network(*inputs))[self.name]


@contextmanager
def training_apart_from_chance(model: nn.Module) -> Iterator[None]:
    """While active, ``model`` is in training mode except for what would make its logits others than in eval mode: norms, and
    modules without children, such as dropout. Afterwards it is as before.
    """
    with preserved(model):
        for module in model.modules():
            steady = isinstance(module, nn.modules.batchnorm._NormBase) or not any(module.children())
            module.training = module is model or not steady
        yield


def with_logits_alone(model: nn.Module, said: Any, logits: Tensor) -> nn.Module:
    """``model``, or where it returns several outputs in training mode a wrapper that returns the one nearest to its logits.

    Args:
        model: any classifier.
        said: what it returned in training mode.
        logits: (B, classes), of eval mode on the same images.

    Raises:
        SharefoldError: no output has the shape of the logits.
    """
    found = tensors_of(said)
    apart = {
        name: float((tensor.float() - logits.float()).square().sum())
        for name, tensor in found.items() if tensor.shape == logits.shape
    }  # fmt: skip
    if not apart:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in found.values()) or f"{type(said).__name__} without a tensor"
        raise SharefoldError(
            f"finetune: in training mode the model returns {shapes}, in eval mode logits {tuple(logits.shape)}: return logits of "
            "that shape in training mode, too"
        )
    return model if isinstance(said, Tensor) else OneOutput(model, min(apart, key=lambda name: apart[name]))
