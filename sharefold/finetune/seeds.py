"""Randomness as a function of (seed, place): what makes a resumed run and one on more processes follow the same path.

No generator lives across steps. Each draw gets a seed mixed from the run's seed and the place it is made at (epoch,
step, rank ...), so the position of every generator is known from the step number alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_ORDER, _AUGMENT, _MIX, _SAMPLE, _STEP = range(5)
STREAMS = {"order": _ORDER, "augment": _AUGMENT, "mix": _MIX, "sample": _SAMPLE, "step": _STEP}


def mixed(stream: str, seed: int, *place: int) -> int:
    """A 63-bit seed for one purpose (a name in STREAMS) at one place; numpy's SeedSequence does the mixing."""
    words = np.random.SeedSequence([abs(seed), STREAMS[stream], *place]).generate_state(2, np.uint32)
    return (int(words[0]) << 31) | int(words[1] >> 1)


def generator(stream: str, seed: int, *place: int) -> torch.Generator:
    """A fresh CPU generator for one purpose at one place."""
    return torch.Generator().manual_seed(mixed(stream, seed, *place))


def seed_everything(value: int) -> None:
    """Seeds torch (all devices), numpy and python: dropout, drop-path and timm's augmentations draw from these."""
    torch.manual_seed(value)
    _seed_libraries(value)


def _seed_libraries(value: int) -> None:
    np.random.seed(value % 2**32)
    random.seed(value)


@contextmanager
def seeded(value: int) -> Iterator[None]:
    """The global generators of torch (CPU), numpy and python seeded; the caller gets them back as they were."""
    with restored():
        torch.random.default_generator.manual_seed(value)  # not those of GPUs, which nobody would give back
        _seed_libraries(value)
        yield


@contextmanager
def restored() -> Iterator[None]:
    """Gives the caller the global generators of torch (CPU), numpy and python back as they were."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
