"""Every kind of layer and the families of the registries through the whole job, as benchmarks/coverage.py runs it."""

from __future__ import annotations

import copy
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import Inverted, Net, Next, images
from script_loader import load_script
from timm.layers import BatchNormAct2d, CondConv2d, Conv2dSame, Linear, MixedConv2d, ScaledStdConv2dSame, StdConv2d
from torch import Tensor, nn

from sharefold.graph import analyze
from sharefold.layers import shared_layers
from sharefold.measure import count_parameters

# Not as "coverage", which is the name of a package that pytest plugins import.
load_script("benchmarks/coverage_blank.py")
check = load_script("benchmarks/coverage_check.py")
load_script("benchmarks/architectures.py")
coverage = load_script("benchmarks/coverage.py", "coverage_benchmark")


class Residual(nn.Module):
    """x + act(norm(layer(x)))."""

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.layer(x)))


class Conditional(nn.Module):
    """CondConv: each image mixes four experts' kernels, and a plain convolution beside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.routing = nn.Linear(width, 4)
        self.experts = CondConv2d(width, width, 1, num_experts=4)
        self.plain, self.wide = nn.Conv2d(width, 2 * width, 3, padding=1), nn.Conv2d(2 * width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.experts(x, torch.sigmoid(self.routing(x.mean((2, 3)))))
        return x + self.wide(torch.relu(self.plain(x)))


class Mixer(nn.Module):
    """A Linear over the positions of a row, then two over channels."""

    def __init__(self, width: int, row: int) -> None:
        super().__init__()
        self.tokens = nn.Linear(row, row)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(x)
        y = self.fc2(nn.functional.gelu(self.fc1(x.permute(0, 2, 3, 1))))
        return x + y.permute(0, 3, 1, 2)


class Untraceable(nn.Module):
    """Forward code that reads values, which no symbolic trace can follow."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(1 + int(float(x.detach().square().sum()) >= 0)):
            y = torch.relu(self.norm(self.conv(x)))
        return x + y


class Doubled(nn.Conv2d):
    """A subclass that computes something else than its base: no shared layer could stand in for it."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def with_timm_linear(width: int) -> nn.Module:
    block = Next(width)
    block.fc1 = Linear(width, 2 * width)
    return block


def beside(layer: nn.Module, width: int) -> nn.Module:
    """``layer``, which is kept, and a convolution that is not."""
    plain = nn.Conv2d(width, width, 5, padding=2)
    return nn.Sequential(Residual(layer, nn.BatchNorm2d(width)), Residual(plain, nn.BatchNorm2d(width)))


def residual(layer: Callable[[int], nn.Module], norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> Callable:
    return lambda width: Residual(layer(width), norm(width))


# block, how it is traced, the class whose layers are all converted, part of the reason why others are not
CASES: dict[str, tuple[Callable[[int], nn.Module], str, type[nn.Module], str]] = {
    "StdConv2d": (residual(lambda w: StdConv2d(w, w, 3, padding=1)), "fx", StdConv2d, ""),
    "ScaledStdConv2dSame": (residual(lambda w: ScaledStdConv2dSame(w, w, 3)), "fx", ScaledStdConv2dSame, ""),
    "Conv2dSame": (residual(lambda w: Conv2dSame(w, w, 3)), "fx", Conv2dSame, ""),
    "BatchNormAct2d": (residual(lambda w: nn.Conv2d(w, w, 3, padding=1), BatchNormAct2d), "fx", nn.Conv2d, ""),
    "CondConv2d": (Conditional, "fx", nn.Conv2d, "CondConv2d"),
    "MixedConv2d": (residual(lambda w: MixedConv2d(w, w, [3, 5])), "fx", nn.Conv2d, ""),
    "ConvNeXt": (Next, "fx", nn.Linear, ""),
    "mixer": (lambda w: Mixer(w, 12 if w == 8 else 6), "fx", nn.Linear, "mixes positions"),
    "grouped": (residual(lambda w: nn.Conv2d(w, w, 3, padding=1, groups=4)), "fx", nn.Conv2d, ""),
    "depthwise": (Inverted, "fx", nn.Conv2d, ""),
    "transposed": (residual(lambda w: nn.ConvTranspose2d(w, w, 3, padding=1)), "fx", nn.ConvTranspose2d, ""),
    "timm's Linear": (with_timm_linear, "fx", Linear, ""),
    "own forward": (lambda w: beside(Doubled(w, w, 3, padding=1), w), "fx", nn.Conv2d, "Doubled has a forward of its own"),
    "untraceable": (Untraceable, "hooks", nn.Conv2d, ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_kinds_of_layers(kind: str, tmp_path: Path) -> None:
    block, traced, converted, reason = CASES[kind]
    model = Net(block)
    check.vary(model)
    dense = copy.deepcopy(model).eval()
    graph = analyze(model, images(1))
    assert graph.traced == traced
    wanted = {name for name, m in model.named_modules() if "stage" in name and isinstance(m, converted)}
    wanted -= set(graph.skipped)
    assert wanted and wanted <= set(graph.layers)
    assert not reason or any(reason in text for text in graph.skipped.values())
    share, note = check.convert_for_real(model, images(6), tmp_path, graph=graph, fresh=lambda: copy.deepcopy(dense))
    assert note == "" and 0.2 < share <= 0.5
    assert share == pytest.approx(count_parameters(model) / count_parameters(dense), abs=1e-4)
    assert wanted & set(shared_layers(model))
    # The same plan by counts alone, as for networks that are too large for this.
    again = copy.deepcopy(dense).to("meta") if traced == "fx" else copy.deepcopy(dense)
    blank, note = check.convert_blank(again, images(1).to(next(again.parameters()).device), graph)
    assert note == "" and 0.2 < blank <= 0.5


def test_a_registered_network_loads_by_itself() -> None:
    row = check.check(coverage.Row("resnet20_cifar", "timm", "cifar_resnet"))
    assert (row.reason, row.mode, row.traced, row.parameters) == ("", "real", "fx", 269_722)
    assert row.shareable > 0.98 and row.reduced_to <= 0.5 and row.groups >= 3 and row.layers > 18


@pytest.mark.parametrize(
    ("library", "name", "parameters"), [("timm", "resnet18", 11_689_512), ("torchvision", "fcn_resnet50", 32_957_013)]
)
def test_large_networks_are_counted_on_meta(library: str, name: str, parameters: int) -> None:
    row = check.check(coverage.Row(name, library, ""))
    assert (row.reason, row.mode, row.parameters) == ("", "meta", parameters)
    assert 0.49 < row.reduced_to <= 0.5


def test_reasons() -> None:
    row = check.check(coverage.Row("vit_tiny_patch16_224", "timm", ""))
    assert row.reason.startswith("not conv-dominated: ") and row.reduced_to is None and row.shareable > 0.9
    row = check.check(coverage.Row("no_such_model", "timm", ""))
    assert row.reason.startswith("cannot be built: unknown model") and row.parameters is None
    assert check.check(coverage.Row("resnet18", "timm", ""), limit=10**9, method="nonsense").reason.startswith("failed: ")


def test_families_come_first() -> None:
    rows = coverage.entries()
    families = {(row.library, row.family) for row in rows}
    first = coverage.sampled(rows, 1)
    assert rows[: len(first)] == first and {(row.library, row.family) for row in first} == families
    assert len({(row.library, row.model) for row in rows}) == len(rows) > 1000
    names = {row.model for row in coverage.entries("torchvision")}
    assert {"resnet18", "fcn_resnet50", "ssd300_vgg16", "quantized_resnet18", "r3d_18"} <= names and "raft_small" not in names
    assert {"unet", "unet:encoder_name=tu-mobilenetv3_small_100"} <= {row.model for row in coverage.entries("smp")}


@pytest.mark.parametrize(
    ("library", "name", "limit", "mode", "outputs"),
    [
        ("torchvision", "ssdlite320_mobilenet_v3_large", 0, "cpu", "backbone head"),
        ("torchvision", "quantized_shufflenet_v2_x0_5", 8_000_000, "real", "logits"),
        ("smp", "linknet:encoder_name=tu-mobilenetv3_small_100", 8_000_000, "real", "binary"),
    ],
)
def test_every_library_goes_through_the_whole_job(library: str, name: str, limit: int, mode: str, outputs: str) -> None:
    """A detector at the outputs of its parts, a twin for quantisation in floats, a decoder with an encoder of timm's."""
    row = check.check(coverage.Row(name, library, ""), limit=limit)
    assert (row.reason, row.mode, row.outputs) == ("", mode, outputs)
    assert row.reduced_to <= 0.5


def test_one_model_cannot_end_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stand_in(row: object, **options: object) -> object:
        name = row.model  # type: ignore[attr-defined]
        if name == "slow":
            time.sleep(60)
        if name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        row.reduced_to = 0.5  # type: ignore[attr-defined]
        return row

    monkeypatch.setattr(coverage, "check", stand_in)
    names = ["dies", "fine", "slow"]
    monkeypatch.setattr(coverage, "entries", lambda *_: [coverage.Row(name, "timm", name) for name in names])
    path = tmp_path / "new" / "coverage.csv"
    arguments = ["-o", str(path), "--seconds", "2"]
    assert coverage.main(arguments) == 1
    found = {name: row["reason"] for (_, name), row in coverage.read(path).items()}
    assert found == {"dies": "failed: killed by SIGKILL", "fine": "", "slow": "timeout: not done after 2 s"}
    assert [file.name for file in path.parent.iterdir()] == ["coverage.csv"]
    names.remove("slow")
    before = path.read_text()
    assert coverage.main(arguments) == 1 and path.read_text() == before  # rows that are there stay
    monkeypatch.setattr(coverage, "check", lambda row, **options: row)
    assert coverage.main([*arguments, "--again", "failed"]) == 0


def test_the_committed_table() -> None:
    rows = list(coverage.read(coverage.RESULTS).values())
    assert rows
    assert [row["model"] for row in rows if coverage.verdict(row) == "failed"] == []
    for row in rows:
        if row["reduced_to"]:
            assert float(row["reduced_to"]) <= 0.5 or "is the floor" in row["reason"], row


@pytest.mark.sweep
@pytest.mark.parametrize("row", coverage.sampled(coverage.entries(), 1), ids=lambda row: f"{row.library}-{row.model}")
def test_family(row: object) -> None:
    found = check.check(copy.copy(row))
    assert not found.reason.startswith("failed"), found.reason
