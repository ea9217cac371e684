"""Networks of several inputs, from calibration to the file: two images through one trunk, an image with a vector."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Block
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, Dataset

import sharefold
from sharefold.bench import latencies, peak_tensor_bytes, race_forms, race_layers
from sharefold.calibration.images import COUNT
from sharefold.calibration.several_inputs import first_of
from sharefold.errors import SharefoldError
from sharefold.export import export
from sharefold.finetune import finetune
from sharefold.inputs import Inputs, call, elements, image_shape, joined, taken
from sharefold.measure import agreement, count_macs, evaluate, latency
from sharefold.outputs.streamed import compared
from sharefold.planner import Planner
from sharefold.planner.costs import cost_of
from sharefold.repair.call_order import calls_together, side_by_side
from sharefold.repair.lockstep import Visited, Wanted, walk
from sharefold.repair.refine import refine
from sharefold.repair.refine_loss import block_outputs
from sharefold.round import round_
from sharefold.running import run_on
from sharefold.sweep import sweep
from sharefold.verify import verify

# Of the images. With so much noise networks are not sure, and there is something to lose.
SIDE, NOISE = 8, 0.6


class Pair(nn.Module):
    """Whether two images show stripes of one direction: one trunk for both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1)
        self.trunk = nn.Sequential(*[Block(12) for _ in range(2)])
        self.mix = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(24, 2)

    def features(self, x: Tensor) -> Tensor:
        return self.trunk(torch.relu(self.stem(x)))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(self.mix(torch.cat([self.features(left), self.features(right)], 1)).mean((2, 3)))


class Told(nn.Module):
    """An image, four numbers beside it and a mask; gives an image and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1)
        self.body = nn.Sequential(*[Block(12) for _ in range(2)])
        self.facts = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
        self.end, self.score = nn.Conv2d(12, 1, 3, padding=1), nn.Linear(12, 1)

    def forward(self, image: Tensor, facts: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.body(torch.relu(self.stem(image)) + self.facts(facts)[:, :, None, None])
        return {"image": torch.where(mask, self.end(x), image), "score": self.score(x.mean((2, 3)))}


def stripes(direction: Tensor, random: torch.Generator) -> Tensor:
    count, phase = len(direction), 6.28 * torch.rand(len(direction), 1, 1, generator=random)
    wave = torch.sin(torch.arange(float(SIDE)) + phase).expand(count, SIDE, SIDE)
    noise = torch.randn(count, SIDE, SIDE, generator=random)
    return (torch.where(direction[:, None, None] > 0, wave, wave.transpose(1, 2)) + NOISE * noise)[:, None]


def pairs(count: int, seed: int = 0) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Two images each, and whether their stripes have one direction."""
    random = torch.Generator().manual_seed(seed)
    first, second = (torch.randint(0, 2, (count,), generator=random) for _ in range(2))
    return (stripes(first, random), stripes(second, random)), (first == second).long()


def told(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    image = stripes(torch.randint(0, 2, (count,), generator=random), random)
    return image, torch.randn(count, 4, generator=random), torch.rand(count, 1, SIDE, SIDE, generator=random) < 0.5


@pytest.fixture(scope="module")
def pair() -> Pair:
    torch.manual_seed(0)
    net, ((left, right), same) = Pair(), pairs(2400)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for start in range(0, len(same), 32):
        at = slice(start, start + 32)
        optimizer.zero_grad()
        F.cross_entropy(net(left[at], right[at]), same[at]).backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def teller() -> Told:
    torch.manual_seed(0)
    net, given = Told(), told(1280)
    image, facts, mask = given
    wanted = F.avg_pool2d(image, 3, 1, 1) + facts[:, :1, None, None]
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for start in range(0, len(image), 32):
        at = slice(start, start + 32)
        optimizer.zero_grad()
        found = net(image[at], facts[at], mask[at])
        goal = torch.where(mask[at], wanted[at], image[at])
        (F.mse_loss(found["image"], goal) + F.mse_loss(found["score"][:, 0], facts[at].sum(1))).backward()
        optimizer.step()
    return net.eval()


@torch.no_grad()
def right(net: nn.Module) -> float:
    given, same = pairs(400, 2)
    return float((net.eval()(*given).argmax(1) == same).float().mean())


@pytest.fixture(scope="module")
def planner(pair: Pair) -> Planner:
    """For any budget: the candidates do not depend on it."""
    return Planner(sharefold.calibrate(pair, pairs(300, 1)[0]))


@pytest.fixture(scope="module")
def converted(pair: Pair, planner: Planner) -> tuple[nn.Module, Any, Any]:
    net, cal = copy.deepcopy(pair), planner.cal
    return net, sharefold.convert_(net, planner.plan("40%"), cal), cal


class PairData(Dataset):
    def __init__(self, count: int, seed: int) -> None:
        (self.left, self.right), self.same = pairs(count, seed)

    def __len__(self) -> int:
        return len(self.same)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor], int]:
        return (self.left[index], self.right[index]), int(self.same[index])


def test_several_tensors_behave_as_one_batch() -> None:
    given = Inputs(told(10))
    image, facts, mask = given.tensors
    assert len(given) == 10 and elements(given) == 64 + 4 + 64 and image_shape(given) == (1, 8, 8)
    assert repr(given) == "Inputs((10, 1, 8, 8), (10, 4), (10, 1, 8, 8))"
    index = torch.tensor([7, 0, 3])
    for part, pick in ((given[2:5], slice(2, 5)), (given[index], index)):
        assert all(torch.equal(a, b[pick]) for a, b in zip(part.tensors, (image, facts, mask), strict=True))
    parts = given.split(4)
    assert [len(part) for part in parts] == [4, 4, 2] and [len(part) for part in given.split([3, 7])] == [3, 7]
    again = joined(parts)
    assert isinstance(again, Inputs) and all(map(torch.equal, again.tensors, given.tensors))
    assert given.to("meta").device.type == "meta" and given.to("meta").tensors[2].dtype == torch.bool
    assert taken(given) is given and taken(image) is image and taken((image,)) is image
    assert call(lambda a, b, c: (c, b, a), given) == (mask, facts, image)


def test_an_input_with_a_default_is_told_from_a_target_by_the_inner_tuple() -> None:
    class Masked(nn.Module):
        def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
            return image if mask is None else image * mask

    image, mask, target = torch.randn(6, 1, 4, 4), torch.ones(6, 1, 4, 4), torch.arange(6)
    for batch in (((image, mask), target), ((image, mask),)):
        found = first_of(Masked(), [batch], 5)
        assert isinstance(found, Inputs) and [len(tensor) for tensor in found.tensors] == [5, 5]
    assert torch.equal(first_of(Masked(), [(image, target)], 5), image[:5])


def test_a_network_gets_copies_in_its_own_type(teller: Told) -> None:
    seen: list[tuple[Tensor, ...]] = []

    class Spoils(Told):
        def forward(self, image: Tensor, facts: Tensor, mask: Tensor) -> dict[str, Tensor]:
            seen.append((image, facts, mask))
            return super().forward(image.mul_(0), facts, mask)

    net, given = Spoils().double(), Inputs(told(3))
    before = given.tensors[0].clone()
    run_on(net, given)
    assert torch.equal(given.tensors[0], before)
    assert [tensor.dtype for tensor in seen[0]] == [torch.float64, torch.float64, torch.bool]


def test_the_budget_holds_and_figures_see_both_inputs(
    pair: Pair, converted: tuple[nn.Module, Any, Any], tmp_path: Path
) -> None:
    net, done, cal = converted
    assert right(pair) > 0.9 and right(net) > right(pair) - 0.03
    assert sum(p.numel() for p in net.parameters()) <= 0.4 * sum(p.numel() for p in pair.parameters())
    assert done.agreement > 0.9 and done.report_images == 50 and done.new_agreement is None and not done.seen_before
    assert [figure.metric for figure in done.outputs] == ["agreement"]
    trunk = cal.graph.layers["trunk.1.conv1"]
    assert cal.graph.traced == "fx" and trunk.calls == 2 and trunk.norm == "trunk.1.bn1"
    given = pairs(40, 3)[0]
    sharefold.save(net, tmp_path / "net")
    loaded = sharefold.load(tmp_path / "net", model=Pair()).eval()
    with torch.no_grad():
        assert torch.equal(loaded(*given), net(*given))
        torch.testing.assert_close(sharefold.expand(loaded)(*given), net(*given), rtol=1e-4, atol=1e-4)
        swapped = net(given[1], given[0])
    assert not torch.allclose(swapped, net(*given))


def test_moments_are_those_of_all_inputs(pair: Pair) -> None:
    (left, right_), _ = pairs(64, 1)
    cal = sharefold.calibrate(pair, (left, right_ + 3))
    cal.statistics.moments(["stem"])
    of_all = float(torch.cat([left, right_ + 3]).mean())
    inner = float(cal.statistics.means["stem"].reshape(9)[4])  # the middle of the kernel never sees the padding
    assert inner == pytest.approx(of_all, abs=0.15) and abs(of_all - float(left.mean())) > 0.8
    # A layer of both branches matters as far as both do.
    assert set(cal.statistics.sensitivity()) == set(cal.graph.layers)


def test_a_walk_shows_a_shared_layer_all_its_inputs_at_once(pair: Pair) -> None:
    seen: dict[str, Visited] = {}
    (left, right_), _ = pairs(24, 1)
    graph = sharefold.analyze(pair, (left[:1], right_[:1]))
    assert graph.fx_graph is not None
    names = ("trunk.0.conv1", "trunk.0.conv2", "mix.0")
    wanted = {}
    for name in names:
        form = sharefold.layers.form_of(pair.get_submodule(name))
        assert form is not None
        wanted[name] = Wanted(form, graph.layers[name].norm, rectified=True)
    order: list[str] = []

    def visit(at: Visited) -> None:
        order.append(at.name)
        seen[at.name] = at

    student = copy.deepcopy(pair)
    with torch.no_grad():
        student.trunk[0].conv1.weight.mul_(1.1)
    walk(graph.fx_graph, pair, student, Inputs((left, right_)), wanted, visit)
    assert order == list(names)
    samples = seen["trunk.0.conv1"].samples
    with torch.no_grad():
        maps = [torch.relu(pair.stem(x)) for x in (left, right_)]
        means = [float(torch.cat([x[i : i + 1] for x in maps]).mean()) for i in range(24)]
    centre = samples.x.reshape(len(samples), 12, 3, 3)[:, :, 1, 1].mean(1)
    for image in range(24):
        assert float(centre[samples.image == image].mean()) == pytest.approx(means[image], abs=0.12)
    assert samples.image.unique().tolist() == list(range(24))
    # The shortcut behind the second convolution, for both calls.
    rectifier, samples = seen["trunk.0.conv2"].rectifier, seen["trunk.0.conv2"].samples
    assert rectifier is not None and rectifier.rectified and samples.given is not None and len(samples.given) == len(samples)


class Chained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.b(self.a(left)) + self.b(self.a(self.b(right)))


class InPlace(nn.Module):
    """The trunk's second call reads what the code between has written into."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        first = self.a(left)
        right.mul_(5)
        return first + self.a(right)


def steps(net: nn.Module) -> list[fx.Node]:
    return [node for node in fx.symbolic_trace(net).graph.nodes if node.op != "output"]


def called(nodes: list[fx.Node]) -> list[str]:
    return [str(node.target) for node in nodes if node.op == "call_module"]


@torch.no_grad()
def test_calls_stand_side_by_side_where_none_needs_the_other() -> None:
    torch.manual_seed(0)
    one = Inputs((torch.randn(1, 1, 6, 6), torch.randn(1, 1, 6, 6)))
    net: nn.Module = Chained()
    nodes = steps(net)
    order = side_by_side(nodes, lambda name: True)
    assert called(nodes) == ["a", "b", "b", "a", "b"] and called(order).count("a") == 2
    assert called(order) == ["b", "a", "a", "b", "b"]  # b needs itself by way of a
    assert all(order.index(used) < index for index, node in enumerate(order) for used in node.all_input_nodes)
    assert calls_together(net, nodes, one) == order
    assert side_by_side(nodes, lambda name: False) == nodes
    net = InPlace()
    nodes = steps(net)
    assert side_by_side(nodes, lambda name: True) != nodes
    assert calls_together(net, nodes, one) == nodes


def test_refinement_lowers_the_divergence(pair: Pair, planner: Planner) -> None:
    net, cal = copy.deepcopy(pair), planner.cal
    done = sharefold.convert_(net, planner.plan("8%"), cal, repair=False, refine=6)
    step = done.steps["refine"]
    assert step.kept and step.kl_after is not None and step.kl_before is not None and step.kl_after < 0.7 * step.kl_before
    assert refine(net, cal, epochs=1).images == len(cal.parts.decide)  # no views: they would tear the pair apart


@torch.no_grad()
def test_blocks_are_compared_on_every_input_that_passes_them(pair: Pair) -> None:
    for every in (True, False):
        with block_outputs(pair, ["trunk.0"], every) as seen:
            pair(*pairs(3, 5)[0])
            given = pairs(6, 6)[0]
            pair(*given)
        wanted = [pair.trunk[0](torch.relu(pair.stem(x))) for x in given]
        assert list(seen) == [("trunk.0", 0), ("trunk.0", 1)][: 2 if every else 1]
        for found, one in zip(seen.values(), wanted if every else wanted[1:], strict=True):
            torch.testing.assert_close(found, one)


def test_outputs_of_an_image_with_facts_are_all_read(teller: Told, tmp_path: Path) -> None:
    net, given = copy.deepcopy(teller), told(300, 1)
    cal = sharefold.calibrate(net, given)
    assert {leaf.name: leaf.kind for leaf in cal.reading.leaves} == {"image": "image", "score": "regression"}
    done = sharefold.convert_(net, sharefold.plan(net, "60%", cal), cal)
    figures = {figure.name: figure for figure in done.outputs}
    assert figures["image"].metric == "psnr" and figures["image"].value > 25
    assert figures["score"].metric == "error" and figures["score"].value < 0.2
    shared = {name for group in done.plan.groups for name in group.members}
    assert any(name.startswith("body") for name in shared)
    sharefold.save(net, tmp_path / "net.safetensors")
    new = told(20, 4)
    with torch.no_grad():
        found, again = net(*new), sharefold.load(tmp_path / "net.safetensors", model=Told()).eval()(*new)
    assert all(torch.equal(found[key], again[key]) for key in found)
    whole = compared(teller, net, [tuple(tensor[at : at + 8] for tensor in new) for at in (0, 8, 16)])
    assert whole.images == 20 and {figure.metric for figure in whole.figures} == {"psnr", "error"}


@pytest.mark.parametrize("budget", ["50% MACs", "60%, 80% MACs", "8kB"])
def test_budgets_of_every_unit_hold(pair: Pair, planner: Planner, budget: str, tmp_path: Path) -> None:
    net, given = copy.deepcopy(pair), pairs(120, 1)[0]
    sharefold.convert_(net, planner.plan(budget), planner.cal)
    sharefold.save(net, tmp_path / "net.safetensors")
    if "MACs" in budget:
        share = 0.5 if budget.startswith("50%") else 0.8
        assert count_macs(net, given) <= share * count_macs(pair, given)
    else:
        assert (tmp_path / "net.safetensors").stat().st_size <= 8_000
    assert right(net) > right(pair) - 0.05


def test_seconds_are_those_of_all_inputs(pair: Pair) -> None:
    cal = sharefold.calibrate(pair, pairs(40, 1)[0], example_input=tuple(x[:3] for x in pairs(3)[0]))
    cost = cost_of("seconds", pair, cal.graph, cal.example)
    assert len(cal.example) == 3 and cost.total > 0 and cost.dense("stem") > 0
    assert not sharefold.plan(pair, "1000ms", cal).groups  # it is faster than that


def test_rounding_takes_them(pair: Pair, converted: tuple[nn.Module, Any, Any]) -> None:
    net = copy.deepcopy(converted[0])
    done = round_(net, "int6", pairs(220, 1)[0])
    assert done.plan.store == "int6" and done.kl < 0.02 and right(net) > right(converted[0]) - 0.03


def test_what_measures_takes_tuples(pair: Pair, converted: tuple[nn.Module, Any, Any]) -> None:
    net, (given, same) = converted[0], pairs(60, 2)
    layers = [m for m in pair.modules() if isinstance(m, nn.Conv2d)]
    twice = {id(m) for name, m in pair.named_modules() if name.startswith(("stem", "trunk"))}
    macs = sum((2 if id(m) in twice else 1) * m.weight.numel() * SIDE**2 for m in layers) + pair.head.weight.numel()
    assert count_macs(pair, given) == macs
    found = evaluate(net, DataLoader(PairData(60, 2), 16))
    with torch.no_grad():
        wanted = (net(*given).argmax(1) == same).float().mean()
    assert found["top1"] == pytest.approx(float(wanted)) and found["images"] == 60
    assert agreement(pair, pair, given).top1 == 1.0
    one = tuple(tensor[:1] for tensor in given)
    assert latency(net, one, repeats=2) > 0
    assert all(timing.median > 0 for timing in latencies(pair, net, one, seconds=0.01))
    assert {"dense", "composed"} <= race_forms(net, pair, one, 2).keys()
    assert all(row["composed"] > 0 for row in race_layers(net, one, 1))
    assert peak_tensor_bytes(pair, given) > peak_tensor_bytes(pair, one) > 4 * sum(p.numel() for p in pair.parameters())


def test_a_sweep_takes_them(pair: Pair) -> None:
    cal = sharefold.calibrate(pair, pairs(60, 1)[0])
    scores = {"top1": 1.0, "top5": 1.0, "loss": 0.0}
    points = sweep(cal, ["70%", "50%"], lambda net: scores)
    assert [point.budget for point in points] == ["dense", "70%", "50%"] and points[2].share <= 0.5
    assert points[0].macs == count_macs(pair, tuple(x[:1] for x in pairs(1)[0]))


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_exports_compute_the_same_for_any_number(
    pair: Pair, teller: Told, converted: tuple[nn.Module, Any, Any], ending: str, tmp_path: Path
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    cases: list[tuple[nn.Module, tuple[Tensor, ...], list[str]]] = [
        (converted[0], pairs(5, 3)[0], ["left", "right"]), (teller, told(5, 3), ["image", "facts", "mask"]),
    ]  # fmt: skip
    for net, given, names in cases:
        path = tmp_path / f"{names[0]}.{ending}"
        done = export(net, path, example_input=tuple(tensor[:2] for tensor in given))
        assert done.max_difference < 1e-4 and done.dynamic_batch and list(done.inputs) == names
        if ending == "onnx":
            session = runtime.InferenceSession(str(path))
            assert [one.name for one in session.get_inputs()] == names
            assert all(one.shape[0] == "batch" for one in (*session.get_inputs(), *session.get_outputs()))
            found = [torch.from_numpy(x) for x in session.run(None, {n: t.numpy() for n, t in zip(names, given, strict=True)})]
        else:
            result = torch.export.load(path).module()(*given)
            found = list(result.values()) if isinstance(result, dict) else [result]
        with torch.no_grad():
            wanted = net(*given)
        for ours, theirs in zip(wanted.values() if isinstance(wanted, dict) else [wanted], found, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_a_dense_export_and_networks_of_any_number_of_inputs(converted: tuple[nn.Module, Any, Any], tmp_path: Path) -> None:
    given = tuple(tensor[:2] for tensor in pairs(2)[0])
    assert export(converted[0], tmp_path / "dense.safetensors", example_input=given).max_difference < 1e-4

    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, *images: Tensor) -> Tensor:
            return torch.stack([self.conv(image) for image in images]).sum(0)

    done = export(Summed(), tmp_path / "sum.pt2", example_input=given)
    assert done.dynamic_batch and len(done.inputs) == 2
    with pytest.raises(SharefoldError, match=r"several inputs \(left, right\), of sizes .*: pass example_input"):
        export(converted[0], tmp_path / "net.onnx")
    with pytest.raises(SharefoldError, match=r"export: 1 tensor is given, forward of Pair takes 2 \(left, right\)"):
        export(converted[0], tmp_path / "net.onnx", example_input=given[0])


def test_fine_tuning_takes_pairs(pair: Pair, converted: tuple[nn.Module, Any, Any]) -> None:
    few: dict[str, Any] = {"epochs": 1, "quiet": True, "workers": 0, "device": "cpu", "batch_size": 64}
    net, data, check = copy.deepcopy(converted[0]), PairData(640, 0), PairData(200, 2)
    before = right(net)
    report = finetune(net, data, check, teacher=pair, **few)
    assert report.updates == 10 and report.top1_before is not None and report.top1_after is not None
    assert report.teacher_top1 is not None and report.teacher_top1 > 0.9 and right(net) > before - 0.03
    loaded = finetune(copy.deepcopy(net), DataLoader(data, 64, shuffle=True), teacher=pair, **few)
    assert loaded.updates == 10
    # In memory, with labels and without, the same batches as from the data set.
    results = []
    for train in (((data.left, data.right), data.same), PairData(640, 0)):
        other = copy.deepcopy(net)
        finetune(other, train, teacher=pair, **few)
        results.append(torch.cat([p.detach().flatten() for p in other.parameters()]))
    torch.testing.assert_close(*results)
    assert finetune(copy.deepcopy(net), ((data.left, data.right), None), teacher=pair, labels=False, **few).updates == 10
    for name in ("mixup", "random_erase", "small_images"):
        with pytest.raises(SharefoldError, match=f"{name} changes single images, the model takes several inputs"):
            finetune(net, data, teacher=pair, **few, **{name: 0.5})
    with pytest.raises(SharefoldError, match="finetune: 640 samples but 639 labels"):
        finetune(net, ((data.left, data.right), data.same[:-1]), teacher=pair, **few)
    with pytest.raises(SharefoldError, match="training images have no labels"):
        finetune(net, ((data.left, data.right), None), teacher=pair, **few)


def test_verify_counts_and_compares_on_pairs(pair: Pair, planner: Planner, tmp_path: Path) -> None:
    net = copy.deepcopy(pair)
    sharefold.convert_(net, planner.plan("50%"), planner.cal)
    given = tuple(tensor[:1] for tensor in pairs(1)[0])
    claims = {"macs": count_macs(net, given), "agreement": agreement(pair, net, pairs(200, 2)[0]).top1, "top1": right(net)}
    sharefold.save(net, tmp_path / "net", metrics=claims)
    found = {claim.name: claim for claim in verify(tmp_path / "net", source=pair, data=PairData(200, 2), model=Pair())}
    assert found["macs"].found == claims["macs"] and all(claim.holds for claim in found.values())
    assert found["agreement"].found == pytest.approx(claims["agreement"])


def test_loaders_and_data_sets_give_the_same_images(pair: Pair) -> None:
    (left, right_), same = pairs(50, 1)
    data = PairData(50, 1)

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield left, right_

    for given in (
        (left, right_), [left, right_], ((left, right_), same), DataLoader(data, 8), data,
        [(left[:20], right_[:20], same[:20]), (left[20:], right_[20:])],
        ([left[i : i + 5], right_[i : i + 5]] for i in range(0, 50, 5)),
    ):  # fmt: skip
        images = sharefold.calibrate(pair, given).images
        assert isinstance(images, Inputs) and torch.equal(images.tensors[0], left) and torch.equal(images.tensors[1], right_)
    assert len(sharefold.calibrate(pair, endless()).images) == COUNT
    one = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3)).eval()
    images = sharefold.calibrate(one, DataLoader(list(zip(left, same, strict=True)), 7)).images
    assert isinstance(images, Tensor) and torch.equal(images, left)  # labels are not read


def test_made_up_inputs_have_the_shapes_of_an_example(teller: Told) -> None:
    cal = sharefold.calibrate(teller, example_input=told(2))
    image, facts, mask = cal.images.tensors
    assert len(cal.images) == COUNT and image.shape[1:] == (1, 8, 8) and facts.shape[1:] == (4,)
    assert mask.dtype == torch.bool and 0.3 < float(mask.float().mean()) < 0.7
    assert abs(float(image.mean())) < 1e-3 and float(image.std()) == pytest.approx(1, abs=1e-3)
    again = sharefold.calibrate(teller, example_input=told(2)).images
    assert all(map(torch.equal, again.tensors, cal.images.tensors))
    assert sharefold.plan(teller, "60%", cal).groups


def test_a_branch_of_whole_numbers_is_left_to_equal_weights() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.names = nn.Embedding(5, 12)
            self.facts = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(12, 12), nn.ReLU())])
            self.stem, self.body, self.head = nn.Conv2d(1, 12, 3), nn.Sequential(Block(12), Block(12)), nn.Linear(12, 4)

        def forward(self, image: Tensor, name: Tensor, scale: float = 1.0) -> Tensor:
            x = self.body(self.stem(image)) + scale * self.facts(self.names(name))[:, :, None, None]
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    net, given = Named().eval(), (told(80)[0], torch.arange(80) % 5)
    cal = sharefold.calibrate(net, given)
    assert cal.graph.traced == "fx" and "facts.0" not in cal.statistics.sensitivity() and "stem" in cal.statistics.sensitivity()
    size = sum(p.numel() for p in net.parameters())
    done = sharefold.convert_(net, sharefold.plan(net, "60%", cal), cal)
    assert sum(p.numel() for p in net.parameters()) <= 0.6 * size and done.steps["refit"].reason == ""


def test_wrong_inputs_are_told_in_one_line(pair: Pair, teller: Told) -> None:
    (left, right_), _ = pairs(8)
    cases: list[tuple[nn.Module, Any, str]] = [
        (pair, (left, right_[:5]), "calibration: the inputs are of 8, 5 samples: pass as many of each, in one order"),
        (pair, (left, "mask"), "calibration: input 2 is a str: pass a tensor for every input"),
        (pair, (left, right_.numpy()), "calibration: input 2 is a ndarray: pass a tensor for every input"),
        (pair, (left, torch.tensor(1.0)), r"calibration: input 2 is a single number: pass tensors \(n, \.\.\.\)"),
        (pair, (), "calibration: there are no tensors: pass one for every input of the network"),
        (pair, left, r"1 tensor is given, forward of Pair takes 2 \(left, right\): pass a tuple of 2 tensors"),
        (pair, (left, right_, left), r"3 tensors are given, forward of Pair takes 2 \(left, right\): pass a tuple of 2"),
        (teller, (left, right_), r"2 tensors are given, forward of Told takes 3 \(image, facts, mask\): pass a tuple of 3"),
        (pair, (left, right_ / 0), "calibration: input 2 holds NaN or infinity: check how it was normalised"),
        (pair, (left[:0], right_[:0]), "calibration: there are no samples: pass at least one of every input"),
        (pair, (left.long(), right_.long()), "calibration: no input holds floats"),
        (pair, (left.repeat(1, 3, 1, 1), right_), "Pair fails on the example input"),
        (pair, None, r"Pair takes several inputs \(left, right\), of sizes that it does not say: pass a tuple of tensors"),
        (pair, [], "calibration: there are no tensors"),
        (pair, iter([]), "calibration: there are no batches: pass a loader that has some"),
        (pair, [({"left": left}, right_)], "calibration: input 1 is a dict"),
        (pair, [1, 2], r"calibration: list is no float tensor of images"),
        (pair, [(left, right_), (left[..., :6], right_)], "calibration: batches do not fit together"),
        (pair, [(left, right_), (left,)], "calibration: batches have different numbers of tensors: give every batch all inputs"),
    ]
    for net, given, message in cases:
        with pytest.raises(SharefoldError, match=message) as told_:
            sharefold.calibrate(net, given)
        assert "\n" not in str(told_.value)
    with pytest.raises(SharefoldError, match=r"several inputs \(left, right\)"):
        sharefold.plan(pair, "50%")
    with pytest.raises(SharefoldError, match="example_input: the inputs are of 8, 5 samples"):
        sharefold.calibrate(pair, (left, right_), example_input=(left, right_[:5]))
    one = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3)).eval()
    with pytest.raises(SharefoldError, match=r"2 tensors are given, forward of Sequential takes 1 \(input\): pass a tensor"):
        sharefold.calibrate(one, (left, right_))


def test_inputs_that_cannot_be_given_are_told(pair: Pair) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 8, 3)

        def forward(self, a: Tensor, *, b: Tensor) -> Tensor:
            return self.body(a) + b

    (a, b), y = pairs(24)
    with pytest.raises(SharefoldError, match="takes b by keyword alone"):
        sharefold.calibrate(Named(), torch.randn(8, 3, 8, 8))
    with pytest.raises(SharefoldError, match="dict: pass several inputs as a tuple of tensors"):
        sharefold.calibrate(pair, {"a": a, "b": b})
    for odd in (b.to("meta"), b.to_sparse()):
        with pytest.raises(SharefoldError, match="input 2 is no ordinary tensor in memory"):
            sharefold.calibrate(pair, (a, odd))
    with pytest.raises(SharefoldError, match="labels are torch.float32: want whole numbers"):
        finetune(copy.deepcopy(pair), ((a, b), y.float()), epochs=1, device="cpu", quiet=True)
