"""What a model costs and what it still knows: parameters, bytes, MACs, agreement, accuracy, latency, memory."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sharefold.data.class_names import warn_about_count
from sharefold.errors import SharefoldError
from sharefold.inputs import Tensors, call, check_count, taken
from sharefold.outputs.agreement import Agreement, agreement  # noqa: F401
from sharefold.outputs.kinds import are_probabilities
from sharefold.outputs.leaves import tensors_of
from sharefold.running import as_input, check_values, evaluating, random_kept, run_on, usable_device

# Of probabilities: less is no number that a softmax gives, and its logarithm would be infinite.
SMALLEST_SHARE = 1e-30


def count_parameters(model: nn.Module, *, trainable_only: bool = False) -> int:
    """Distinct parameters, each shared tensor once: ``sum(p.numel())``."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def model_bytes(model: nn.Module) -> int:
    """Bytes of parameters and persistent buffers in their present types: what a state dict must hold."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    seen: set[int] = set()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is None or name in module._non_persistent_buffers_set or id(buffer) in seen:
                continue
            seen.add(id(buffer))
            total += buffer.numel() * buffer.element_size()
    return total


def first_logits(output: Any) -> Tensor:
    """The first tensor of a model's output: a tensor, or the first in a (possibly nested) dict, tuple or list.

    Raises:
        SharefoldError: no tensor in it, or one dictionary of boxes an image.
    """
    if isinstance(output, Tensor):
        return output
    values: Iterable[Any] = ()
    if isinstance(output, Mapping):
        values = [output[key] for key in ("out", "logits") if key in output] or output.values()
    elif isinstance(output, (tuple, list)):
        if output and isinstance(output[0], Mapping) and "boxes" in output[0]:
            raise SharefoldError("the model returns detections: those are no logits to compare or to count by")
        values = output
    elif hasattr(output, "logits"):
        values = [output.logits]
    for value in values:
        return first_logits(value)
    raise SharefoldError(f"the model returned {type(output).__name__}, which holds no tensor of logits")


def count_macs(model: nn.Module, example_input: Tensors) -> int:
    """Multiply-accumulates of one forward pass for one image, of convolutions and matrix products.

    Args:
        model: any module, on any device (meta too); left as it was.
        example_input: (n, C, H, W), or a tuple of tensors; only the first image is used.

    Raises:
        SharefoldError: other tensors than ``forward`` takes.
    """
    image = taken(example_input)[:1]
    check_count(model, image, "MACs")
    with evaluating(model), random_kept(model):
        run_on(model, image)  # composed weights are cached here, once, and are no part of the cost of an image
        counter = FlopCounterMode(display=False)
        with counter:
            run_on(model, image)
    return counter.get_total_flops() // 2


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensors, Tensor]],
    device: torch.device | str = "cpu",
    *,
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Accuracy and loss of a classifier over a loader of (images, labels).

    Args:
        model: gives (n, classes) logits, or probabilities; moved to ``device``, its modes restored.
        loader: batches of normalised images (n, C, H, W), or tuples of tensors, and int64 labels (n,).
        device: where to run.
        limit: stop after this many images.
        progress: called with the number of images done after each batch.

    Returns:
        ``top1`` and ``top5`` (fractions of 1; top5 is top-k of all classes where there are fewer than five),
        ``loss`` (mean cross-entropy), ``images``, ``seconds``; of a network with several outputs also ``output``, the name
        of the one that the labels were compared with.

    Raises:
        SharefoldError: tensors without values, no images, unlabelled images, labels of other shapes or beyond the model's
            outputs, no such device here.

    Warns where the loader's data set names its classes, and they are not as many as the outputs.
    """
    check_values(model)
    model.to(usable_device(device))
    hits1 = hits5 = done = 0
    loss, counted, shares = 0.0, "", False
    started = time.perf_counter()
    with evaluating(model), random_kept(model):
        for given, labels in loader:
            images = taken(given)
            if limit is not None:
                images, labels = images[: limit - done], labels[: limit - done]
            said = run_on(model, images)
            logits = first_logits(said)
            if not done:
                counted = _name_of(logits, said)
                shares = logits.ndim == 2 and are_probabilities(logits)
            logits = logits.float().clamp_min(SMALLEST_SHARE).log() if shares else logits.float()
            if logits.ndim != 2:
                raise SharefoldError(f"the model's output has shape {tuple(logits.shape)}: eval wants (n, classes)")
            _check_labels(labels, logits.shape[1])
            if not done:
                warn_about_count(loader, logits.shape[1], "eval")
            labels = labels.to(logits.device)
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices
            hits = best == labels[:, None]
            hits1 += int(hits[:, 0].sum())
            hits5 += int(hits.any(dim=1).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            done += len(labels)
            if progress is not None:
                progress(done)
            if limit is not None and done >= limit:
                break
    if done == 0:
        raise SharefoldError("eval: the data holds no images")
    return {
        "top1": hits1 / done,
        "top5": hits5 / done,
        "loss": loss / done,
        "images": done,
        "seconds": time.perf_counter() - started,
        **({"output": counted} if counted else {}),
    }


def _name_of(logits: Tensor, output: Any) -> str:
    """The name of ``logits`` among several tensors of a network's output; "" of the only one."""
    leaves = tensors_of(output)
    return next((name for name, leaf in leaves.items() if leaf is logits), "") if len(leaves) > 1 else ""


def _check_labels(labels: Tensor, classes: int) -> None:
    if labels.ndim != 1:
        raise SharefoldError(f"the labels have shape {tuple(labels.shape)}: eval wants a class for every image (n,)")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0:
        raise SharefoldError("the data has no labels (or negative ones): eval needs a class for every image")
    if highest >= classes:
        raise SharefoldError(
            f"labels go up to {highest}, the model has {classes} outputs: wrong data for this model, or --num-classes"
        )


def latency(
    model: nn.Module,
    example_input: Tensors,
    repeats: int = 20,
    warmup: int = 3,
    threads: int | None = None,
) -> float:
    """Median seconds of a forward pass of ``example_input``, a tensor or a tuple of them, after ``warmup`` unmeasured ones.

    Args:
        threads: CPU threads for the measurement; the setting of before comes back.
    """
    if repeats < 1:
        raise SharefoldError(f"latency: {repeats} repeats: at least 1 is needed")
    example = as_input(model, taken(example_input))
    before = torch.get_num_threads()
    cuda = example.device.type == "cuda"
    times: list[float] = []
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        with evaluating(model), random_kept(model):
            for index in range(warmup + repeats):
                if cuda:
                    torch.cuda.synchronize(example.device)
                started = time.perf_counter()
                call(model, example)
                if cuda:
                    torch.cuda.synchronize(example.device)
                if index >= warmup:
                    times.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return statistics.median(times)


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Highest memory in bytes so far: of this process on the CPU, of the allocator on a CUDA device.

    0 where the platform does not tell (Windows).
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes
