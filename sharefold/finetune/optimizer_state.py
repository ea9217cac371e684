"""Whether a saved optimizer state belongs to an optimizer, found before the first update.

torch loads any state and fails at the next step, or goes on as another optimizer. What a state looks like depends on the
optimizer and on the shape of the parameter, so a small optimizer of the same settings makes one step for each shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sharefold.checksum import not_finite
from sharefold.finetune.config import FinetuneConfig
from sharefold.finetune.schedule import optimizer_of
from sharefold.untrusted import is_int, is_number

Key = tuple[int, tuple[int, ...]]


# How an optimizer computes, which depends on the device; what it computes is the same.
KERNELS = ("fused", "foreach", "capturable")


def with_own_kernels(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """``saved``, a state dict that was checked, as if this optimizer's kernels had made it."""
    groups = [
        {**group, **{name: own[name] for name in KERNELS if name in own}}
        for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {**saved, "param_groups": groups}


def check_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], config: FinetuneConfig, *, stepped: bool) -> None:
    """Compares ``saved``, an optimizer's state dict, with ``optimizer``, which is left as it is.

    Args:
        stepped: whether it has made at least one step for certain.

    Raises:
        ValueError: other parameters or settings, tensors of other shapes or kinds, NaN, or no state.
    """
    groups, states = saved["param_groups"], saved["state"]
    if not isinstance(groups, list) or not isinstance(states, dict) or len(groups) != len(optimizer.param_groups):
        raise ValueError("the optimizer's groups")
    expected = _states_by_shape(optimizer, config)
    places: dict[int, Key] = {}
    for at, (group, own) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        if not isinstance(group, dict):
            raise ValueError("the optimizer's groups")
        indices = range(len(places), len(places) + len(own["params"]))
        if group.get("params") != [*indices]:
            raise ValueError("the optimizer's parameters")
        for name in own.keys() & group.keys() - {"params", *KERNELS}:
            if not _alike(group[name], own[name]):
                raise ValueError(f"the optimizer's {name}")
        places.update((i, (at, tuple(p.shape))) for i, p in zip(indices, own["params"], strict=True))
    for index, state in states.items():
        if not is_int(index) or index not in places or not isinstance(state, dict):
            raise ValueError("the optimizer's parameters")
        _check_state(state, expected[places[index]], places[index][1])
    if stepped and any(expected.values()) and not any(states.values()):
        raise ValueError("no state of the optimizer")


def _states_by_shape(optimizer: torch.optim.Optimizer, config: FinetuneConfig) -> dict[Key, dict[str, Any] | None]:
    """What the optimizer keeps after one step for a parameter of each shape; on the CPU, with parameters of its own.

    None for an optimizer that the CPU does not have.
    """
    groups: list[dict[str, Any]] = []
    keys: list[Key] = []
    for at, group in enumerate(optimizer.param_groups):
        shapes = {tuple(p.shape): p.dtype for p in group["params"]}
        keys += [(at, shape) for shape in shapes]
        examples = [nn.Parameter(torch.full(shape, 0.01, dtype=dtype)) for shape, dtype in shapes.items()]
        for example in examples:
            example.grad = torch.full_like(example, 0.01)
        groups.append({"params": examples, "lr_scale": group["lr_scale"], "weight_decay": group["weight_decay"]})
    try:
        probe = optimizer_of(groups, config)
        probe.step()
    except Exception:
        return dict.fromkeys(keys)
    found = probe.state_dict()["state"]
    return {key: found.get(i, {}) for i, key in enumerate(keys)}


def _check_state(state: dict[Any, Any], expected: dict[str, Any] | None, shape: tuple[int, ...]) -> None:
    if expected is None:
        return
    if state and expected.keys() - state.keys():
        raise ValueError(f"the optimizer's {min(expected.keys() - state.keys())}")
    for name, value in state.items():
        # A state may get more entries in later steps: of the parameter's shape, or a number.
        known = expected.get(name)
        fits = _alike(value, known) if name in expected else _is_entry(value, shape)
        if not isinstance(name, str) or not fits:
            raise ValueError(f"the optimizer's {name if isinstance(name, str) else 'state'}")


def _is_entry(value: Any, shape: tuple[int, ...]) -> bool:
    if isinstance(value, Tensor):
        return tuple(value.shape) in (shape, (), (1,)) and not_finite(value) != "NaN"
    return value is None or isinstance(value, bool) or _is_finite(value)


def _alike(value: Any, known: Any) -> bool:
    """Whether ``value`` could stand where ``known`` does."""
    if isinstance(known, Tensor) and known.numel() == 1 and not isinstance(value, Tensor):
        return _is_finite(value)
    if isinstance(known, Tensor):
        same = isinstance(value, Tensor) and value.shape == known.shape
        return same and value.is_floating_point() == known.is_floating_point() and not_finite(value) != "NaN"
    if isinstance(known, (list, tuple)):
        same = isinstance(value, (list, tuple)) and len(value) == len(known)
        return same and all(_alike(part, own) for part, own in zip(value, known, strict=True))
    if isinstance(known, (bool, str)):
        return type(value) is type(known) and value == known
    if isinstance(known, (int, float)):
        return _is_finite(value) or (isinstance(value, Tensor) and value.numel() == 1)
    return value is None if known is None else type(value) is type(known)


def _is_finite(value: Any) -> bool:
    return is_number(value) and abs(value) < 1e300
