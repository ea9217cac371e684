"""Runs code on a model and puts the model back exactly as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sharefold.graph.attributes import Attributes
from sharefold.inputs import Input
from sharefold.running import random_kept, run_on
from sharefold.tensor_values import TensorValues
from sharefold.untrusted import first_line


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; afterwards modes, hooks, buffers, attributes and random states are restored.

    Attributes matter because some networks keep caches or write on themselves in ``forward``. Buffers, and plain tensors and
    arrays among the attributes, are cloned, and copied back only if something wrote to them.
    """
    modules, before = list(model.modules()), Attributes(model)
    try:
        with buffers_kept(model), random_kept(model), torch.no_grad():
            for module in modules:
                module.training = False
            yield
    finally:
        before.put_back()


@contextmanager
def buffers_kept(*models: nn.Module, norms: bool = True) -> Iterator[None]:
    """Afterwards all buffers of ``models`` have the values that they had; what they hold of a run with gradients is let go.

    Args:
        norms: whether those of norms, too. Into others nobody writes but the network itself, whenever it runs.
    """
    modules = [module for model in models for module in model.modules() if norms or not hasattr(module, "running_mean")]
    before = TensorValues([buffer for module in modules for buffer in module.buffers(recurse=False)], let_go=True)
    try:
        yield
    finally:
        before.put_back()


def tried(model: nn.Module, inputs: Input) -> tuple[Any, str]:
    """What ``model``, which is left as it was, makes of ``inputs``, and ""; or None and the first line of its error."""
    try:
        with preserved(model):
            return run_on(model, inputs), ""
    except Exception as error:  # networks raise what they like
        return None, first_line(error) or type(error).__name__


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Where an exception leaves the block, ``model`` is put back: modules, attributes, hooks, modes and values of tensors."""
    before = Attributes(model)
    tensors = TensorValues([*model.parameters(), *model.buffers()])
    try:
        yield
    except BaseException:
        before.put_back()
        tensors.put_back()
        raise
