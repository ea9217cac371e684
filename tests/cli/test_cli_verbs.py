"""The verbs on a real, small, untrained network: numbers, files, JSON keys, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call, refused, reported
from safetensors.torch import load_file, save_file

import sharefold
from sharefold.errors import SharefoldError
from sharefold.outputs.intervals import wilson
from sharefold_cli.convert_request import default_output

NET = "timm:resnet20_cifar"
SMALL = "timm:digits_resnet:blocks=2,width=16"
FAST = ["--no-pretrained", "--calib-count", "20", "--no-repair"]


def test_inspect_lists_hidden_channels_and_why_others_stay() -> None:
    report = json.loads(call("inspect", NET, "--no-pretrained", "--exclude", "layer1.0.conv2", "--json").stdout)
    writers = {f"layer{k}.{n}.conv1" for k in (1, 2, 3) for n in range(3)} - {"layer1.0.conv1"}
    assert {space["writer"] for space in report["hidden"]} == writers
    assert report["hidden"][0]["readers"] == ["layer1.1.conv2"] and report["hidden"][0]["channels"] == 16
    assert report["not_hidden"]["layer1.0.conv1"] == "layer1.0.conv2 is excluded"
    assert report["not_hidden"]["conv1"] == "padded along the channels"
    text = call("inspect", NET, "--no-pretrained", "--hidden").output
    assert "layer3.2.conv1" in text and "an output of the model" in text


def test_inspect_agrees_with_the_graph(npz: str) -> None:
    result = call("inspect", NET, "--no-pretrained", "--json")
    report = json.loads(result.stdout)
    assert report["params"] == 269_722 and report["traced"] == "fx" and report["input_size"] == [3, 32, 32]
    assert len(report["layers"]) == 20 and sum(layer["params"] for layer in report["layers"]) == 268_336
    groups = {group["name"]: group for group in report["groups"]}
    largest = max(groups.values(), key=lambda group: group["params"])
    assert largest["weight_shape"] == [64, 64, 3, 3] and largest["params"] == 64 * 64 * 9 * len(largest["members"])
    assert isinstance(report["skipped"], dict) and report["repeats"]
    text = call("inspect", NET, "--no-pretrained", "--layers")
    assert text.exit_code == 0 and all(layer["name"] in text.stdout for layer in report["layers"])
    without = json.loads(call("inspect", NET, "--no-pretrained", "--json", "--exclude", "layer3").stdout)
    assert not any("layer3" in member for group in without["groups"] for member in group["members"])


def test_eval_counts_what_the_model_says(npz: str) -> None:
    result = call("eval", NET, "--no-pretrained", "--data", npz, "--batch-size", 16, "--json")
    report = json.loads(result.stdout)
    assert report["images"] == 40 and 0 <= report["top1"] <= report["top5"] <= 1 and report["loss"] > 0
    assert report["seconds"] > 0
    limited = json.loads(call("eval", NET, "--no-pretrained", "--data", npz, "--limit", 7, "--json").stdout)
    assert limited["images"] == 7
    text = call("eval", NET, "--no-pretrained", "--data", npz, "--quiet")
    assert text.exit_code == 0 and text.output == ""


def test_convert_reports_exactly_the_promised_keys(shared_cifar: tuple[Path, dict]) -> None:
    out, report = shared_cifar
    promised = {
        "source", "method", "params", "bytes", "macs", "groups", "agreement", "seconds", "peak_memory_bytes", "output", "latency",
    }  # fmt: skip
    assert promised <= report.keys() and report["source"] == NET and report["method"] == "basis"
    for key in ("params", "bytes", "macs"):
        assert report[key].keys() == {"before", "after"}
    assert report["groups"][0].keys() == {
        "name", "stage", "role", "method", "members", "rank", "params_before", "params_after", "error",
    }  # fmt: skip
    latency = report["latency"]
    assert latency.keys() == {"before", "after", "threads"} and min(latency.values()) > 0
    assert report["params"]["before"] == 269_722 and report["params"]["after"] <= 0.6 * 269_722
    assert report["agreement"] is None  # of 20 images there is none
    assert report["peak_memory_bytes"] > 1e7 and report["seconds"]["total"] > 0
    assert report["output"] == str(out)
    saved = sum(group["params_before"] - group["params_after"] for group in report["groups"])
    assert report["params"]["before"] - saved == report["params"]["after"]


def test_what_each_step_did_is_printed_saved_and_drawn(tmp_path: Path) -> None:
    options = ("--no-pretrained", "--calib-count", 40, "--budget", "60%", "--method", "svd", "--store", "int8")
    result = call("convert", "timm:digits_resnet:blocks=1,width=8", *options, "-o", tmp_path / "net", "--json")
    assert result.exit_code == 0, result.output
    steps = json.loads(result.stdout)["steps"]
    assert [*steps] == ["scale", "refit", "norms", "head", "store"] and steps["store"]["kept"] and steps["store"]["images"] == 12
    printed = " ".join(result.stderr.split())
    assert "divergence before" in printed and "on 12 decide images, their views included where they have any" in printed
    saved = {step.name: step for step in sharefold.load(tmp_path / "net").sharefold_config.steps}
    assert [*saved] == [*steps]
    for name, told in steps.items():
        assert saved[name].kept == told["kept"] and saved[name].reason == told.get("reason", "")
        assert saved[name].kl_after == pytest.approx(told.get("kl_after"), rel=1e-5)
    card = (tmp_path / "net" / "README.md").read_text()
    assert all(f"| {name} | {step.outcome} |" in card for name, step in saved.items())
    drawn = call("report", tmp_path / "net", "-o", tmp_path / "net.html")
    assert drawn.exit_code == 0 and "<td>head</td>" in (tmp_path / "net.html").read_text()


def test_the_saved_network_is_what_was_reported(shared_cifar: tuple[Path, dict], npz: str) -> None:
    out, report = shared_cifar
    model = sharefold.load(out)
    assert sum(p.numel() for p in model.parameters()) == report["params"]["after"]
    assert (out / "model.safetensors").stat().st_size == report["file_bytes"] <= report["bytes"]["after"] + 100_000
    assert json.loads((out / "sharefold_config.json").read_text())["base"]["name"] == "resnet20_cifar"
    result = call("eval", out, "--data", npz, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["images"] == 40


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_expand_writes_an_ordinary_state_dict(shared_cifar: tuple[Path, dict], tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"dense{suffix}"
    result = call("expand", shared_cifar[0], "-o", target, "--json")
    report = json.loads(result.stdout)
    assert report["params"] == {"before": shared_cifar[1]["params"]["after"], "after": 269_722}
    assert report["bytes"] == target.stat().st_size
    state = load_file(target) if suffix == ".safetensors" else torch.load(target, weights_only=True)
    dense = sharefold.open_source(NET, pretrained=False).model
    dense.load_state_dict(state)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(dense.eval()(images), sharefold.load(shared_cifar[0])(images), atol=1e-4)
    refused(call("expand", shared_cifar[0], "-o", target), "exists: pass --force")
    assert call("expand", shared_cifar[0], "-o", target, "--force").exit_code == 0


def test_dry_run_writes_a_plan_that_convert_carries_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("convert", SMALL, *FAST, "--budget", "70%", "--method", "basis,svd", "--dry-run", "--json")
    report = json.loads(result.stdout)
    assert list(tmp_path.iterdir()) == [] and report["output"] is None and report["agreement"] is None
    (tmp_path / "plan.json").write_text(result.stdout)
    done = call("convert", SMALL, *FAST, "--plan", "plan.json", "--json")
    assert done.exit_code == 0, done.output
    carried = json.loads(done.stdout)
    assert carried["params"]["after"] == report["params"]["after"] and carried["method"] == "plan"
    assert carried["output"] == "digits_resnet-shared" and (tmp_path / "digits_resnet-shared").is_dir()
    names = {group["name"] for group in report["groups"]}
    assert {group["name"] for group in carried["groups"]} == names


def test_a_budget_in_bytes_is_the_size_of_the_file(tmp_path: Path) -> None:
    result = call("convert", SMALL, *FAST, "--budget", "30kB", "-o", tmp_path / "small.safetensors", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["store"] == "mixed:30000B" and report["bytes"]["after"] > 30_000
    assert 22_500 < report["file_bytes"] == (tmp_path / "small.safetensors").stat().st_size <= 30_000
    assert sharefold.load(tmp_path / "small.safetensors").sharefold_config.plan.store == report["store"]


def test_a_budget_in_macs_and_an_objective(tmp_path: Path) -> None:
    options = ["--budget", "60% MACs", "--objective", "error", "--method", "svd", "-o", tmp_path / "net", "--json"]
    result = call("convert", NET, *FAST, *options)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert 0.5 * report["macs"]["before"] < report["macs"]["after"] <= 0.6 * report["macs"]["before"]
    source = sharefold.load(tmp_path / "net").sharefold_config.plan.source
    assert source.startswith("budget 60% MACs, method svd: ") and "40,551,040 MACs expected" in source


def test_budgets_that_hold_together_are_told_everywhere(tmp_path: Path) -> None:
    options = ["--budget", "60%, 70% MACs", "--objective", "error", "--method", "svd,spatial"]
    result = call("convert", SMALL, *FAST, *options, "-o", tmp_path / "net", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["budget"] == "60%, 70% MACs"
    assert report["params"]["after"] <= 0.6 * report["params"]["before"] == 0.6 * 42_362
    assert report["macs"]["after"] <= 0.7 * report["macs"]["before"]
    source = sharefold.load(tmp_path / "net").sharefold_config.plan.source
    assert source == (
        f"budget 60%, 70% MACs, method svd + spatial: {report['params']['after']:,} parameters of 42,362 parameters and "
        f"{report['macs']['after']:,} MACs of {report['macs']['before']:,} MACs expected"
    )
    assert source in (tmp_path / "net" / "README.md").read_text()
    assert call("report", tmp_path / "net", "-o", tmp_path / "page.html").exit_code == 0
    assert source in (tmp_path / "page.html").read_text()
    dry = call("convert", SMALL, *FAST, *options, "--dry-run")
    assert dry.exit_code == 0 and source in " ".join(dry.output.split())


def test_a_recipe_is_planned_without_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(*arguments: object, **options: object) -> None:
        raise AssertionError("images were drawn")

    monkeypatch.setattr("sharefold.data.calibration_images", drawn)
    result = call("convert", NET, "--no-pretrained", "--recipe", "sharesnet", "--dry-run", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["params"]["after"] < 269_722


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        out = tmp_path / f"{name}.safetensors"
        assert call("convert", SMALL, *FAST, "--method", "basis,svd", "-o", out, "--seed", 3, "-q").exit_code == 0
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("a", "b"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget", "lots"], "budget 'lots' is not understood"),
        (["--budget", "0.1%", "--method", "svd"], "the floor is"),
        (["--budget", "150%"], "more than the whole model"),
        (["--method", "nonsense"], "unknown method 'nonsense'"),
        (["--method", "basis,nonsense"], "unknown method 'nonsense'"),
        (["--objective", "nonsense"], "unknown objective 'nonsense'"),
        (["--plan", "/no/plan.json", "--objective", "kl"], "--objective has no effect with --plan"),
        (["--plan", "/no/plan.json", "--no-pivots"], "--no-pivots has no effect with --plan"),
        (["--budget", "1% MACs", "--method", "svd"], "the floor is"),
        (["--budget", "0.001us", "--method", "svd"], "the floor is"),
        (["--budget", "5 latency"], "unknown unit"),
        (["--budget", "50%, 2M"], "bounds the parameters twice"),
        (["--budget", "50%,"], "has an empty part"),
        (["--budget", "90%, 1% MACs", "--method", "svd"], "budget 1% MACs"),
        (["--budget", "50%, 70% MACs", "--keep-agreement", "99%"], "both decide the size"),
        (["--budget", "50%, 70% MACs", "--recipe", "sharesnet"], "no effect with --recipe"),
        (["--budget", "70% MACs, 0.2MB", "--store", "int8"], "chooses its number types"),
        (["--exclude", "["], "not a regular expression"),
        (["--plan", "/no/plan.json"], "no such file"),
        (["--plan", "/no/plan.json", "--budget", "50%"], "no effect with --plan"),
        (["--plan", "/no/plan.json", "--method", "basis"], "--method has no effect with --plan"),
        (["--budget", "50%", "--keep-agreement", "99%"], "both decide the size"),
        (["--keep-agreement", "much"], "is no share"),
        (["--keep-agreement", "120%"], "at most 100%"),
        (["--calib", "npz:/no/file.npz"], "no such file"),
        (["--calib", "magic:x"], "unknown kind 'magic'"),
        (["--mean", "a,b"], "not a list of numbers"),
        (["--mean", "0.5,0.5"], "mean has 2 values"),
        (["--input-size", "3,x"], "input size"),
        (["--device", "cuda:99"], "device 'cuda:99'"),
        (["--refine", "soon"], "not understood"),
        (["--refine", "9" * 400], "would never end"),
        (["--budget", ""], "not understood"),
        (["--store", "mixed:1e300GB"], "larger than any network"),
        (["--seed", "9" * 20], "not in the range"),
        (["--budget", "0.2MB", "--store", "int8"], "chooses its number types"),
    ],
)
def test_convert_refuses_in_one_line_and_writes_nothing(tmp_path: Path, arguments: list[str], words: str) -> None:
    refused(call("convert", NET, *FAST, "-o", tmp_path / "out", *arguments), words)
    assert list(tmp_path.iterdir()) == []


def test_convert_refuses_a_file_that_is_too_small(tmp_path: Path) -> None:
    """Of a small network, since every share of its parameters is tried before."""
    options = ("--budget", "400B", "--method", "svd", "-o", tmp_path / "out")
    refused(call("convert", "timm:digits_resnet:blocks=1,width=8", *FAST, *options), "below what a file")
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_cannot_be_written_are_refused_first(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    refused(call("convert", "/no/such/source.pt", "-o", tmp_path / "taken"), "exists: pass --force")
    refused(call("convert", "/no/such/source.pt", "-o", tmp_path / "no" / "folder"), "does not exist")
    refused(call("convert", "/no/such/source.pt", "-o", "/proc/sharefold"), "/proc")
    assert (tmp_path / "taken").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("shape", "words"), [((4, 28, 28, 1), "1x28x28"), ((4, 48, 48, 3), "3x48x48")])
def test_calibration_images_of_a_wrong_shape(tmp_path: Path, shape: tuple[int, ...], words: str) -> None:
    np.savez(tmp_path / "c.npz", train_x=np.zeros(shape, dtype=np.uint8))
    arguments = ["convert", NET, *FAST, "-o", tmp_path / "out", "--calib", f"npz:{tmp_path / 'c.npz'}"]
    refused(call(*arguments), f"calibration images are {words}, the model wants 3x32x32")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["convert", "eval", "inspect", "expand"])
def test_sources_that_are_none(tmp_path: Path, verb: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "noise.pt").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 300)
    extra = {"eval": ["--data", "digits"], "expand": ["-o", tmp_path / "o.pt"], "convert": ["-o", tmp_path / "o"]}
    for source in ("missing.pt", "empty", "noise.pt", "noise.safetensors"):
        result = call(verb, tmp_path / source, *extra.get(verb, []))
        refused(result, "")
        assert not (tmp_path / "o").exists() and not (tmp_path / "o.pt").exists()


def test_nan_weights_and_converted_sources(tmp_path: Path, shared_cifar: tuple[Path, dict]) -> None:
    model = sharefold.open_source(NET, pretrained=False).model
    model.layer2[0].conv1.weight.data[0, 0, 0, 0] = float("nan")
    save_file(model.state_dict(), tmp_path / "nan.safetensors")
    refused(call("convert", tmp_path / "nan.safetensors", "-o", tmp_path / "o"), "NaN: layer2.0.conv1.weight")
    refused(call("convert", shared_cifar[0], "-o", tmp_path / "o"), "converted already")
    assert not (tmp_path / "o").exists()


def test_expand_writes_halves(shared_cifar: tuple[Path, dict], tmp_path: Path) -> None:
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    assert call("expand", shared_cifar[0], "-o", whole).exit_code == 0
    report = reported("expand", shared_cifar[0], "-o", half, "--dtype", "bf16")
    assert report["dtype"] == "bf16" and report["bytes"] < 0.55 * whole.stat().st_size
    dense, tensors = load_file(whole), load_file(half)
    assert dense.keys() == tensors.keys()
    for name, tensor in dense.items():
        expected = tensor.bfloat16() if tensor.is_floating_point() else tensor
        assert torch.equal(tensors[name], expected) and tensors[name].dtype == expected.dtype
    loud = sharefold.load(shared_cifar[0])
    loud.get_classifier().bias.data[0] = 1e6
    sharefold.save(loud, tmp_path / "loud")
    result = call("expand", tmp_path / "loud", "-o", tmp_path / "x.pt", "--dtype", "fp16")
    refused(result, "bias has numbers beyond what float16 holds")
    assert not (tmp_path / "x.pt").exists()


def test_eval_compares_with_an_original(shared_cifar: tuple[Path, dict], tmp_path: Path, npz: str) -> None:
    dense = tmp_path / "dense.safetensors"
    assert call("expand", shared_cifar[0], "-o", dense).exit_code == 0
    report = reported("eval", shared_cifar[0], "--against", dense, "--data", npz, "--split", "train", "--limit", 30)
    (only,) = report["outputs"]
    assert (only["metric"], only["value"], only["images"], report["images"]) == ("agreement", 1.0, 30, 30)
    assert only["interval"][0] == pytest.approx(wilson(1.0, 30)[0]) and abs(report["divergence"]) < 1e-6
    assert report["against"] == str(dense) and "top1" not in report
    text = call("eval", shared_cifar[0], "--against", dense, "--data", npz, "--outputs", "regression").stdout
    assert "error" in text and "agreement" not in text and "divergence" in text and "mean over 40 images" in text
    state = load_file(dense)
    name = next(name for name in state if name.endswith("conv1.weight"))
    save_file({**state, name: 3 * state[name]}, tmp_path / "other.safetensors")
    pair = shared_cifar[0], "--against", tmp_path / "other.safetensors"
    other = reported("eval", *pair, "--arch", NET, "--data", npz)  # of that file: the other knows its own
    assert other["divergence"] > 1e-3 and other["images"] == 40
    turned = reported("eval", pair[2], "--against", pair[0], "--arch", NET, "--data", npz)
    assert turned["divergence"] > 1e-3 and turned["divergence"] != other["divergence"]
    wide = call("eval", shared_cifar[0], "--against", "timm:mobilenetv3_small_050", "--no-pretrained", "--data", npz)
    refused(wide, "want other images (3x32x32, mean")
    refused(call("eval", shared_cifar[0], "--data", npz, "--outputs", "logits"), "give one of them, too")
    refused(call("eval", shared_cifar[0], "--against", tmp_path / "no.pt", "--data", npz), "does not exist")


def test_eval_refuses_what_it_cannot_measure(tmp_path: Path, npz: str) -> None:
    refused(call("eval", NET, "--no-pretrained", "--data", npz, "--split", "train"), "no labels")
    refused(call("eval", NET, "--no-pretrained", "--data", f"npz:{tmp_path}"), "no such file")
    refused(call("eval", "tv:resnet18", "--no-pretrained", "--data", "digits"), "1x8x8, the model wants 3x224x224")
    refused(
        call("eval", NET, "--no-pretrained", "--num-classes", "2", "--data", npz), "the model has 2 outputs"
    )


def test_expand_refuses_other_kinds(tmp_path: Path, shared_cifar: tuple[Path, dict]) -> None:
    refused(call("expand", shared_cifar[0], "-o", tmp_path / "x.onnx"), "unknown kind '.onnx'")
    (tmp_path / "d.pt").mkdir()
    refused(call("expand", shared_cifar[0], "-o", tmp_path / "d.pt"), "is a folder")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    refused(call("expand", tmp_path / "plain.safetensors", "-o", tmp_path / "x.pt"), "no sharefold configuration")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("timm:resnet50.a1_in1k", "resnet50-shared"),
        ("timm:lrunet:reuse=14,width=1", "lrunet-shared"),
        ("hf-hub:timm/resnet18.a1_in1k", "resnet18-shared"),
        ("models/resnet20-12fca82f.th", "resnet20-12fca82f-shared"),
    ],
)
def test_default_output(source: str, name: str) -> None:
    assert default_output(source) == Path(name)


def test_a_plan_file_must_be_one(tmp_path: Path) -> None:
    from sharefold_cli.convert_request import read_plan

    for text, words in (("{", "not JSON"), ("[]", "no list of groups"), ("\udcff", "is no text")):
        (tmp_path / "p.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(SharefoldError, match=words):
            read_plan(tmp_path / "p.json")
