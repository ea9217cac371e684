"""Architectures with the same names and shapes compute different things: which one was a file trained with?

Each is run on the same pictures, prepared as it wants them, and what its BatchNorms measure is compared with the running
statistics in the file (:mod:`sharefold.calibration.input_fit`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sharefold.architectures.build import build_base
from sharefold.architectures.matching import Match, label_of
from sharefold.architectures.shapes import load_weights
from sharefold.calibration.input_fit import Fit, fit_of
from sharefold.data.preprocess import Preprocess
from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.measure import first_logits
from sharefold.procedural import dead_leaves
from sharefold.running import evaluating, run_on
from sharefold.sources.preprocessing import preprocessing

# Normalised images (n, C, H, W) for a configuration such as ``Source.pretrained_cfg``.
Look = Callable[[dict[str, Any]], Tensor]

PICTURES = 32  # procedural ones
# A twin that is meant differs from the one that is not by more than this factor: EfficientNet-Lite0 by 1.8.
CLEAR = 1.25
# Outputs nearer than this, relative to their size, are of one and the same function.
SAME = 1e-3


@dataclass
class _Candidate:
    base: dict[str, Any]
    fit: Fit
    config: dict[str, Any]
    output: Tensor

    def same(self, other: _Candidate) -> bool:
        """Whether both are one and the same: they compute the same of images prepared in the same way."""
        if any(self.config[key] != other.config[key] for key in ("mean", "std", "input_size")):
            return False
        if self.output.shape != other.output.shape:
            return False
        return float((self.output - other.output).norm()) <= SAME * float(self.output.norm())


def settled(match: Match, state: dict[str, Tensor], file: str, look: Look | None = None) -> Match:
    """``match``, or the twin of it that the file was clearly trained with.

    A network that is named, by the user, in the file or by its file name, is doubted on real images alone.

    Args:
        look: real images; by default procedural ones.

    Warns:
        SharefoldWarning: a twin is taken against the name; or there are twins, and the images do not tell which one it is.
    """
    guessed = match.rule == "plainest name"
    if not match.twins or not (guessed or look is not None) or not any(key.endswith("running_var") for key in state):
        return match
    look = _pictures() if look is None else look
    candidates = [found for base in (match.base, *match.twins) if (found := _tried(base, state, file, look)) is not None]
    if not candidates or candidates[0].base is not match.base:
        return match
    first, others = candidates[0], [c for c in candidates[1:] if not c.same(candidates[0])]
    if not others:
        return match
    best = min([first, *others], key=lambda c: c.fit.whole)
    rivals = [c for c in [first, *others] if c is not best and not c.same(best)]
    if all(best.fit.clearly_better(rival.fit, CLEAR) for rival in rivals):
        if best is not first and not guessed:
            _warn(f"{file} is named like {label_of(first.base)}, but its BatchNorms were trained as {label_of(best.base)}, which "
                  f"is taken (distance {best.fit.whole:.3f} instead of {first.fit.whole:.3f}): name another with --arch")
        rest = tuple(base for base in (match.base, *match.twins) if base is not best.base)
        rule = "its BatchNorms" if guessed or best is not first else match.rule
        return replace(match, base=best.base, others=tuple(map(label_of, rest)), rule=rule, twins=rest)
    if guessed:
        names = ", ".join(label_of(c.base) for c in others)
        _warn(f"{file} fits {label_of(first.base)}, which is taken, and as well {names}, which compute something else: name the "
              "right one with --arch")
    return match


def _warn(text: str) -> None:
    warnings.warn(text, SharefoldWarning, stacklevel=6)


def _tried(base: dict[str, Any], state: dict[str, Tensor], file: str, look: Look) -> _Candidate | None:
    """The architecture with the file's weights, run; None where it cannot be built, filled or judged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = build_base(base)
            held = set(model.state_dict())
            if any(key.endswith("running_var") and key not in held for key in state):
                return None
            load_weights(model, state, file, base["name"])
        config = preprocessing(model, base, file)
        images = look(config)
        fit = fit_of(model, images)
        return None if fit is None else _Candidate(base, fit, config, _output(model, images[:2]))
    except SharefoldError:
        return None


def _pictures() -> Look:
    """Procedural pictures, the same for every candidate: drawing them takes longer than running a small network on them."""

    @cache
    def drawn(size: tuple[int, int, int]) -> Tensor:
        return dead_leaves(PICTURES, size[1:], size[0], 0)

    def look(config: dict[str, Any]) -> Tensor:
        preprocess = Preprocess.from_cfg(config)
        return preprocess.normalize(drawn(preprocess.size))

    return look


def _output(model: nn.Module, images: Tensor) -> Tensor:
    with evaluating(model):
        return torch.nan_to_num(first_logits(run_on(model, images)).float()).cpu()
