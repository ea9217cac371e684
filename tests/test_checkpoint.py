"""Saved networks: equal bits in a new process, nothing unpickled, nothing half-written, clear refusals."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call
from file_tools import METADATA, edit_config, metadata_of, reseal
from networks import BLOCKS, images, logits, made_once, net
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from safetensors.torch import save as safetensors_bytes
from torch import nn

import sharefold
from sharefold import checkpoint
from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.format import carry_config, config_of, without_figures
from sharefold.measure import model_bytes
from sharefold.outputs import Figure
from sharefold.repair.step_record import StepRecord
from sharefold.store import quantize_

NAME = "digits_resnet"
NARROW = f"timm:{NAME}:width=12"
METHODS = ("basis", "hybrid", "svd", "spatial", "tucker", "average", "tied", "cluster-layer", "cluster-filter", "cluster-kernel")


@made_once
def registered(method: str = "basis", budget: str = "88%") -> nn.Module:
    """A shared network whose architecture is in a registry."""
    model = sharefold.open_source(NARROW, pretrained=False).model.eval()
    x = inputs(16)
    plan = sharefold.plan(model, budget=budget, calibration=x, method=method, exclude=r"layer2\.[^1]|layer1\.[^23]")
    sharefold.convert_(model, plan, calibration=x, repair=False)
    return model


def inputs(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def run(model: nn.Module) -> torch.Tensor:
    return model.eval()(inputs())


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return registered()


@pytest.fixture
def saved(model: nn.Module, tmp_path: Path) -> Path:
    return sharefold.save(model, tmp_path / "net")


def test_a_new_process_gives_equal_bits_and_never_unpickles(model: nn.Module, tmp_path: Path) -> None:
    paths = [str(sharefold.save(model, tmp_path / target)) for target in ("net", "net.safetensors")]
    torch.save(inputs(), tmp_path / "x.pt")
    code = (
        "import sys, torch, pickle, sharefold\n"
        "x = torch.load(sys.argv[1], weights_only=True)\n"
        "def no(*a, **k): raise SystemExit('unpickled')\n"
        "pickle.load = pickle.loads = torch.load = torch.serialization.load = no\n"
        "for path in sys.argv[2:]:\n"
        "    model = sharefold.load(path)\n"
        "    assert not model.training and all(p.requires_grad for p in model.parameters())\n"
        "    with torch.no_grad(): print(model(x).numpy().tobytes().hex())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.pt"), *paths], capture_output=True, text=True,
                          timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [run(model).numpy().tobytes().hex()] * 2


@pytest.mark.parametrize("method", METHODS)
def test_every_method_round_trips_and_expands(method: str, tmp_path: Path) -> None:
    model = registered(method)
    again = sharefold.load(sharefold.save(model, tmp_path / "net"))
    assert torch.equal(run(model), run(again))
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in again.named_parameters()}
    assert again.state_dict().keys() == model.state_dict().keys()
    stock = sharefold.open_source(NARROW, pretrained=False).model
    dense = sharefold.expand(again)
    stock.load_state_dict(dense.state_dict())
    torch.testing.assert_close(run(stock), run(model), rtol=0, atol=1e-4)
    assert torch.equal(run(dense), run(stock)) and type(dense) is type(stock)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_network_of_ones_own_is_rebuilt_from_its_dense_module(kind: str, tmp_path: Path) -> None:
    model = net(kind, blocks=2)
    plan = sharefold.plan(model, budget="70%", calibration=images(), method=("basis", "svd"))
    sharefold.convert_(model, plan, calibration=images())
    path = sharefold.save(model, tmp_path / "own.safetensors")
    with pytest.raises(SharefoldError, match=r"pass its dense module as load\(..., model=...\)"):
        sharefold.load(path)
    again = sharefold.load(path, model=net(kind, seed=5, blocks=2))
    assert torch.equal(logits(model), logits(again))
    torch.testing.assert_close(logits(sharefold.expand(again)), logits(model), rtol=1e-4, atol=1e-4)
    with pytest.raises(SharefoldError):
        sharefold.load(path, model=net(kind))


def test_the_file_holds_each_tensor_once_and_little_else(model: nn.Module, saved: Path) -> None:
    file = saved / "model.safetensors"
    assert sorted(p.name for p in saved.iterdir()) == ["README.md", "model.safetensors", "sharefold_config.json"]
    assert file.stat().st_size <= model_bytes(model) + 100_000
    tensors = load_file(file)
    parameters = dict(model.named_parameters())
    assert sum(t.numel() for n, t in tensors.items() if n in parameters) == sum(p.numel() for p in parameters.values())
    config = json.loads((saved / "sharefold_config.json").read_text())
    with safe_open(str(file), framework="pt") as handle:
        assert json.loads(handle.metadata()["sharefold"]) == config
    assert config["format_version"] == 1 and config["base"]["name"] == NAME
    assert config["sharefold_version"] == sharefold.__version__ and config["plan"]["groups"]
    card = (saved / "README.md").read_text()
    assert card.startswith("---\n") and "sharefold.load(" in card
    embedded = json.loads(card.split("```json\n")[1].split("```")[0])
    assert embedded["plan"] == config["plan"]


def test_metrics_and_saving_again(model: nn.Module, tmp_path: Path) -> None:
    path = sharefold.save(model, tmp_path / "a", metrics={"top1": 0.5})
    again = sharefold.load(path)
    second = sharefold.save(again, tmp_path / "b", metrics={"loss": 1.0})
    config = json.loads((second / "sharefold_config.json").read_text())
    assert config["metrics"] == {"top1": 0.5, "loss": 1.0} and "| top1 | 0.5000 |" in (second / "README.md").read_text()
    assert torch.equal(run(sharefold.load(second)), run(model))


STEPS = (StepRecord("refit", True, "", 0.5, 0.25, images=20), StepRecord("norms", False, "it | has `none`"))


@pytest.mark.parametrize("packed", [False, True])
def test_steps_are_kept_beside_the_weights_and_shown_in_the_card(packed: bool, tmp_path: Path) -> None:
    model = registered()
    if packed:
        quantize_(model, "fp16")
    carry_config(model, replace(config_of(model), steps=()))
    bare = sharefold.save(model, tmp_path / "bare")  # as files of before, which do not tell
    carry_config(model, replace(config_of(model), steps=STEPS))
    path, single = sharefold.save(model, tmp_path / "net"), sharefold.save(model, tmp_path / "net.safetensors")
    assert config_of(sharefold.load(bare)).steps == () and "| step |" not in (bare / "README.md").read_text()
    assert config_of(sharefold.load(path)).steps == STEPS
    assert config_of(sharefold.load(single)).steps == (() if packed else STEPS)
    card = (path / "README.md").read_text()
    assert "| refit | kept | 0.5 | 0.25 |  |\n| norms | not run |  |  | it \\| has 'none' |" in card
    assert "on 20 decide images, their views included where they have any" in card
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (bare, path)]
    assert sizes[0] == sizes[1] or not packed
    edit_side = json.loads((path / "sharefold_config.json").read_text())
    edit_side["steps"][0]["kl_after"] = 0.001
    (path / "sharefold_config.json").write_text(json.dumps(edit_side))
    if packed:  # the weights file says nothing about them
        assert config_of(sharefold.load(path)).steps[0].kl_after == 0.001
    else:
        with pytest.raises(SharefoldError, match="says another steps than"):
            sharefold.load(path)


def test_training_takes_back_what_steps_told() -> None:
    assert without_figures(replace(config_of(registered()), steps=STEPS)).steps == ()


def test_trained_weights_are_what_is_saved(tmp_path: Path) -> None:
    model = registered()
    sharefold.save(model, tmp_path / "net.safetensors")
    again = sharefold.load(tmp_path / "net.safetensors")
    optimizer = torch.optim.SGD(again.parameters(), 0.01)
    again.train()(inputs()).square().mean().backward()
    optimizer.step()
    sharefold.save(again, tmp_path / "net.safetensors", force=True)
    third = sharefold.load(tmp_path / "net.safetensors")
    assert torch.equal(run(again), run(third)) and not torch.equal(run(third), run(model))


def test_half_precision_stays_half(model: nn.Module, tmp_path: Path) -> None:
    half = registered().half()
    again = sharefold.load(sharefold.save(half, tmp_path / "half"))
    assert all(p.dtype == torch.float16 for p in again.parameters())
    for name, tensor in half.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_unknown_keys_warn(saved: Path, model: nn.Module) -> None:
    edit_config(saved, lambda config: config.update(color="green"))
    with pytest.warns(SharefoldWarning, match=r"unknown keys \['color'\]"):
        again = sharefold.load(saved)
    assert torch.equal(run(again), run(model))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(format_version=2), "format_version 2, this sharefold reads up to 1: upgrade"),
        (lambda c: c.update(format_version="one"), "format_version one"),
        (lambda c: c.update(plan=[]), "holds no plan"),
        (lambda c: c["plan"]["groups"][0].update(method="magic"), "unknown method 'magic'"),
        (lambda c: c["plan"]["groups"][0]["options"].update(rank=1), "does not fit its own plan"),
        (lambda c: c["plan"]["groups"][0]["options"].update(rank=-4), "must be rank an integer"),
        (lambda c: c["plan"]["groups"][0].update(members=["gone", "lost"]), "names layer 'gone'"),
        (lambda c: c["plan"].update(groups=[]), "does not fit its own plan"),
        (lambda c: c.update(base={"library": "timm", "name": "os.system", "kwargs": {}}), "unknown model"),
        (lambda c: c.update(base={"library": "os", "name": "system", "kwargs": {}}), "unknown model library"),
        (lambda c: c["base"].update(kwargs={"checkpoint_path": "/etc/passwd"}), "not allowed here"),
        (lambda c: c["base"].update(kwargs={"num_classes": 3}), "does not fit its own plan"),
        (lambda c: c.update(aliases={"linear.bias": "nowhere"}), "tensor 'nowhere' is missing"),
        (lambda c: c.update(steps=[{"name": "refit", "kept": "yes"}]), "kept of step refit in its configuration must be true or"),
    ],
)
def test_configurations_that_do_not_hold_are_refused_in_one_line(
    saved: Path, change: Callable[[dict], None], words: str
) -> None:
    edit_config(saved, change)
    with pytest.raises(SharefoldError, match=words) as caught:
        sharefold.load(saved)
    assert "\n" not in str(caught.value)


def test_pivots_that_point_to_nothing_are_refused(saved: Path) -> None:
    file = saved / "model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("pivots"))
    tensors[name][-1] = 10_000
    reseal(file, tensors)
    with pytest.raises(SharefoldError, match=f"is damaged: tensor '{name}' points to entries that are not there") as caught:
        sharefold.load(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 4, 100, 5_000, -1])
def test_truncated_files(saved: Path, keep: int) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    for path in (saved, file):
        with pytest.raises(SharefoldError, match="is damaged or no safetensors file") as caught:
            sharefold.load(path)
        assert "\n" not in str(caught.value)


def test_what_is_no_shared_network(tmp_path: Path) -> None:
    with pytest.raises(SharefoldError, match="does not exist"):
        sharefold.load(tmp_path / "gone")
    with pytest.raises(SharefoldError, match=r"holds no model\.safetensors"):
        sharefold.load(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(SharefoldError, match="holds no sharefold configuration"):
        sharefold.load(tmp_path / "plain.safetensors")
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(SharefoldError, match="no safetensors file"):
        sharefold.load(tmp_path / "pickle.safetensors")
    with pytest.raises(SharefoldError, match="convert it first"):
        sharefold.save(nn.Linear(2, 2), tmp_path / "x")
    with pytest.raises(SharefoldError, match="it is dense already"):
        sharefold.expand(nn.Linear(2, 2))
    assert checkpoint.is_sharefold(tmp_path / "plain.safetensors") is False


def test_is_sharefold(model: nn.Module, tmp_path: Path, saved: Path) -> None:
    single = sharefold.save(model, tmp_path / "one.safetensors")
    assert checkpoint.is_sharefold(saved) and checkpoint.is_sharefold(single) and not checkpoint.is_sharefold(tmp_path)
    folder = shutil.copytree(saved, tmp_path / "copy")
    (folder / "sharefold_config.json").unlink()  # which says nothing that the weights file does not say
    assert checkpoint.is_sharefold(folder) and sharefold.open_source(str(folder)).shared


@pytest.mark.parametrize("name", ["net.pt", "net.onnx", "net.PTH", "net.SAFETENSORS"])
def test_names_of_files_of_other_formats_are_refused(model: nn.Module, tmp_path: Path, name: str) -> None:
    with pytest.raises(SharefoldError, match=r"call it net, or net\.safetensors"):
        sharefold.save(model, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_figures_of_every_output_are_in_the_card_and_nothing_else_is_taken_for_one(model: nn.Module, tmp_path: Path) -> None:
    psnr = Figure("output", "image", "psnr", 39.63, (39.45, 39.81), 50).to_dict()
    nothing = Figure("boxes", "detections", "found", float("nan"), (0.0, 1.0), 50).to_dict()
    odd: list[Any] = [{}, "psnr", None, *({**psnr, key: value} for key, value in (
        ("metric", "<b>"), ("interval", [1.0]), ("value", "39"), ("images", 0.5), ("name", 7),
    ))]  # fmt: skip
    sharefold.save(model, tmp_path / "net", metrics={"outputs": [*odd, psnr, nothing]})
    card = (tmp_path / "net" / "README.md").read_text()
    assert "| psnr of output | 39.63 dB (39.45 dB to 39.81 dB) on 50 images |" in card.replace("\\", "")
    assert "| found of boxes | - (0.00% to 100.00%) on 50 images |" in card.replace("\\", "") and "<b>" not in card
    reported_page = call("report", tmp_path / "net", "-o", tmp_path / "page.html")
    assert reported_page.exit_code == 0 and "39.63 dB (39.45 dB to 39.81 dB) on 50 images" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"top1": 0.5, "map": torch.ones(1)}, "metric 'map' is Tensor"),
        ({"top1": float("nan")}, "metric 'top1' is float: give finite numbers"),
        ("top1", "must map names to figures, not be str"),
    ],
)
def test_figures_that_no_file_can_hold_are_refused(model: nn.Module, tmp_path: Path, metrics: Any, words: str) -> None:
    with pytest.raises(SharefoldError, match=words):
        sharefold.save(model, tmp_path / "net", metrics=metrics)
    assert list(tmp_path.iterdir()) == []


def test_another_network_than_the_file_is_of_is_named_as_the_reason(tmp_path: Path) -> None:
    model = net(blocks=2)
    sharefold.convert_(model, sharefold.plan(model, "60%", images(8), method="basis"), images(8), repair=False)
    file = sharefold.save(model, tmp_path / "net.safetensors")
    other = net(blocks=2)
    other.fc = nn.Linear(other.fc.in_features, 7)
    with pytest.raises(SharefoldError, match="does not fit the network that was given.*'fc.weight' is"):
        sharefold.load(file, model=other)


def test_a_class_is_no_network(saved: Path) -> None:
    with pytest.raises(SharefoldError, match="model must be a network, a torch.nn.Module, not the class Linear"):
        sharefold.load(saved, model=nn.Linear)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["net", "net.safetensors"])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("exists", [False, True])
def test_a_save_that_fails_leaves_everything_as_it_was(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, failure: BaseException, exists: bool
) -> None:
    path = tmp_path / target
    if exists:
        sharefold.save(model, path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def fail(file: Path, tensors: dict, metadata: dict) -> None:
        file.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(checkpoint, "write_tensors", fail)
    expected = SharefoldError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        sharefold.save(model, path, force=True)
    if isinstance(failure, OSError):
        assert "No space left on device" in str(caught.value)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ([target] if exists else [])


def test_existing_output(model: nn.Module, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(SharefoldError, match="exists: pass --force"):
        sharefold.save(model, saved)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(SharefoldError, match="a folder that sharefold did not write"):
        sharefold.save(model, tmp_path / "mine", force=True)
    with pytest.raises(SharefoldError, match="does not exist: create it first"):
        sharefold.save(model, tmp_path / "no" / "net")
    sharefold.save(model, saved, force=True)
    shutil.rmtree(saved)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years" and len(list(tmp_path.iterdir())) == 1


class Tied(nn.Module):
    """A stock network that ties two weights itself, and holds a view into a larger storage."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)))
        self.stem, self.out, self.back = nn.Conv2d(3, 8, 1), nn.Linear(8, 8), nn.Linear(8, 8)
        self.back.weight = self.out.weight
        self.register_buffer("window", torch.arange(1000.0)[100:110])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.back(self.out(self.body(self.stem(x)).mean((2, 3)))) + self.window.mean()


def test_weights_tied_by_the_network_itself_stay_tied(tmp_path: Path) -> None:
    model = Tied().eval()
    model.pretrained_cfg = {"input_size": (3, 12, 12)}
    plan = sharefold.plan(model, budget="60%", calibration=images(), exclude="out|back")
    sharefold.convert_(model, plan, calibration=images())
    path = sharefold.save(model, tmp_path / "tied.safetensors")
    assert path.stat().st_size < 4 * (sum(p.numel() for p in model.parameters()) + 10) + 10_000
    again = sharefold.load(path, model=Tied())
    assert torch.equal(logits(again), logits(model))
    assert again.back.weight.data_ptr() == again.out.weight.data_ptr()


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.LazyLinear(4)).eval()


def test_tiny_networks_have_their_configuration_compressed_and_are_told_when_nothing_is_gained(tmp_path: Path) -> None:
    model, template, file = tiny(), tiny(), tmp_path / "net.safetensors"
    expected = [network(images()).shape for network in (model, template)]
    plan = sharefold.plan(model, "60%", images(), method="svd")
    original = len(safetensors_bytes(model.state_dict()))
    sharefold.convert_(model, plan, images(), config={"base": None})
    dense = 4 * plan.params_before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sharefold.save(model, file)
    assert file.stat().st_size < dense and metadata_of(file)[METADATA].startswith("zlib85:")
    again = sharefold.load(file, model=template)
    assert torch.equal(again(images()), model(images())) and again(images()).shape == expected[0]
    assert [step.name for step in config_of(again).steps] == [step.name for step in config_of(model).steps] != []
    model.register_buffer("filler", torch.randn(dense // 4))  # as if nothing had been saved
    with pytest.warns(SharefoldWarning, match=f"the file of the original network {original:,}: so small a network"):
        sharefold.save(model, file, force=True)
