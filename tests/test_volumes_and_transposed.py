"""Conv3d and transposed convolutions: convolutions of maps made from their inputs, from the graph to the file."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Block
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import sharefold
from sharefold.calibration.calibrate import Calibration
from sharefold.calibration.statistics import outputs_of, patches_of
from sharefold.data.views import random_views
from sharefold.errors import SharefoldError
from sharefold.export import export
from sharefold.finetune import finetune
from sharefold.layers import form_of, matrix_of, shared_layers
from sharefold.measure import count_macs
from sharefold.options import PlanOptions
from sharefold.planner import Planner

KINDS = {
    "volume": (nn.Conv3d(4, 6, (3, 2, 5), stride=(2, 1, 2), padding=(1, 0, 2), dilation=(1, 2, 1)), (7, 8, 9)),
    "same": (nn.Conv3d(4, 6, (2, 3, 4), padding="same", bias=False), (5, 6, 7)),
    "mirrored": (nn.Conv3d(4, 6, 3, padding=1, padding_mode="replicate"), (5, 6, 7)),
    "grouped volume": (nn.Conv3d(4, 8, 3, groups=2, padding="valid"), (5, 6, 7)),
    "depthwise volume": (nn.Conv3d(4, 4, 3, groups=4, padding=1), (5, 6, 7)),
    "pointwise volume": (nn.Conv3d(4, 6, 1), (3, 4, 5)),
    "signal": (nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), (9,)),
    "map": (nn.ConvTranspose2d(4, 6, (3, 5), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), dilation=(1, 2)), (5, 6)),
    "one step": (nn.ConvTranspose2d(4, 6, 3, padding=2, bias=False), (6, 6)),
    "more cut than reached": (nn.ConvTranspose2d(4, 6, 2, stride=2, padding=2), (6, 6)),
    "grouped": (nn.ConvTranspose2d(4, 8, 2, stride=2, groups=2), (4, 5)),
    "turned volume": (nn.ConvTranspose3d(4, 6, (2, 3, 2), stride=(2, 1, 2), padding=(0, 1, 0)), (3, 4, 5)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_form_stands_for_the_layer_and_makes_it_again(kind: str) -> None:
    layer: Any
    layer, size = KINDS[kind]
    form, x = form_of(layer), torch.randn(3, 4, *size)
    assert form is not None and form.stock_shape == tuple(layer.weight.shape) and form.stock is not None
    expected = layer(x)
    assert form.stock.output_size(size) == tuple(expected.shape[2:])
    weight = matrix_of(layer.weight.detach(), form).reshape(form.weight_shape)
    torch.testing.assert_close(form.native(weight), layer.weight.detach())
    torch.testing.assert_close(form.run(x, form.native(weight), layer.bias), expected)
    torch.testing.assert_close(form.as_stock(form.apply(form.as_maps(x), weight, layer.bias)), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(form.as_stock(form.outputs_as_maps(expected)), expected)
    again = form.dense(weight, layer.bias, None)
    assert type(again) is type(layer) and form_of(again) == form
    torch.testing.assert_close(again(x), expected)
    # Every position, then some: patches times the weight are the outputs there.
    for positions in (None, 5):
        drawn = [torch.Generator().manual_seed(1) for _ in range(2)]
        patches = patches_of(form, x, positions, drawn[0])  # (P, G, N)
        rows = torch.einsum("pgn,gon->pgo", patches, weight.reshape(form.groups, -1, form.features)).flatten(1)
        wanted = outputs_of(form, expected, positions, drawn[1])
        bias = 0 if layer.bias is None else layer.bias
        torch.testing.assert_close(rows + bias, wanted, rtol=1e-4, atol=1e-5)
        assert len(wanted) == expected[:, 0].numel() if positions is None else len(wanted) < expected[:, 0].numel()


class Watcher(nn.Module):
    """Tells how something moves."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 8, (3, 5, 5), stride=(1, 2, 2), padding=(1, 2, 2))
        self.layers = nn.Sequential(*[Block(8, norm=nn.BatchNorm3d, conv=nn.Conv3d) for _ in range(3)])
        self.pool, self.head = nn.AdaptiveAvgPool3d(1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.layers(torch.relu(self.stem(x)))).flatten(1))


def videos(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A bright spot (n, 1, 6, 12, 12) that goes left, right, up or down."""
    random = torch.Generator().manual_seed(seed)
    way = torch.randint(0, 4, (count,), generator=random)
    step = torch.tensor([[0, -1], [0, 1], [-1, 0], [1, 0]])[way]
    start = torch.randint(3, 9, (count, 2), generator=random) - 2 * step
    place = (start[:, None] + torch.arange(6)[None, :, None] * step[:, None]) % 12  # (n, 6, 2)
    grid = torch.stack(torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij"), -1)
    spot = torch.exp(-(grid - place[:, :, None, None]).square().sum(-1) / 2.0)[:, None]
    return 3 * spot - 0.5 + 0.3 * torch.randn(spot.shape, generator=random), way


class Painter(nn.Module):
    """A small U-Net: down by strided convolutions, up by transposed ones, which also end it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 24, 2, stride=2)
        self.inner = nn.Sequential(*[m for _ in range(3) for m in (nn.Conv2d(24, 24, 3, padding=1), nn.ReLU())])
        self.up = nn.ConvTranspose2d(24, 16, 2, stride=2)
        self.smooth = nn.ModuleList([nn.ConvTranspose2d(16, 16, 3, padding=1) for _ in range(3)])
        self.norm = nn.BatchNorm2d(16)
        self.end = nn.ConvTranspose2d(16, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.stem(x))
        y = torch.relu(self.up(self.inner(torch.relu(self.down(first)))) + first)
        for layer in self.smooth:
            y = torch.relu(layer(y))
        return self.end(self.norm(y))


def pictures(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy waves (n, 1, 16, 16), and clean."""
    random = torch.Generator().manual_seed(seed)
    angle, phase = 6.28 * torch.rand(2, count, 1, 1, generator=random)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    clean = torch.sin(0.7 * (x * angle.cos() + y * angle.sin()) + phase)[:, None]
    return clean + 0.5 * torch.randn(clean.shape, generator=random), clean


def fitted(net: nn.Module, data: tuple[Tensor, Tensor], loss: Any, epochs: int = 1) -> Any:
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for start in list(range(0, len(data[0]), 32)) * epochs:
        optimizer.zero_grad()
        loss(net(data[0][start : start + 32]), data[1][start : start + 32]).backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def watcher() -> Watcher:
    torch.manual_seed(0)
    return fitted(Watcher(), videos(960), F.cross_entropy, 2)


@pytest.fixture(scope="module")
def painter() -> Painter:
    torch.manual_seed(0)
    return fitted(Painter(), pictures(640), F.mse_loss, 3)


@functools.cache
def calibrated(net: nn.Module, count: int) -> Calibration:
    """On so many videos or pictures, whichever the network takes."""
    return sharefold.calibrate(net, (videos if isinstance(net, Watcher) else pictures)(count, 1)[0])


@functools.cache
def planner(net: nn.Module, count: int, method: str, exclude: str | None) -> Planner:
    """One a method: its candidates do not depend on the budget."""
    return Planner(calibrated(net, count), PlanOptions(method=method, exclude=exclude))


def converted(
    net: Any, budget: str, method: str = "auto", *, count: int = 150, exclude: str | None = None, **options: Any
) -> tuple[Any, Any]:
    plan, cal, net = planner(net, count, method, exclude).plan(budget), calibrated(net, count), copy.deepcopy(net)
    return net, sharefold.convert_(net, plan, cal, **options)


@torch.no_grad()
def right(net: nn.Module) -> float:
    x, y = videos(300, 2)
    return float((net.eval()(x).argmax(1) == y).float().mean())


@torch.no_grad()
def psnr(net: nn.Module) -> float:
    x, y = pictures(200, 2)
    return float(10 * torch.log10(4 / F.mse_loss(net.eval()(x), y)))


def test_the_graph_reads_volumes(watcher: Watcher) -> None:
    graph = sharefold.analyze(watcher, torch.randn(1, 1, 6, 12, 12))
    record = graph.layers["layers.1.conv1"]
    assert record.kind == "conv3d" and record.weight_shape == (8, 24, 3, 3) and record.in_channels == 8
    assert record.input_size == (36, 6) and record.windows == 6 * 36 and record.input_shape == (8, 6, 6, 6)
    assert record.norm == "layers.1.bn1" and record.private_output and not graph.skipped
    assert graph.layers["stem"].stride == (1, 2, 2)
    assert {r.role for r in graph.layers.values()} >= {"stem", "conv1", "conv2", "head"}


def test_the_graph_reads_transposed_layers(painter: Painter) -> None:
    graph = sharefold.analyze(painter, torch.randn(1, 1, 16, 16))
    record = graph.layers["up"]
    assert record.kind == "conv_transpose2d" and record.weight_shape == (16, 24, 2, 2) and record.stride == (2, 2)
    assert record.windows == 64 and record.output_size == (16, 16) and not graph.skipped
    assert not record.private_output and not graph.layers["smooth.0"].private_input
    macs = sum(math.prod(r.weight_shape) * r.windows for r in graph.layers.values())
    assert macs == count_macs(painter, torch.randn(1, 1, 16, 16))


@pytest.mark.parametrize("method", ["auto", "hybrid", "fold", "cluster-kernel"])
def test_volumes_at_half_the_size(watcher: Watcher, method: str, tmp_path: Path) -> None:
    assert right(watcher) > 0.9
    net, _ = converted(watcher, "60%", method)
    assert sum(p.numel() for p in net.parameters()) <= 0.61 * sum(p.numel() for p in watcher.parameters())
    if method in ("auto", "hybrid"):
        assert right(net) > right(watcher) - 0.04
    the_same_from_a_file(net, Watcher(), videos(20, 3)[0], tmp_path)


@pytest.mark.parametrize("method", ["auto", "basis", "spatial"])
def test_transposed_layers_at_half_the_size(painter: Painter, method: str, tmp_path: Path) -> None:
    assert psnr(painter) > 16
    # All but the transposed layers of one width stays as it is.
    net, _ = converted(painter, "85%", method, exclude=r"stem|down|inner|up|end")
    assert sum(p.numel() for p in net.parameters()) <= 0.85 * sum(p.numel() for p in painter.parameters())
    found = shared_layers(net).values()
    assert found and all(layer.form.transposed and not layer.can_run_factored() for layer in found)
    assert psnr(net) > psnr(painter) - 1
    the_same_from_a_file(net, Painter(), pictures(20, 3)[0], tmp_path)


@torch.no_grad()
def the_same_from_a_file(net: Any, blank: nn.Module, x: Tensor, folder: Path) -> None:
    found = net.eval()(x)
    sharefold.save(net, folder / "net")
    loaded = sharefold.load(folder / "net", model=blank).eval()
    torch.testing.assert_close(loaded(x), found)
    stock = sharefold.expand(loaded)
    torch.testing.assert_close(stock(x), found, rtol=1e-4, atol=1e-4)
    assert not shared_layers(stock)


@pytest.mark.parametrize("budget", ["70%, 80% MACs", "6kB"])
def test_budgets_of_volumes_hold(watcher: Watcher, budget: str, tmp_path: Path) -> None:
    net, _ = converted(watcher, budget)
    sharefold.save(net, tmp_path / "net.safetensors")
    x = videos(1)[0]
    if "MACs" in budget:
        assert count_macs(net, x) <= 0.8 * count_macs(watcher, x)
    else:
        assert (tmp_path / "net.safetensors").stat().st_size <= 6_000
    assert right(net) > right(watcher) - 0.15


def test_small_files_of_transposed_layers(painter: Painter, tmp_path: Path) -> None:
    net, _ = converted(painter, "16kB")
    the_same_from_a_file(net, Painter(), pictures(20, 3)[0], tmp_path)
    sharefold.save(net, tmp_path / "net.safetensors")
    assert (tmp_path / "net.safetensors").stat().st_size <= 16_000 and psnr(net) > psnr(painter) - 1


def test_the_last_transposed_layer_is_solved(painter: Painter) -> None:
    _, done = converted(painter, "50%", "average")
    assert done.steps["head"].details["steps"][0] > 0


def test_refinement_and_fine_tuning_take_volumes(watcher: Watcher) -> None:
    net, _ = converted(watcher, "30%", refine=2)
    refined, (x, y) = right(net), videos(320)
    report = finetune(
        net, TensorDataset(x, y), TensorDataset(*videos(200, 2)), batch_size=64, teacher=watcher, epochs=1, quiet=True, workers=0,
        device="cpu",
    )  # fmt: skip
    assert report.top1_after >= refined - 0.05 and report.top1_after > 0.8


def test_refinement_lowers_the_error_of_transposed_layers(painter: Painter) -> None:
    straight, _ = converted(painter, "25%", "svd", count=400)
    refined, done = converted(painter, "25%", "svd", count=400, refine=8)
    assert done.steps["refine"].kept and psnr(refined) > psnr(straight)


def test_all_slices_of_a_volume_get_one_view() -> None:
    images = torch.randn(4, 3, 12, 12)
    volumes = images[:, :, None].expand(-1, -1, 5, -1, -1)
    views = [random_views(x, torch.Generator().manual_seed(0), mix=0.0) for x in (images, volumes)]
    for frame in range(5):
        torch.testing.assert_close(views[1][:, :, frame], views[0], rtol=1e-4, atol=1e-5)


def test_onnx_computes_the_same(watcher: Watcher, painter: Painter, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    for name, net, x in (("video", watcher, videos(4, 3)[0]), ("image", painter, pictures(4, 3)[0])):
        small, _ = converted(net, "60%", "hybrid")
        path = tmp_path / f"{name}.onnx"
        export(small, path, example_input=x[:2])
        session = runtime.InferenceSession(str(path))
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), small(x), rtol=1e-4, atol=1e-4)


class Composed(nn.Module):
    """A convolution of many channels without a bias, whose weight is put together in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(48, 6)), nn.Parameter(torch.randn(6, 2 * 27))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv3d(x, (self.left @ self.right).view(48, 2, 3, 3, 3))


def test_onnx_takes_wide_volumes_without_a_bias(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    net, x = Composed(), torch.randn(5, 2, 4, 5, 6)
    export(net, tmp_path / "net.onnx", example_input=x[:2], tolerance=1e-3)
    (found,) = runtime.InferenceSession(str(tmp_path / "net.onnx")).run(None, {"images": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), net(x), rtol=1e-4, atol=1e-3)


def test_wrong_inputs_are_told(watcher: Watcher) -> None:
    with pytest.raises(SharefoldError, match=r"no float tensor of volumes \(n, C, D, H, W\) or images"):
        sharefold.calibrate(copy.deepcopy(watcher), torch.randn(8, 12, 12))
    with pytest.raises(SharefoldError, match=r"takes volumes \(n, C, D, H, W\), and none can be made up: pass some"):
        sharefold.plan(copy.deepcopy(watcher), "50%")
    with pytest.raises(SharefoldError, match="takes volumes .* of a size that it does not say: pass example_input"):
        export(watcher, "never.onnx")


class Told(nn.Module):
    def __init__(self, kernel: int = 4) -> None:
        super().__init__()
        self.down, self.mix = nn.Conv2d(3, 24, 3, stride=2, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.up, self.end = nn.ConvTranspose2d(24, 24, kernel, stride=2, padding=1), nn.Conv2d(24, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.mix(torch.relu(self.down(x))))
        return self.end(torch.relu(self.up(y, output_size=x.shape[2:])))


def test_a_layer_that_is_told_the_size_which_it_has_anyway_is_shared_and_takes_others() -> None:
    torch.manual_seed(0)
    net, x = Told().eval(), torch.randn(60, 3, 16, 16)
    cal = sharefold.calibrate(net, x)
    plan = sharefold.plan(net, "70%", cal, method="svd", exclude="down|mix|end")
    done = sharefold.convert_(net, plan, cal)
    assert set(shared_layers(net)) == {"up"}
    stock = sharefold.expand(copy.deepcopy(net))
    for size in (16, 20):
        x = torch.randn(2, 3, size, size)
        torch.testing.assert_close(net(x), stock(x), rtol=1e-4, atol=1e-4)
    x = torch.randn(2, 24, 5, 5)
    for size in ([11, 11], [10, 11], [2, 24, 11, 10]):
        torch.testing.assert_close(net.up(x, output_size=size), stock.up(x, output_size=size), rtol=1e-4, atol=1e-4)
    assert done.original(torch.randn(2, 3, 20, 20)).shape == (2, 3, 20, 20)
    with pytest.raises(ValueError, match=r"requested an output size of \[40, 40\], but valid sizes range from \[10, 10\]"):
        net.up(torch.randn(1, 24, 5, 5), output_size=[40, 40])
    # By itself it would give 15 x 15, and its statistics would not be those of its outputs.
    other = sharefold.analyze(Told(3), torch.randn(1, 3, 16, 16))
    assert "output_size is told where it is called" in other.skipped["up"] and "up" not in other.layers


def test_a_layer_that_is_called_by_name_is_left_out() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)
            self.c = nn.Conv2d(24, 24, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(input=torch.relu(self.a(x)))))

    net, x = Named().eval(), torch.randn(60, 3, 12, 12)
    cal = sharefold.calibrate(net, x)
    assert set(cal.graph.layers) == {"a", "c"} and "by name" in cal.graph.skipped["b"]
    sharefold.convert_(net, sharefold.plan(net, "80%", cal), cal)
    assert net(x).shape == (60, 24, 12, 12)


def test_generators_begin_with_a_transposed_layer() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.ConvTranspose2d(4, 16, 2, 2), nn.ReLU(), nn.ConvTranspose2d(16, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1)
    ).eval()
    latents = torch.randn(60, 4, 4, 4)
    sharefold.convert_(net, sharefold.plan(net, "60%", latents), latents)
    assert any(layer.form.transposed for layer in shared_layers(net).values()) and net(latents).shape == (60, 3, 16, 16)
    with pytest.raises(SharefoldError, match="images have 3 channels, the model takes 4"):
        sharefold.calibrate(net[:1], torch.randn(8, 3, 4, 4))


def test_as_many_positions_are_drawn_of_a_volume_as_of_an_image() -> None:
    form, x = form_of(nn.Conv3d(2, 3, 3, padding=1)), torch.randn(5, 2, 9, 8, 8)
    assert form is not None
    for positions in (4, 9, 20):
        drawn = [torch.Generator().manual_seed(1) for _ in range(3)]
        patches = patches_of(form, x, positions, drawn[0])
        assert patches.shape == (5 * positions, 1, 54)
        outputs = outputs_of(form, torch.arange(5.0).view(5, 1, 1, 1, 1).expand(5, 3, 9, 8, 8), positions, drawn[1])
        torch.testing.assert_close(outputs[:, 0], torch.arange(5.0).repeat_interleave(positions))


def test_an_exception_leaves_a_network_in_its_mode(watcher: Watcher, monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = copy.deepcopy(watcher), TensorDataset(*videos(64))
    few: dict[str, Any] = {"epochs": 1, "quiet": True, "workers": 0, "device": "cpu", "batch_size": 16}
    with pytest.raises(SharefoldError, match=r"random_erase is for images \(N, C, H, W\)"):
        finetune(net, data, random_erase=0.5, **few)
    assert not any(module.training for module in net.modules())
    monkeypatch.setattr("sharefold.finetune.schedule.Schedule.step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune(net, data, **few)
    assert not any(module.training for module in net.modules())
    with pytest.raises(SharefoldError, match="or a Dataset for other inputs"):
        finetune(net, videos(32), **few)
