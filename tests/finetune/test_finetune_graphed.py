"""Updates recorded as CUDA graphs: what is recorded and replayed, with a stand-in, and on a GPU where there is one."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from finetune_nets import images_and_labels, shared_net
from networks import Small
from torch import Tensor, nn

from sharefold.errors import SharefoldWarning
from sharefold.finetune import finetune
from sharefold.finetune.graphed import WARM_UP, GraphedGradients

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class StandIn:
    """torch.cuda for :class:`GraphedGradients`: a graph whose replay computes again, from the tensors it was recorded with."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.recording = 0
        self.replays = 0
        self.fails = False
        self.restored = ""
        outer = self

        class Stream:
            def __init__(self, *_: Any) -> None: ...
            def wait_stream(self, _: Any) -> None: ...

        class Graph:
            again: Callable[[], None]

            def replay(self) -> None:
                outer.replays += 1
                self.again()

        @contextlib.contextmanager
        def graph(_: Graph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
            outer.recording += 1
            if outer.fails:
                raise RuntimeError("operation not permitted when stream is capturing")
            yield

        class Generator:
            def clone_state(self) -> str:
                return "before"

            def graphsafe_set_state(self, state: str) -> None:
                outer.restored = state

        for name, value in {
            "default_generators": [Generator()], "Stream": Stream, "CUDAGraph": Graph, "graph": graph,
            "stream": lambda _: contextlib.nullcontext(),
            "current_stream": lambda _: Stream(), "synchronize": lambda _: None,
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)


def graphed(net: nn.Module, patch: pytest.MonkeyPatch) -> tuple[GraphedGradients, StandIn]:
    stand_in, parameters = StandIn(patch), list(net.parameters())

    def compute(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        loss = nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        return {"loss": loss}

    made = GraphedGradients(compute, parameters, torch.device("cpu"))
    record = made._record

    def recorded(images: Tensor, labels: Tensor) -> Any:
        """As on a GPU, with a graph that knows what to compute again, into the same tensors."""
        found = record(images, labels)

        def again() -> None:
            for parameter in parameters:
                parameter.grad = None
            parts = compute(found.images, found.labels)
            found.parts["loss"].copy_(parts["loss"].detach())
            for place, parameter in zip(found.gradients, parameters, strict=True):
                place.copy_(parameter.grad)
                parameter.grad = place

        found.graph.again = again
        return found

    made._record = recorded  # type: ignore[method-assign]
    return made, stand_in


def test_after_the_first_updates_one_of_each_shape_is_recorded_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Small(norm=nn.Identity).eval()  # no dropout
    made, stand_in = graphed(net, monkeypatch)
    torch.manual_seed(0)
    for number in range(2 * WARM_UP + 6):
        images, labels = torch.randn(4, 3, *((8, 8) if number % 2 else (6, 6))), torch.randint(0, 4, (4,))
        for parameter in net.parameters():
            parameter.grad = None
        loss = nn.functional.cross_entropy(net(images), labels)
        expected = torch.autograd.grad(loss, list(net.parameters()))
        parts = made(images, labels)
        assert torch.allclose(parts["loss"], loss)
        for parameter, gradient in zip(net.parameters(), expected, strict=True):
            assert torch.allclose(parameter.grad, gradient, atol=1e-6)
    assert stand_in.recording == 2 and stand_in.replays == 6


def test_a_network_that_cannot_be_recorded_goes_on_as_before_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Small(norm=nn.Identity).eval()  # no dropout
    made, stand_in = graphed(net, monkeypatch)
    stand_in.fails = True
    images, labels = torch.randn(4, 3, 8, 8), torch.randint(0, 4, (4,))
    for number in range(WARM_UP + 3):
        for parameter in net.parameters():
            parameter.grad = None
        told = pytest.warns(SharefoldWarning, match="cannot be recorded") if number == WARM_UP else warnings.catch_warnings()
        with told:
            made(images, labels)
        assert all(parameter.grad is not None for parameter in net.parameters())
    assert stand_in.recording == 1 and stand_in.replays == 0 and stand_in.restored == "before"


@gpu
@pytest.mark.parametrize(
    "changes", [{}, {"freeze_norm": True}, {"block_match": 0.3}, {"amp": "off"}, {"clip": 1.0, "mixup": 0.2}], ids=str
)
def test_replayed_updates_are_those_made_one_by_one(changes: dict[str, Any]) -> None:
    data, losses = images_and_labels(256), []
    for graphs in (True, False):
        report = finetune(
            shared_net(), data, data, teacher=shared_net(1), epochs=3, batch_size=16, optimizer="sgd", lr=0.02, augment="crop1",
            small_images=0.5, seed=3, device="cuda", quiet=True, cuda_graphs=graphs, **changes,
        )  # fmt: skip
        losses.append([epoch["train_loss"] for epoch in report.history])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert losses[0][-1] < losses[0][0]


@gpu
def test_dropout_differs_from_replay_to_replay() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 4)).cuda()

    def compute(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        loss = nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        return {"loss": loss}

    made = GraphedGradients(compute, list(net.parameters()), torch.device("cuda", 0))
    images, labels, found = torch.randn(8, 3, 8, 8).cuda(), torch.arange(8).cuda() % 4, []
    for step in range(WARM_UP + 6):
        torch.manual_seed(step % 3)
        net.zero_grad()
        found.append(float(made(images, labels)["loss"]))
    late = found[WARM_UP:]
    assert late[:3] == pytest.approx(late[3:]) and len({round(loss, 6) for loss in late}) == 3


class Asks(Small):
    """Asks for a number on the way, which no graph can hold."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if float(x.mean()) < 1e9 else 0.0)


@gpu
def test_a_network_that_asks_for_numbers_trains_all_the_same() -> None:
    data = images_and_labels(128)
    with pytest.warns(SharefoldWarning, match="cannot be recorded as a CUDA graph"):
        report = finetune(Asks(), data, data, epochs=2, batch_size=16, lr=0.01, augment="none", device="cuda", quiet=True)
    assert report.updates == 16 and report.history[-1]["train_loss"] < report.history[0]["train_loss"]
