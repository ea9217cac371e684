"""What calibration images say of new ones. A network is surer of the images that it was trained on than of any others, and so
are its conversions: on those they agree more often than on new ones. Mild views stand in for new images.

Of a view that is turned, scaled and recoloured a little everybody says what is in the picture, and so it is an image that the
network ought to know; but it is none that it has seen, and of what it knew by heart little is left.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sharefold.data.views import random_views
from sharefold.graph.layers import input_shapes
from sharefold.inputs import Input
from sharefold.outputs import OutputReading, read_outputs
from sharefold.outputs.terms import log_shares
from sharefold.running import batch_of, evaluating

# A quarter of the views that refinement learns from: at most 4 degrees, 5 % of size and of half a side, no mixing.
STRENGTH = 0.25
# Of every image; more would say little more, as the images stay the same.
VIEWS = 2
# A network that is so many times less certain of views than of the images has seen the images before.
SURER = 2.0


def has_views(model: nn.Module, images: Input) -> bool:
    """Whether random views of ``images`` mean what the images do.

    Not of several inputs, which belong to each other, and not of what ``model`` brings into the shape of its convolutions on the
    way (vectors, clips of images): nobody knows what the axes mean.
    """
    return isinstance(images, Tensor) and images.ndim in {*input_shapes(model), 4}


def stand_ins(images: Tensor, seed: int = 0) -> Tensor:
    """Views (VIEWS * n, C, H, W) of images (n, C, H, W) normalised to about unit variance; the seed alone draws them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([random_views(images, generator, strength=STRENGTH, mix=0.0) for _ in range(VIEWS)])


def doubt(model: nn.Module, images: Input, reading: OutputReading | None = None) -> float:
    """1 - the probability of the most probable class, mean over images (and pixels, where those are predicted).

    Args:
        reading: of ``model``, which predicts classes; by default told from the images.
    """
    reading = read_outputs(model, images) if reading is None else reading
    leaf = reading.classes
    assert leaf is not None
    found = []
    with evaluating(model):
        for batch in images.split(batch_of(images)):
            best = log_shares(leaf, reading.run(model, batch)[0]).exp().amax(-1)
            found.append((1 - best).reshape(len(batch), -1).mean(1).cpu())
    return float(torch.cat(found).double().mean())


def seen_before(model: nn.Module, images: Input, views: Input, reading: OutputReading | None = None) -> bool:
    """Whether ``model`` was trained on ``images``, as far as its certainty tells: see ``SURER`` and :func:`doubt`."""
    reading = read_outputs(model, images) if reading is None else reading
    return doubt(model, views, reading) > SURER * doubt(model, images, reading)
