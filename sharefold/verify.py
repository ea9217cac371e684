"""Whether a saved network is what its configuration claims."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from sharefold.checkpoint import load
from sharefold.data import Preprocess, loader
from sharefold.errors import SharefoldError
from sharefold.format import config_of
from sharefold.measure import agreement, count_macs, count_parameters, evaluate, model_bytes
from sharefold.options import VerifyOptions, chosen
from sharefold.untrusted import is_int

_SIGMAS = 4.0


@dataclass(frozen=True)
class Claim:
    """One claim: ``claimed`` by the file and ``found`` here, None for what the file does not claim or nobody could check.

    ``tolerance``: how far both may be apart; 0 for counts. ``note`` says why something was not checked.
    """

    name: str
    claimed: float | int | str | None
    found: float | int | str | None
    tolerance: float = 0.0
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether nothing speaks against the claim."""
        if self.claimed is None or self.found is None:
            return True
        if isinstance(self.claimed, str) or isinstance(self.found, str):
            return self.claimed == self.found
        return abs(self.claimed - self.found) <= self.tolerance


def verify(
    path: str | Path, *, source: nn.Module | None = None, data: Dataset | None = None, model: nn.Module | None = None,
    options: VerifyOptions | None = None, **settings: Any,
) -> list[Claim]:  # fmt: skip
    """Recomputes what the file at ``path`` claims.

    Args:
        path: a directory or file that ``save`` wrote. Its checksum is checked by reading it.
        source: the original network, for the agreement of both.
        data: labelled images as :func:`sharefold.data.open_data` gives them, for accuracy and agreement.
        model: the dense module of a network of the user's own, as for :func:`sharefold.load`.
        options: how it is checked; ``settings`` are single fields of it (``limit=1000``).

    Returns:
        The claims, in the order checksum, params, bytes, macs, agreement, top1. Shares of images hold within four standard
        errors of both numbers of images: the images of the claim may have been others.

    Raises:
        SharefoldError: the file cannot be loaded, which is what damage leads to.
    """
    options = chosen(options, settings, VerifyOptions)
    network = load(path, model=model, device=options.device)
    config = config_of(network)
    told = config.metrics
    claims = [Claim("checksum", config.checksum or None, config.checksum or None, note="" if config.checksum else "an old file")]
    params = count_parameters(network)
    claims.append(Claim("params", _number(told.get("params")) or config.plan.params_after or None, params))
    if config.plan.params_after and config.plan.params_after != params:
        claims.append(Claim("params of the plan", config.plan.params_after, params))
    claims.append(Claim("bytes", _number(told.get("bytes")), model_bytes(network)))
    size = Preprocess.from_cfg(config.pretrained_cfg).size
    claims.append(Claim("macs", _number(told.get("macs")), count_macs(network, torch.zeros(1, *size, device=options.device))))
    claims.append(_agreement(network, source, data, told, options))
    if data is None:
        claims.append(Claim("top1", _number(told.get("top1")), None, note="give --data"))
    else:
        found = evaluate(network, loader(data, options.batch_size), options.device, limit=options.limit)
        claims.append(_share("top1", told, float(found["top1"]), int(found["images"])))
    return claims


def mismatches(claims: list[Claim]) -> str:
    """What differs, in one line; "" when all holds."""
    return "; ".join(f"{c.name} is {c.found}, the file claims {c.claimed}" for c in claims if not c.holds)


def _agreement(
    network: nn.Module, source: nn.Module | None, data: Dataset | None, told: dict[str, Any], options: VerifyOptions
) -> Claim:
    if source is None or data is None:
        return Claim("agreement", _number(told.get("agreement")), None, note="give --source and --data")
    images = _images(data, options.limit, options.batch_size).to(options.device)
    behind: Any = told.get("report_images")
    found = agreement(source.to(options.device).eval(), network, images).top1
    return _share("agreement", told, found, len(images), behind if is_int(behind) and behind > 0 else None)


def _images(data: Dataset, limit: int | None, batch_size: int) -> Tensor:
    found: list[Tensor] = []
    for images, _ in loader(data, batch_size):
        found.append(images)
        if limit is not None and sum(map(len, found)) >= limit:
            break
    if not found:
        raise SharefoldError("verify: the data hold no images")
    return torch.cat(found)[:limit]


def _share(name: str, told: dict[str, Any], found: float, count: int, behind: int | None = None) -> Claim:
    """A share of ``count`` images here, and of ``behind`` images, others, in the claim; by default of as many."""
    claimed = _number(told.get(name))
    middle = min(max((found + claimed) / 2 if claimed is not None else found, 1 / count), 1 - 1 / count) if count > 1 else 0.5
    return Claim(name, claimed, found, _SIGMAS * math.sqrt(middle * (1 - middle) * (1 / count + 1 / (behind or count))))


def _number(value: Any) -> float | int | None:
    """A claim; of a pair, what is true of the converted network."""
    if isinstance(value, dict):
        value = value.get("after")
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None
