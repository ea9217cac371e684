"""Loss and gradients of one update as a CUDA graph: recorded once, replayed as one launch.

At 32 x 32 a GPU computes an update of ResNet-56 in less time than Python needs to launch its thousand kernels one by one. The
graph holds forward pass, loss and backward pass; augmentation, optimizer and weight average stay outside, so that whatever
changes from step to step (images, learning rate, decay of the average) is no part of it.
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sharefold.errors import SharefoldWarning

# Updates made one kernel at a time before an update is recorded: libraries choose their algorithms and make room.
WARM_UP = 3
# Shapes of batches that are recorded; each keeps memory for its own activations. Others are computed a kernel at a time.
MOST = 3

Parts = dict[str, Tensor]
Compute = Callable[[Tensor, Tensor], Parts]


@dataclass
class _Recorded:
    """A graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    labels: Tensor
    parts: Parts
    gradients: list[Tensor | None]


class GraphedGradients:
    """Computes a loss and its gradients as ``compute`` does, by replaying a graph for each shape of batch.

    Args:
        compute: (images, labels) -> the loss's parts; leaves gradients in ``parameters``, which have none when it is called.
        parameters: what gets gradients. Nobody else may keep a gradient from one call to the next.
        device: the GPU.

    A network that cannot be recorded (it asks for a number on the way, or its shapes depend on one) is computed as before,
    with a warning.
    """

    def __init__(self, compute: Compute, parameters: list[nn.Parameter], device: torch.device) -> None:
        self.compute, self.parameters, self.device = compute, parameters, device
        self.stream = torch.cuda.Stream(device)
        self.seen: dict[object, int] = {}
        self.recorded: dict[object, _Recorded] = {}
        self.refused = False

    def __call__(self, images: Tensor, labels: Tensor) -> Parts:
        key = (images.shape, images.stride(), labels.shape, labels.dtype)
        if self.refused:
            return self.compute(images, labels)
        if key not in self.recorded:
            self.seen[key] = self.seen.get(key, 0) + 1
            if self.seen[key] <= WARM_UP or len(self.recorded) == MOST:
                return self._aside(images, labels)
            reason = self._try(key, images, labels)
            if reason:  # outside of the exception, which would hold on to all that the recording took
                self._refuse(reason)
                return self.compute(images, labels)
        return self._replay(self.recorded[key], images, labels)

    def _aside(self, images: Tensor, labels: Tensor) -> Parts:
        """As usual, on the stream that will record."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            parts = {name: value.detach() for name, value in self.compute(images, labels).items()}
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return parts

    def _try(self, key: object, images: Tensor, labels: Tensor) -> str:
        """Records a shape; the reason why that cannot be, or ""."""
        try:
            self.recorded[key] = self._record(images, labels)
        except RuntimeError as error:
            return " ".join(str(error).split())[:200] or type(error).__name__
        return ""

    def _record(self, images: Tensor, labels: Tensor) -> _Recorded:
        """Records without computing: the first replay makes the update."""
        graph = torch.cuda.CUDAGraph()
        images, labels = images.clone(), labels.clone()
        torch.cuda.synchronize(self.device)
        random = torch.cuda.default_generators[self.device.index or 0]
        state = random.clone_state()
        try:
            # Threads that load images may take pinned memory meanwhile.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                parts = {name: value.detach() for name, value in self.compute(images, labels).items()}
        except RuntimeError:
            random.graphsafe_set_state(state)  # the one that was recorded waits for an end of the recording
            raise
        return _Recorded(graph, images, labels, parts, [p.grad for p in self.parameters])

    def _replay(self, recorded: _Recorded, images: Tensor, labels: Tensor) -> Parts:
        recorded.images.copy_(images)
        recorded.labels.copy_(labels)
        for parameter, gradient in zip(self.parameters, recorded.gradients, strict=True):
            parameter.grad = gradient
        recorded.graph.replay()
        return recorded.parts

    def _refuse(self, reason: str) -> None:
        self.refused = True
        self.recorded.clear()
        for parameter in self.parameters:
            parameter.grad = None
        warnings.warn(
            f"finetune: the network cannot be recorded as a CUDA graph ({reason}): it trains one kernel at a time, which is "
            "slower; --no-cuda-graphs says so from the start",
            SharefoldWarning,
            stacklevel=2,
        )
