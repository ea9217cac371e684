"""The network that a file is about, ready to take the file's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from sharefold.architectures.bounded import check_buffers, limited_modules, parameters_on_meta
from sharefold.architectures.build import build_base, build_on_meta
from sharefold.errors import SharefoldError
from sharefold.format import FileConfig
from sharefold.layers import ConvForm
from sharefold.layers.surgery import DEPTH
from sharefold.layers.weight_cache import Kept
from sharefold.methods.checks import check_plan
from sharefold.methods.narrowing import install_blank
from sharefold.plans import Plan
from sharefold.untrusted import most_inflated

# What attributes of modules are, but for tensors and what may hold some.
_NO_TENSORS = (int, float, str, type(None), type, torch.dtype, BuiltinFunctionType, ConvForm, Kept, nn.Module)


def shape_of_network(config: FileConfig, state: Mapping[str, Tensor], where: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network that ``config`` describes, on the meta device, before any of it is allocated; and the tensors of the original
    by name, without memory.

    Args:
        state: the tensors of the file, packed or plain; plain ones are compared.

    Raises:
        SharefoldError: it cannot be built, does not fit the file, or is far larger than the file explains.
    """
    assert config.base is not None
    held = sum(t.numel() * t.element_size() for t in state.values())
    with limited_modules(held if config.store is not None else len(state), where):
        model = build_on_meta(config.base)
        original = dict(model.state_dict())
        with torch.device("meta"):
            install(model, config.plan)
    template = model.state_dict()
    if config.store is None:
        check_shapes(template, state, config.aliases, where)
    declared = sum(t.numel() * t.element_size() for t in template.values())
    check_inflation(declared, held, where)
    check_buffers(model, held if config.store is None else declared, where)
    return model, original


def check_inflation(declared: int, held: int, where: str) -> None:
    """Refuses a network of ``declared`` bytes for a file that holds ``held``.

    Raises:
        SharefoldError: it is far larger than packing explains.
    """
    if declared > most_inflated(held):
        raise SharefoldError(f"{where}: its network has {declared:,} bytes, far more than its {held:,} explain: it is damaged")


def check_shapes(
    template: Mapping[str, Tensor], state: Mapping[str, Tensor], aliases: Mapping[str, str], where: str,
    whose: str = "its own plan",
) -> None:  # fmt: skip
    """Refuses a state that the network cannot take.

    Args:
        whose: what the network was made of, for messages.

    Raises:
        SharefoldError: names the first tensor that is missing, left over or of another shape.
    """
    for alias, name in aliases.items():
        if name not in state:
            raise SharefoldError(f"{where} is damaged: tensor {name!r} is missing")
        if alias in state:
            raise SharefoldError(f"{where} is damaged: tensor {alias!r} is there and tied to {name!r}, too")
        if alias not in template:
            raise SharefoldError(f"{where} does not fit {whose}: it has no tensor {alias!r}")
    for name, like in template.items():
        found = state.get(aliases.get(name, name))
        if found is None:
            raise SharefoldError(f"{where} does not fit {whose}: tensor {name!r} is missing")
        if found.shape != like.shape:
            shapes = f"{list(found.shape)} in the file, {list(like.shape)} in the network"
            raise SharefoldError(f"{where} does not fit {whose}: {name!r} is {shapes}")
        if found.is_floating_point() != like.is_floating_point() or found.is_complex() != like.is_complex():
            raise SharefoldError(f"{where} does not fit {whose}: {name!r} is {found.dtype}, not {like.dtype}")
    for name in state:
        if name not in template:
            raise SharefoldError(f"{where} does not fit {whose}: tensor {name!r} is left over")


def blank_network(config: FileConfig, shape: nn.Module) -> nn.Module:
    """The network with parameters without memory where its builder allows that; tensors that no file holds are real.

    Args:
        shape: of :func:`shape_of_network`, which is taken itself where a file holds all of its tensors.
    """
    assert config.base is not None
    if not any(_has_more_than_its_state(module) for module in shape.modules()):
        return shape
    try:
        with parameters_on_meta():
            model = build_base(config.base)
            install(model, config.plan)
            return model
    except Exception:  # a builder that calculates with its weights
        return real_network(config)


def _has_more_than_its_state(module: nn.Module) -> bool:
    """Whether ``module`` has tensors that its state dict leaves out, or could hide some."""
    held = (value for key, value in vars(module).items() if key not in ("_parameters", "_buffers", "_modules"))
    return bool(module._non_persistent_buffers_set) or not all(map(_holds_no_tensors, held))


def _holds_no_tensors(value: Any, depth: int = DEPTH) -> bool:
    if isinstance(value, Mapping | list | tuple | set):
        parts = value.values() if isinstance(value, Mapping) else value
        return not value or (depth > 0 and all(_holds_no_tensors(part, depth - 1) for part in parts))
    return isinstance(value, _NO_TENSORS) or (isinstance(value, FunctionType) and not value.__closure__)


def real_network(config: FileConfig) -> nn.Module:
    """As :func:`blank_network`, with memory for everything."""
    assert config.base is not None
    model = build_base(config.base)
    install(model, config.plan)
    return model


def install(model: nn.Module, plan: Plan) -> None:
    """Puts layers without values into the places that ``plan`` names.

    Raises:
        SharefoldError: the plan does not fit the model.
    """
    check_plan(model, plan)
    install_blank(model, plan)
