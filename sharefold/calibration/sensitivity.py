"""How much each layer's output matters to what the network says: a diagonal Fisher, without labels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sharefold.errors import SharefoldError
from sharefold.outputs import Divergence, divergence_of
from sharefold.running import device_of, evaluating, evenly

IMAGES = 256


def output_sensitivity(
    model: nn.Module, names: Iterable[str], images: Tensor, batch_size: int = 100, seed: int = 0,
    divergence: Divergence | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Per layer, (O,): expected squared gradient of log p(y|x) at each output channel, summed over positions.

    y is drawn from the network's own prediction, so half of it times a small squared output error is the second-order
    estimate of KL(original || converted) (the diagonal of the Fisher information; Martens, arXiv:1412.1193). Of outputs that
    are no classes it is a random projection's: :meth:`sharefold.outputs.Divergence.fisher_seed`.

    Args:
        model: in eval mode during the call; gradients of its parameters are left alone.
        images: (n, C, H, W); at most ``IMAGES`` of them, evenly spaced, are used.
        divergence: of conversions from ``model``; by default told from the images.

    Returns:
        An empty dictionary when the network's output cannot be differentiated (detection heads, for example).
    """
    index = evenly(len(images), IMAGES)
    generator = torch.Generator().manual_seed(seed)
    totals: dict[str, Tensor] = {}
    handles = []

    def watch(name: str, channels_last: bool) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            def add(gradient: Tensor | None) -> None:
                if gradient is None:  # what follows has no derivative (quantised layers)
                    return
                flat = gradient.flatten(0, -2) if channels_last else gradient.transpose(0, 1).flatten(1).T
                found = flat.square().sum(0).detach()
                totals[name] = totals[name] + found if name in totals else found

            if output.requires_grad:
                output.register_hook(add)

        handles.append(model.get_submodule(name).register_forward_hook(hook))

    device = device_of(model)
    try:
        divergence = divergence_of(model, images) if divergence is None else divergence
        for name in names:
            watch(name, isinstance(model.get_submodule(name), nn.Linear))
        with evaluating(model), torch.enable_grad():
            for batch in images[index].split(batch_size):
                leaf = batch.to(device).detach().requires_grad_(True)
                scalar = divergence.fisher_seed(divergence.reading.run(model, leaf), generator)
                if scalar is None:
                    return {}
                # With respect to the images: the parameters' own gradients are neither needed nor touched.
                torch.autograd.grad(scalar, leaf)
    except (RuntimeError, NotImplementedError, SharefoldError):
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / len(index) for name, total in totals.items()}
