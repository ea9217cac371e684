"""Which axis of a user's images counts the channels: the network itself tells."""

from __future__ import annotations

from torch import Tensor, nn

from sharefold.graph.preserved import tried


def channels_last(images: Tensor, model: nn.Module, channels: int) -> Tensor:
    """Images (N, C, H, W) or (N, H, W, C), uint8 or float, as (N, H, W, C).

    ``model`` runs on one of them, since what a network of one's own says of its channels is often only a default. Where it takes
    both orders, or neither, ``channels`` decides, and what that leaves open is (N, C, H, W).

    Args:
        model: the network that they are for; left as it was.
        channels: how many its configuration says.
    """
    turned = images.permute(0, 2, 3, 1)
    likely, other = (images, turned) if images.shape[3] == channels != images.shape[1] else (turned, images)
    return other if not _takes(model, likely) and _takes(model, other) else likely


def _takes(model: nn.Module, images: Tensor) -> bool:
    return not tried(model, images[:1].permute(0, 3, 1, 2).float())[1]
