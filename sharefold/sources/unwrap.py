"""From whatever a training script stored to a plain state dict: name -> tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sharefold.checksum import not_finite
from sharefold.errors import SharefoldError

# Where weights are looked for, in this order; averaged copies (EMA) come after the plain ones and are reported.
CONTAINERS = (
    *("state_dict", "model_state_dict", "model", "net", "module", "weights"),
    *("model_ema", "state_dict_ema", "ema"),
)
PREFIXES = ("module.", "model.", "_orig_mod.", "_forward_module.", "backbone.", "net.", "network.")
# Left behind by profilers (thop) and by torch.optim.swa_utils.AveragedModel; never read by a forward pass.
_LITTER = ("total_ops", "total_params", "n_averaged")
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12])\.(weight|bias|running_mean|running_var)$")
_SHOWN_EXTRAS = (str, int, float, bool)


def under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names begin with ``prefix``, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def unwrap(content: Any, where: str) -> tuple[dict[str, Tensor] | nn.Module, dict[str, Any]]:
    """The state dict (or module) inside ``content``.

    Args:
        content: what the file held.
        where: file name for messages.

    Returns:
        A plain state dict, or a module where one was stored; and notes: ``unwrapped`` (keys and prefixes taken off, in
        order), ``extras`` (numbers and texts stored beside the weights), ``also`` (further weights in the file),
        ``dropped`` (entries that are no tensors).

    Raises:
        SharefoldError: no tensors in there, or an entry without a value.
    """
    notes: dict[str, Any] = {"unwrapped": [], "extras": {}, "also": [], "dropped": []}
    content = _descend(content, where, notes)
    if isinstance(content, nn.Module):
        while isinstance(content, nn.DataParallel | nn.parallel.DistributedDataParallel):
            content = content.module
            notes["unwrapped"].append("module.")
        return content, notes
    state = _tensors_only(content, where, notes)
    state = _strip_prefixes(state, notes)
    if any("._orig_mod." in name for name in state):
        state = {name.replace("._orig_mod.", "."): tensor for name, tensor in state.items()}
        notes["unwrapped"].append("._orig_mod.")
    if any(_OLD_DENSENET.match(name) for name in state):
        state = {_OLD_DENSENET.sub(r"\1\2.\3", name): tensor for name, tensor in state.items()}
        notes["unwrapped"].append("old DenseNet names")
    return state, notes


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Refuses what no network can use, naming the first tensor.

    Raises:
        SharefoldError: an empty, quantized or sparse tensor, NaN or infinity.
    """
    for name, tensor in state.items():
        if tensor.is_quantized or tensor.layout != torch.strided:
            kind = "quantized" if tensor.is_quantized else "sparse"
            raise SharefoldError(f"{kind} tensor: {name} in {where}: give dense floating-point weights")
        if tensor.is_meta:
            raise SharefoldError(f"tensor without values: {name} in {where}: save the checkpoint again")
        if tensor.numel() == 0:
            raise SharefoldError(
                f"empty tensor: {name} in {where} has shape {tuple(tensor.shape)}: save the checkpoint again"
            )
        if what := not_finite(tensor):
            values = tensor.float() if tensor.element_size() == 1 else tensor  # 8-bit floats have few operators
            bad = int((~torch.isfinite(values)).sum())
            raise SharefoldError(
                f"weights hold {what}: {name} ({bad} of {tensor.numel()} values) in {where}: "
                "use a checkpoint from before training diverged"
            )


def _descend(content: Any, where: str, notes: dict[str, Any]) -> Any:
    for _ in range(5):
        if isinstance(content, nn.Module):
            return content
        if not isinstance(content, Mapping):
            kind = type(content).__name__
            raise SharefoldError(f"no state dict in {where}: it holds one {kind}: save model.state_dict() instead")
        if _is_state(content):
            return content
        holders = [key for key in CONTAINERS if _holds_weights(content.get(key))]
        if not holders:
            others = [key for key, value in content.items() if isinstance(key, str) and _holds_weights(value)]
            if len(others) != 1:
                keys = ", ".join(repr(key) for key in list(content)[:8]) or "nothing"
                many = f"several candidates ({', '.join(others)})" if others else f"keys are {keys}"
                raise SharefoldError(f"no state dict in {where}: {many}: save model.state_dict() under 'state_dict'")
            holders = others
        notes["also"] += holders[1:]
        for key, value in content.items():
            if isinstance(key, str) and type(value) in _SHOWN_EXTRAS:
                notes["extras"][key] = value
            elif isinstance(key, str) and isinstance(value, np.generic):
                notes["extras"][key] = value.item()
        notes["unwrapped"].append(holders[0])
        content = content[holders[0]]
    raise SharefoldError(f"no state dict in {where}: the weights are nested too deeply: save model.state_dict()")


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "fiub")


def _is_state(content: Mapping[Any, Any]) -> bool:
    tensors = sum(_is_tensor(value) for value in content.values())
    nested = any(_holds_weights(content.get(key)) for key in CONTAINERS)
    return tensors > 0 and not nested


def _holds_weights(value: Any) -> bool:
    """Whether there are tensors in ``value`` or in the containers inside it, each looked at once: they may share parts, or
    hold themselves."""
    waiting, seen = [value], set[int]()
    while waiting:
        found = waiting.pop()
        if isinstance(found, nn.Module):
            return True
        if not isinstance(found, Mapping) or id(found) in seen:
            continue
        seen.add(id(found))
        if any(_is_tensor(v) for v in found.values()):
            return True
        waiting += [found[key] for key in CONTAINERS if key in found]
    return False


def _tensors_only(content: Mapping[Any, Any], where: str, notes: dict[str, Any]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for key, value in content.items():
        if value is None:
            raise SharefoldError(f"empty entry: {key} in {where} has no value: save the checkpoint again")
        if not isinstance(key, str) or not _is_tensor(value) or key.rpartition(".")[2] in _LITTER:
            notes["dropped"].append(str(key))
            continue
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        state[key] = tensor.detach()
    if not state:
        raise SharefoldError(f"no tensors in {where}: save model.state_dict() instead")
    return state


def _strip_prefixes(state: dict[str, Tensor], notes: dict[str, Any]) -> dict[str, Tensor]:
    while True:
        prefix = next((p for p in PREFIXES if all(name.startswith(p) and name != p for name in state)), None)
        if prefix is None:
            return state
        state = {name[len(prefix) :]: tensor for name, tensor in state.items()}
        notes["unwrapped"].append(prefix)
