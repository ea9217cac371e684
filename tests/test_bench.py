"""What bench counts is checked against figures worked out by hand; what it times, for its bookkeeping."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import sharefold
from sharefold.bench import (
    FORMS,
    Timing,
    explain,
    forms_of_auto,
    latencies,
    peak_tensor_bytes,
    race,
    race_forms,
    race_layers,
    race_loading,
    runtime_form,
)
from sharefold.errors import SharefoldError
from sharefold.layers import shared_layers
from sharefold.measure import model_bytes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shared() -> nn.Module:
    torch.manual_seed(0)
    model = sharefold.open_source("timm:digits_resnet:blocks=2", pretrained=False).model
    images = torch.randn(40, 1, 8, 8)
    plan = sharefold.plan(model, budget="40%", method="basis", calibration=images)
    sharefold.convert_(model, plan, calibration=images, repair=False)
    return model


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_race_measures_ratios_and_calls_everyone_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def runner(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            spin(seconds)

        return run

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    result = race({"one": runner("one", 0.002), "two": runner("two", 0.004)}, repeats=6, device=CPU, warmup=2)
    assert order.count("one") == order.count("two") == 8
    assert {order[0], order[2]} == {"one", "two"}, "every round starts with another one"
    assert result["one"].ratio == 1 and 1.7 < result["two"].ratio < 2.3
    assert result["two"].low <= result["two"].median <= result["two"].high and result["two"].low >= 0.004
    single = race({"one": runner("one", 0.001)}, repeats=1, device=CPU, warmup=0)["one"]
    assert single.low == single.median == single.high


def test_with_several_threads_the_lower_quartiles_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    result = race({"one": lambda: spin(0.002), "two": lambda: spin(0.004)}, repeats=5, device=CPU)
    assert result["two"].ratio == result["two"].low / result["one"].low


def test_peak_memory_is_the_sum_of_what_is_alive() -> None:
    first, second = nn.Conv2d(1, 8, 1, bias=False), nn.Conv2d(8, 2, 1, bias=False)
    net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(inplace=True))
    # 10 x 10 image, 8 + 16 weights, and at most two maps of 8 channels at once (before and after the first ReLU).
    assert peak_tensor_bytes(net, torch.zeros(1, 1, 10, 10)) == 4 * (100 + 8 + 16 + 2 * 800)


def test_composed_weights_count_as_memory(shared: nn.Module) -> None:
    images = torch.randn(1, 1, 8, 8)
    with runtime_form(shared, "composed"):
        shared(images)
        composed = peak_tensor_bytes(shared, images)
    members = [layer for layer in shared_layers(shared).values() if layer.can_run_factored()]
    weights = sum(4 * layer.weight.numel() for layer in members)
    with runtime_form(shared, "factored"):
        factored = peak_tensor_bytes(shared, images)
    assert model_bytes(shared) < factored < composed
    assert composed >= model_bytes(shared) + weights
    assert composed - factored > 0.5 * weights


def test_forms_are_restored_and_every_form_is_timed(shared: nn.Module) -> None:
    layers = shared_layers(shared)
    names = list(layers)
    layers[names[0]].runtime = "factored"
    times = race_forms(shared, sharefold.expand(shared), torch.randn(2, 1, 8, 8), repeats=3)
    assert set(times) == {"dense", *FORMS} and times["dense"].ratio == 1
    assert layers[names[0]].runtime == "factored" and layers[names[1]].runtime == "auto"
    layers[names[0]].runtime = "auto"
    assert set(race_forms(nn.Conv2d(1, 1, 1), None, torch.randn(1, 1, 8, 8), repeats=2)) == {"model"}


def test_layers_are_timed_on_their_own_inputs(shared: nn.Module) -> None:
    rows = race_layers(shared, torch.randn(2, 1, 8, 8), repeats=3)
    layers = shared_layers(shared)
    assert [row["name"] for row in rows] == list(layers)
    for row in rows:
        assert row["share"] == layers[row["name"]].factored_share()
        assert row["faster"] == ("factored" if row["ratio"] < 1 else "composed")
        assert row["auto"] == ("factored" if layers[row["name"]].runs_factored() else "composed")
    assert forms_of_auto(shared) == {row["auto"] for row in rows}


def test_loading_reads_what_it_wrote(shared: nn.Module) -> None:
    dense = sharefold.expand(shared)
    sizes, times = race_loading(shared, dense, repeats=1)
    assert model_bytes(dense) <= sizes["dense"] <= model_bytes(dense) + 20_000
    assert model_bytes(shared) <= sizes["shared"] <= model_bytes(shared) + 20_000
    assert times["dense"].median > 0 and times["shared"].median > 0
    own = copy.deepcopy(shared)
    own.sharefold_config = replace(own.sharefold_config, base=None)
    with pytest.raises(SharefoldError, match="known architecture"):
        race_loading(own, dense)


def test_the_explanation_follows_the_figures() -> None:
    def forms(composed: float, factored: float, auto: float) -> dict[str, Timing]:
        ratios = {"composed": composed, "factored": factored, "auto": auto}
        return {name: Timing(ratio, ratio, ratio, ratio) for name, ratio in ratios.items()}

    rows = [
        {"name": "a", "auto": "composed", "faster": "factored"},
        {"name": "b", "auto": "factored", "faster": "factored"},
    ]
    text = " ".join(explain(rows, forms(1.0, 0.5, 0.8)))
    assert "factored is the faster form of the whole network here, by 2.00 times" in text
    assert "1 of 2 layers" in text and "wrong on 1" in text and "runtime = 'factored'" in text and "1.60 times" in text
    assert "runtime =" in " ".join(explain([], forms(0.5, 1.0, 1.0), {"factored"}))
    assert "runtime =" in " ".join(explain([], forms(1.0, 0.5, 0.8), {"composed", "factored"}))
    assert "runtime =" not in " ".join(explain([], forms(1.0, 0.5, 0.8), {"factored"})), "auto is that already"
    fine = " ".join(explain(rows[1:], forms(1.0, 2.0, 1.0)))
    assert "composed is the faster" in fine and "the same ones" in fine and "runtime =" not in fine
    assert "layers" not in " ".join(explain([], forms(1.0, 2.0, 1.0)))  # timed as a whole alone
    assert "composed" in explain([], {"composed": Timing(1, 1, 1, 1)})[0]
    assert "one way" in explain([], {"model": Timing(1, 1, 1, 1)})[0]


class Slow(nn.Module):
    """Takes as long as it says, writes into its input and counts its runs."""

    def __init__(self, milliseconds: float) -> None:
        super().__init__()
        self.milliseconds, self.register = milliseconds, []
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("runs", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        assert bool((x == 1).all())
        x.mul_(2)
        self.runs += 1
        time.sleep(self.milliseconds / 1e3)
        return x


def test_latencies_are_those_of_each_network_which_stays_as_it_was() -> None:
    quick, slow = Slow(1), Slow(60)
    dense, model = latencies(slow, quick, torch.ones(1, 3, 4, 4), seconds=0.05)
    assert dense.median >= 0.06 and 0.001 <= model.median < dense.median
    assert float(quick.runs) == float(slow.runs) == 0
