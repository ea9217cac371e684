"""Networks of one-dimensional convolutions: a Conv1d is a Conv2d of maps one pixel high, from the graph to the file."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Block
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sharefold
from sharefold.calibration.calibrate import Calibration
from sharefold.calibration.statistics import patches_of
from sharefold.data.views import random_views
from sharefold.errors import SharefoldError
from sharefold.export import export
from sharefold.finetune import finetune
from sharefold.layers import form_of, shared_layers
from sharefold.measure import count_macs
from sharefold.options import PlanOptions
from sharefold.planner import Planner


class Listener(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 16, 7, stride=2, padding=3)
        self.layer1 = nn.Sequential(*[Block(16, norm=nn.BatchNorm1d, conv=nn.Conv1d) for _ in range(3)])
        self.down = nn.Conv1d(16, 32, 3, stride=2, padding=1, padding_mode="circular")
        self.layer2 = nn.Sequential(*[Block(32, norm=nn.BatchNorm1d, conv=nn.Conv1d) for _ in range(3)])
        self.pool, self.head = nn.AdaptiveAvgPool1d(1), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.down(self.layer1(torch.relu(self.stem(x)))))
        return self.head(self.pool(x).flatten(1))


def sounds(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 4, (count,), generator=random)
    cycles = torch.tensor([3.0, 6.0, 10.0, 15.0])[kind, None, None] * (1 + 0.05 * torch.randn(count, 1, 1, generator=random))
    phase, time = 6.28 * torch.rand(count, 2, 1, generator=random), torch.arange(96) / 96
    return torch.sin(6.28 * cycles * time + phase) + 0.4 * torch.randn(count, 2, 96, generator=random), kind


@pytest.fixture(scope="module")
def trained() -> Listener:
    torch.manual_seed(0)
    net, (x, y) = Listener(), sounds(1280)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for start in range(0, len(x), 32):
        optimizer.zero_grad()
        F.cross_entropy(net(x[start : start + 32]), y[start : start + 32]).backward()
        optimizer.step()
    return net.eval()


@functools.cache
def calibrated(trained: Listener) -> Calibration:
    return sharefold.calibrate(trained, sounds(300, 1)[0])


@functools.cache
def planner(trained: Listener, method: str) -> Planner:
    """One a method: its candidates do not depend on the budget."""
    return Planner(calibrated(trained), PlanOptions(method=method))


def converted(trained: Listener, budget: str, method: str = "auto", **options: Any) -> tuple[nn.Module, Any]:
    net = copy.deepcopy(trained)
    return net, sharefold.convert_(net, planner(trained, method).plan(budget), calibrated(trained), **options)


@torch.no_grad()
def right(net: nn.Module) -> float:
    x, y = sounds(500, 2)
    return float((net.eval()(x).argmax(1) == y).float().mean())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 5, stride=2, padding=3, dilation=2), nn.Conv1d(4, 6, 4, padding="same", bias=False),
        nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect"), nn.Conv1d(4, 8, 3, groups=2, padding="valid"), nn.Conv1d(4, 6, 1),
    ],
)  # fmt: skip
def test_a_form_stands_for_the_layer_and_makes_it_again(layer: nn.Conv1d) -> None:
    form, x = form_of(layer), torch.randn(3, 4, 20)
    assert form is not None and form.kind == "conv1d" and form.stock_shape == tuple(layer.weight.shape)
    weight = layer.weight.detach().reshape(form.weight_shape)
    expected = layer(x)
    torch.testing.assert_close(form.as_stock(form.apply(form.as_maps(x), weight, layer.bias)), expected)
    again = form.dense(weight, layer.bias, None)
    assert isinstance(again, nn.Conv1d) and form_of(again) == form
    torch.testing.assert_close(again(x), expected)
    patches = patches_of(form, x, None, torch.Generator())  # (P, G, N)
    rows = torch.einsum("pgn,gon->pgo", patches, weight.reshape(form.groups, -1, form.features)).flatten(1)
    bias = 0 if layer.bias is None else layer.bias
    torch.testing.assert_close(rows + bias, expected.transpose(1, 2).flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_the_graph_finds_its_layers_norms_and_private_channels(trained: Listener) -> None:
    graph = sharefold.analyze(trained, torch.randn(1, 2, 96))
    record = graph.layers["layer1.1.conv1"]
    assert record.kind == "conv1d" and record.weight_shape == (16, 16, 1, 3) and record.input_size == (1, 48)
    assert record.norm == "layer1.1.bn1" and record.private_output and not graph.skipped
    assert graph.layers["layer2.0.conv2"].role == "conv2"


@pytest.mark.parametrize("method", ["auto", "basis", "hybrid", "svd", "fold", "average", "cluster-kernel"])
def test_half_of_it_says_the_same(trained: Listener, method: str, tmp_path: Path) -> None:
    assert right(trained) > 0.95
    net, done = converted(trained, "50%", method)
    assert sum(p.numel() for p in net.parameters()) <= 0.51 * sum(p.numel() for p in trained.parameters())
    x = sounds(40, 3)[0]
    with torch.no_grad():
        found = net(x)
        if method not in ("average", "cluster-kernel"):
            assert right(net) > 0.93 and done.agreement > 0.9
        sharefold.save(net, tmp_path / "net")
        loaded = sharefold.load(tmp_path / "net", model=Listener()).eval()
        torch.testing.assert_close(loaded(x), found)
        stock = sharefold.expand(loaded)
        torch.testing.assert_close(stock(x), found, rtol=1e-4, atol=1e-4)
    assert not shared_layers(stock) and isinstance(stock.stem, nn.Conv1d)
    assert all(p.is_contiguous() for p in stock.parameters())


@pytest.mark.parametrize("budget", ["50% MACs", "60%, 80% MACs", "12kB"])
def test_budgets_hold(trained: Listener, budget: str, tmp_path: Path) -> None:
    net, _ = converted(trained, budget)
    sharefold.save(net, tmp_path / "net.safetensors")
    x = sounds(1)[0]
    if "MACs" in budget:
        share = 0.5 if budget.startswith("50%") else 0.8
        assert count_macs(net, x) <= share * count_macs(trained, x)
    else:
        assert (tmp_path / "net.safetensors").stat().st_size <= 12_000
    assert right(net) > 0.9


def test_layers_run_composed_and_factored_alike(trained: Listener) -> None:
    for method in ("basis", "svd", "hybrid"):
        net, _ = converted(trained, "40%", method)
        x = sounds(4)[0]
        outputs = []
        for runtime in ("composed", "factored"):
            for layer in shared_layers(net).values():
                layer.runtime = runtime
                assert len(layer.kernel_size) == len(layer.stride) == 1 or layer.form.kind == "linear"
            with torch.no_grad():
                outputs.append(net(x))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_refinement_and_fine_tuning_take_signals(trained: Listener) -> None:
    net, _ = converted(trained, "25%", refine=2)
    refined, (x, y) = right(net), sounds(640)
    few = {"teacher": trained, "epochs": 1, "quiet": True, "workers": 0, "device": "cpu"}
    report = finetune(net, TensorDataset(x, y), TensorDataset(*sounds(200, 2)), batch_size=64, **few)
    assert report.top1_after >= refined - 0.05 and report.top1_after > 0.9
    assert finetune(net, DataLoader(TensorDataset(x, y), 64, shuffle=True), **few).updates == 10
    with pytest.raises(SharefoldError, match=r"fails on a batch of shape \(2, 1, 2, 96\).*a Dataset or a DataLoader"):
        finetune(net, (x, y), **few)
    with pytest.raises(SharefoldError, match=r"small_images is for images \(N, C, H, W\)"):
        finetune(net, TensorDataset(x, y), small_images=0.5, **few)


def test_views_of_signals_are_shifted_louder_or_softer_and_drawn_by_the_seed() -> None:
    x = sounds(64)[0]
    views = [random_views(x, torch.Generator().manual_seed(seed), mix=0.0) for seed in (0, 0, 1)]
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])
    assert views[0].shape == x.shape
    still = random_views(x, torch.Generator().manual_seed(0), strength=0.0, mix=0.0)
    torch.testing.assert_close(still, x)
    for signal, view in zip(x[:8], views[0][:8], strict=True):
        # The same signal from another moment on: its inner part is found again somewhere, times a volume.
        inner = view[:, 24:72]
        scores = [F.cosine_similarity(signal[:, i : i + 48].flatten(), inner.flatten(), dim=0) for i in range(48)]
        assert max(scores) > 0.999


def test_wrong_inputs_are_told(trained: Listener) -> None:
    cases: dict[str, Tensor] = {
        r"no float tensor of signals \(n, C, L\) or images .*, and Listener fails on it .*2 channels": torch.randn(8, 96),
        "fails on the example input .* 2 channels, but got 3 channels": torch.randn(8, 3, 96),
        "fails on the example input .*conv1d": torch.randn(8, 2, 1, 96),
    }
    for message, x in cases.items():
        with pytest.raises(SharefoldError, match=message):
            sharefold.calibrate(copy.deepcopy(trained), x)
    with pytest.raises(SharefoldError, match=r"no float tensor of images \(n, C, H, W\): pass normalised ones"):
        sharefold.calibrate(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(8, 3, 32))


def test_onnx_computes_the_same(trained: Listener, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    net, _ = converted(trained, "50%", "hybrid")
    x = sounds(6, 3)[0]
    with pytest.raises(SharefoldError, match="takes signals .*, of a size that it does not say: pass example_input"):
        export(net, tmp_path / "net.onnx")
    export(net, tmp_path / "net.onnx", example_input=x[:2])
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), net(x), rtol=1e-4, atol=1e-4)


class Ended(nn.Module):
    """Ends in a convolution over the signal, as networks that label every moment do."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv, size, pad = (nn.Conv1d, 3, 1) if flat else (nn.Conv2d, (1, 3), (0, 1))
        layers: list[nn.Module] = [conv(2, 16, size, padding=pad), nn.ReLU()]
        for _ in range(4):
            layers += [conv(16, 16, size, padding=pad), nn.ReLU()]
        self.body, self.end = nn.Sequential(*layers), conv(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.body(x))


def test_a_last_convolution_is_solved_as_that_of_maps_is() -> None:
    x, lost = sounds(300)[0], []
    for flat in (True, False):
        net, inputs = Ended(flat).eval(), x if flat else x.unsqueeze(2)
        original = copy.deepcopy(net)
        cal = sharefold.calibrate(net, inputs, outputs="regression")
        done = sharefold.convert_(net, sharefold.plan(net, "60%", cal, method="average"), cal)
        assert "no output" not in done.steps["head"].reason
        with torch.no_grad():
            wanted, found = (m(inputs) for m in (original, net))
            lost.append(float((found - wanted).square().mean() / wanted.var()))
    assert lost[0] == pytest.approx(lost[1], rel=0.05)


def test_subclasses_with_the_stock_forward_are_shared() -> None:
    class Own(nn.Conv1d):
        pass

    class Causal(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (2, 0)))

    net = nn.Sequential(
        nn.Conv1d(2, 8, 3), nn.ReLU(), Own(8, 8, 3), nn.ReLU(), Causal(8, 8, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten()
    )
    graph = sharefold.analyze(net, torch.randn(1, 2, 40))
    assert set(graph.layers) == {"0", "2"} and "Causal has a forward of its own" in graph.skipped["4"]


def test_networks_that_turn_their_input_or_make_their_weights_are_calibrated() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*[m for i in range(4) for m in (nn.Conv1d(12 if i else 3, 12, 3, padding=1), nn.ReLU())])
            self.head = nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x.transpose(1, 2)).mean(2))

    net, x = Turned().eval(), torch.randn(220, 50, 3)
    sharefold.convert_(net, sharefold.plan(net, "60%", x, method="svd"), x)
    normed = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 8, 3)), nn.AdaptiveAvgPool1d(4), nn.Flatten(),
        nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4),
    ).eval()  # fmt: skip
    cal = sharefold.calibrate(normed, torch.randn(48, 2, 64))
    assert "parametrized" in cal.graph.skipped["0"] and sharefold.plan(normed, "60%", cal).groups
    views = random_views(x, torch.Generator().manual_seed(0), mix=0.0)
    assert views.shape == x.shape
    same = F.cosine_similarity(views.mean(1), x.mean(1))  # moments are moved, channels stay
    assert float(same.mean()) > 0.9


def test_signals_are_asked_for_where_there_are_none(trained: Listener) -> None:
    with pytest.raises(SharefoldError, match=r"takes signals \(n, C, L\), and none can be made up: pass some"):
        sharefold.plan(copy.deepcopy(trained), "50%")


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d])
def test_layers_that_run_on_one_input_at_a_time_are_left_out(conv: type[nn.Module]) -> None:
    class OneByOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two, self.three = (conv(2 if i == 0 else 8, 8, 3, padding=1) for i in range(4))
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            x = torch.stack([torch.relu(self.one(each)) for each in x])
            return self.head(torch.relu(self.three(torch.relu(self.two(x)))).flatten(2).mean(2))

    x = sounds(60)[0] if conv is nn.Conv1d else torch.randn(60, 2, 12, 12)
    net = OneByOne().eval()
    cal = sharefold.calibrate(net, x)
    assert cal.graph.skipped == {"one": "it runs on one image at a time, without an axis for a batch"}
    sharefold.convert_(net, sharefold.plan(net, "90%", cal, method="svd"), cal)
    assert net(x).shape == (60, 4)


def test_a_network_that_fails_on_a_batch_is_told_and_keeps_its_mode() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Conv1d(2, 8, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 4)).train()
    data = torch.randn(32, 2, 40), torch.randint(0, 4, (32,))
    with pytest.raises(SharefoldError, match="the model fails on a batch"):
        finetune(net, data, epochs=1, batch_size=8, workers=0, device="cpu", quiet=True)
    assert net.training
