"""What calibration images say of new ones. A network is surer of the images that it was trained on than of any others, and so
are its conversions: on those they agree more often than on new ones. Mild views stand in for new images.

Of a view that is turned, scaled and recoloured a little everybody says what is in the picture, and so it is an image that the
network ought to know; but it is none that it has seen, and of what it knew by heart little is left.
"""

from __future__ import annotations

from collections.abc import Iterator

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
# Where the network itself takes fewer views than this share for what it takes the image for, they say nothing of new images.
# Of training images of ResNet-20 and -56 it is .96 and .97, of sample images of EfficientNet-Lite0 .92.
RECOGNISED = 0.9
# By which share fewer mirror images than views are taken for what the image is where a mirror image means something else: of
# CIFAR-10 and ImageNet none, of digits .68.
LOST_IN_MIRROR = 0.1


def has_views(model: nn.Module, images: Input) -> bool:
    """Whether random views of ``images`` mean what the images do.

    Not of several inputs, which belong to each other, and not of what ``model`` brings into the shape of its convolutions on the
    way (vectors, clips of images): nobody knows what the axes mean.
    """
    return isinstance(images, Tensor) and images.ndim in {*input_shapes(model), 4}


def stand_ins(images: Tensor, seed: int = 0, mirror: bool = True) -> Tensor:
    """Views (VIEWS * n, C, H, W) of images (n, C, H, W) normalised to about unit variance; the seed alone draws them.

    Args:
        mirror: whether half of them are mirrored; see :func:`knows_mirrored`.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([random_views(images, generator, strength=STRENGTH, mix=0.0, mirror=mirror) for _ in range(VIEWS)])


def recognised(model: nn.Module, images: Input, views: Input, reading: OutputReading | None = None) -> bool:
    """Whether ``views``, one or several rounds of ``images``, have the same classes to ``model``, which predicts one an image."""
    reading = read_outputs(model, images) if reading is None else reading
    return _same_class(model, images, views, reading) >= RECOGNISED


def knows_mirrored(model: nn.Module, images: Tensor, reading: OutputReading | None = None) -> bool:
    """Whether mirror images of ``images`` mean what those do to ``model``, which predicts one class an image: about as much as
    views that are not mirrored."""
    reading = read_outputs(model, images) if reading is None else reading
    others = images.flip(-1), stand_ins(images, mirror=False)
    mirrored, views = (_same_class(model, images, other, reading) for other in others)
    return mirrored >= views - LOST_IN_MIRROR


def doubt(model: nn.Module, images: Input, reading: OutputReading | None = None) -> float:
    """1 - the probability of the most probable class, mean over images (and pixels, where those are predicted).

    Args:
        reading: of ``model``, which predicts classes; by default told from the images.
    """
    reading = read_outputs(model, images) if reading is None else reading
    doubts = [(1 - shares.exp().amax(-1)).reshape(len(shares), -1).mean(1) for shares in _answers(model, images, reading)]
    return float(torch.cat(doubts).double().mean())


def seen_before(model: nn.Module, images: Input, views: Input, reading: OutputReading | None = None) -> bool:
    """Whether ``model`` was trained on ``images``, as far as its certainty tells: see ``SURER`` and :func:`doubt`."""
    reading = read_outputs(model, images) if reading is None else reading
    return doubt(model, views, reading) > SURER * doubt(model, images, reading)


def _same_class(model: nn.Module, images: Input, others: Input, reading: OutputReading) -> float:
    """Share of ``others``, one or several rounds of ``images``, that get the class of the image.

    1 for a network that gives a class to every position: those have moved.
    """
    wanted, found = (
        torch.cat([shares.argmax(-1) for shares in _answers(model, these, reading)]) for these in (images, others)
    )
    if wanted.shape[1] > 1:
        return 1.0
    return float((found == wanted.repeat(len(found) // len(wanted), 1)).double().mean())


def _answers(model: nn.Module, images: Input, reading: OutputReading) -> Iterator[Tensor]:
    """Logarithms of the shares of classes (b, positions, classes), a batch at a time, on the CPU."""
    leaf = reading.classes
    assert leaf is not None
    with evaluating(model):
        for batch in images.split(batch_of(images)):
            yield log_shares(leaf, reading.run(model, batch)[0]).cpu()
