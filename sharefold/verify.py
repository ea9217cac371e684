"""Whether a saved network is what its configuration claims."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from sharefold.architectures.build import build_on_meta
from sharefold.checkpoint import load
from sharefold.data import InputsDataset, Preprocess, loader
from sharefold.data.preprocess import shape_text
from sharefold.errors import SharefoldError
from sharefold.format import FileConfig, config_of
from sharefold.graph.layers import input_shapes
from sharefold.inputs import Input, joined, taken
from sharefold.measure import agreement, count_macs, count_parameters, evaluate, model_bytes
from sharefold.options import VerifyOptions, chosen
from sharefold.sources.preprocessing import preprocessing
from sharefold.untrusted import is_int, is_number, quoted

_SIGMAS = 4.0
_FEWEST = 50  # images of which a share is a claim


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
        data: images as :func:`sharefold.data.open_data` gives them, or tensors (:func:`sharefold.data.read_tensors`), for
            agreement, and with labels for accuracy.
        model: the dense module of a network of the user's own, as for :func:`sharefold.load`.
        options: how it is checked; ``settings`` are single fields of it (``limit=1000``).

    Returns:
        The claims, in the order checksum, params, params before (of the dense network; where the file claims them and it can be
        built), bytes, macs, agreement, top1. Shares of images hold within four standard errors of both numbers of images: the
        images of the claim may have been others. A file whose figure is of training images also says what to expect of new ones:
        the nearer of the two counts. A claim that is no number, or that none can be, differs. A share of fewer than
        50 images is no claim.

    Raises:
        SharefoldError: the file cannot be loaded, which is what damage leads to.
    """
    options = chosen(options, settings, VerifyOptions)
    before = None if model is None else count_parameters(model)
    network = load(path, model=model, device=options.device)
    config = config_of(network)
    told, plan = config.metrics, config.plan
    claims = [Claim("checksum", config.checksum or None, config.checksum or None, note="" if config.checksum else "an old file")]
    params = count_parameters(network)
    claimed = _claimed(told.get("params"), _is_count)
    claims.append(Claim("params", (plan.params_after or None) if claimed is None else claimed, params))
    if plan.params_after and plan.params_after != params:
        claims.append(Claim("params of the plan", plan.params_after, params))
    claims += _before(told.get("params"), plan.params_before, _dense_parameters(config) if before is None else before)
    claims.append(Claim("bytes", _claimed(told.get("bytes"), _is_count), model_bytes(network)))
    claims.append(_macs(network, config, data, options))
    claims.append(_agreement(network, source, data, told, options))
    if data is None or not getattr(data, "labelled", True):
        note = "give --data" if data is None else "the data hold no labels"
        claims.append(Claim("top1", _claimed(told.get("top1"), _is_share), None, note=note))
    else:
        found = evaluate(network, loader(data, options.batch_size), options.device, limit=options.limit)
        claims.append(_share("top1", told, float(found["top1"]), int(found["images"])))
    return claims


def image_config(network: nn.Module, config: FileConfig) -> dict[str, Any]:
    """How ``network``, loaded from a file with ``config``, wants its images: as the file says, else as the network does."""
    return {**preprocessing(network, config.base or {}), **config.pretrained_cfg}


def mismatches(claims: list[Claim]) -> str:
    """What differs, in one line; "" when all holds."""
    return "; ".join(f"{c.name} is {c.found}, the file claims {c.claimed}" for c in claims if not c.holds)


def _agreement(
    network: nn.Module, source: nn.Module | None, data: Dataset | None, told: dict[str, Any], options: VerifyOptions
) -> Claim:
    if source is None or data is None:
        return Claim("agreement", _claimed(told.get("agreement"), _is_share), None, note="give --source and --data")
    images = _images(data, options.limit, options.batch_size).to(options.device)
    found = agreement(source.to(options.device).eval(), network, images).top1
    behind = told.get("report_images")
    said = _share("agreement", told, found, len(images), behind)
    if told.get("seen_before") is not True or not isinstance(said.claimed, float | int):
        return said
    # Of training images the file claims two things, and nobody knows which kind these images are.
    new = _share("agreement", {"agreement": told.get("new_agreement")}, found, len(images), behind)
    if isinstance(new.claimed, str):
        return new
    if new.claimed is None or abs(new.claimed - found) >= abs(said.claimed - found):
        return said
    return replace(new, note=new.note or "as the file expects of new images")


def _images(data: Dataset, limit: int | None, batch_size: int) -> Input:
    found: list[Input] = []
    for images, _ in loader(data, batch_size):
        found.append(taken(images))
        if limit is not None and sum(map(len, found)) >= limit:
            break
    if not found:
        raise SharefoldError("verify: the data hold no images")
    return joined(found)[:limit]


def _share(name: str, told: dict[str, Any], found: float, count: int, behind: Any = None) -> Claim:
    """A share of ``count`` images here, and of ``behind`` images, others, in the claim; by default of as many."""
    claimed = _claimed(told.get(name), _is_share)
    if claimed is None or isinstance(claimed, str):
        return Claim(name, claimed, found)
    if behind is not None and not (is_int(behind) and behind > 0):
        return Claim(name, f"{claimed} of {quoted(behind)} images", found)
    if behind is not None and behind < _FEWEST:
        return Claim(name, None, found, note=f"the file has it of {behind} images alone, which is no claim")
    middle = min(max((found + claimed) / 2, 1 / count), 1 - 1 / count) if count > 1 else 0.5
    note = "" if count >= _FEWEST else f"{count} images tell little"
    return Claim(name, claimed, found, _SIGMAS * math.sqrt(middle * (1 - middle) * (1 / count + 1 / (behind or count))), note)


def _before(told: Any, planned: int, found: int | None) -> list[Claim]:
    """What the file says of the dense network, which has ``found`` parameters, None where nobody can build it."""
    told = told.get("before") if isinstance(told, dict) else None
    claimed = [told if told is None or _is_count(told) else quoted(told), planned or None]
    if found is None or claimed == [None, None]:
        return []
    first = Claim("params before", claimed[1] if claimed[0] is None else claimed[0], found)
    other = Claim("params before of the plan", claimed[1], found)
    return [first] if claimed[0] is None or other.holds else [first, other]


def _dense_parameters(config: FileConfig) -> int | None:
    try:
        return None if config.base is None else count_parameters(build_on_meta(config.base))
    except SharefoldError:
        return None


def _macs(network: nn.Module, config: FileConfig, data: Dataset | None, options: VerifyOptions) -> Claim:
    """MACs at the size that the file names, else the network, else the data have; of tensors, at theirs."""
    claimed = _claimed(config.metrics.get("macs"), _is_count)
    size = Preprocess.from_cfg(image_config(network, config)).size
    # Some networks of volumes take an image for a volume without a batch.
    images = 4 in input_shapes(network) and not isinstance(data, InputsDataset)
    examples: list[Input] = [torch.zeros(1, *size)] if images else []
    if data is not None and not isinstance(data, IterableDataset):
        first = data[0][0]
        examples.append(taken([tensor[None] for tensor in first]) if isinstance(first, tuple | list) else first[None])
    for example in examples:
        try:
            return Claim("macs", claimed, count_macs(network, example))
        except Exception:  # networks raise what they like for images that they cannot take
            continue
    note = f"the network takes no images of {shape_text(size)}" if examples else "give --data"
    # A network of the user's own may come from a conversion that did not know its size; a stock one does not.
    return Claim("macs", claimed, None if config.base is None or claimed is None else note, note=note)


def _is_count(value: Any) -> bool:
    return is_number(value) and value >= 0


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


def _claimed(value: Any, right: Callable[[Any], bool]) -> float | int | str | None:
    """A claim; of a pair, what is true of the converted network. What is not ``right`` becomes a text, which nothing equals."""
    if isinstance(value, dict):
        value = value.get("after", value)
    return value if value is None or right(value) else quoted(value)
