"""How much each layer's output matters to what the network says: a Fisher information, without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from sharefold.errors import SharefoldError
from sharefold.graph.preserved import preserved
from sharefold.inputs import Input, each_of
from sharefold.outputs import Divergence, divergence_of
from sharefold.running import as_input, evaluating, evenly

IMAGES = 256

# (name of a layer, its input, its output's gradient)
Visit = Callable[[str, Tensor, Tensor], None]


def output_sensitivity(
    model: nn.Module, names: Iterable[str], images: Input, batch_size: int = 100, seed: int = 0,
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
    totals: dict[str, Tensor] = {}

    def add(name: str, inputs: Tensor, gradient: Tensor) -> None:
        channels_last = isinstance(model.get_submodule(name), nn.Linear)
        flat = gradient.flatten(0, -2) if channels_last else gradient.transpose(0, 1).flatten(1).T
        found = flat.square().sum(0)
        totals[name] = totals[name] + found if name in totals else found

    count = _gradients(model, names, images, add, batch_size=batch_size, seed=seed, divergence=divergence)
    return {name: total / count for name, total in totals.items()} if count else {}


def vector_gradients(
    model: nn.Module, names: Iterable[str], images: Input, batch_size: int = 100, seed: int = 0,
    divergence: Divergence | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:  # fmt: skip
    """Of layers with one position an image (classifiers, squeeze-and-excitation): inputs (n, I) and gradients (n, O), float32.

    The gradients are those of :func:`output_sensitivity`, image by image: a classifier errs most in the logit of the class
    that an image shows, which matters most there, and a mean over images of either does not know it.

    Args:
        names, images, batch_size, seed, divergence: as there.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(name: str, inputs: Tensor, gradient: Tensor) -> None:
        if len(inputs) and inputs[0].numel() == inputs.shape[1] and gradient[0].numel() == gradient.shape[1]:
            found.setdefault(name, []).append((inputs.flatten(1).float(), gradient.flatten(1).float()))

    if not _gradients(model, names, images, add, batch_size=batch_size, seed=seed, divergence=divergence):
        return {}
    return {name: (torch.cat([x for x, _ in parts]), torch.cat([g for _, g in parts])) for name, parts in found.items()}


def _gradients(
    model: nn.Module, names: Iterable[str], images: Input, visit: Visit, *, batch_size: int, seed: int,
    divergence: Divergence | None,
) -> int:  # fmt: skip
    """Shows ``visit`` every layer's input and gradient; the number of images, 0 where there is no gradient."""
    index = evenly(len(images), IMAGES)
    generator = torch.Generator().manual_seed(seed)
    handles = []

    def watch(name: str) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            def add(gradient: Tensor | None) -> None:
                if gradient is not None:  # else what follows has no derivative (quantised layers)
                    visit(name, inputs[0].detach(), gradient.detach())

            if output.requires_grad:
                output.register_hook(add)

        handles.append(model.get_submodule(name).register_forward_hook(hook))

    try:
        divergence = divergence_of(model, images) if divergence is None else divergence
        for name in names:
            watch(name)
        # What a network keeps of this run would hold on to its gradients, and could not be copied.
        with preserved(model), evaluating(model), torch.enable_grad():
            for batch in images[index].split(batch_size):
                given = as_input(model, batch)
                leaves = [tensor.requires_grad_(True) for tensor in each_of(given) if tensor.is_floating_point()]
                scalar = divergence.fisher_seed(divergence.reading.run(model, given), generator)
                if scalar is None:
                    return 0
                # With respect to the images: the parameters' own gradients are neither needed nor touched.
                torch.autograd.grad(scalar, leaves, allow_unused=len(leaves) > 1)
    except (RuntimeError, NotImplementedError, SharefoldError):
        return 0
    finally:
        for handle in handles:
            handle.remove()
    return len(index)
