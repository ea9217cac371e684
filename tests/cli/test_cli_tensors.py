"""Tensors on the command line: a network of two images, one of signals and one of volumes, through every verb."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import call, refused, reported

CODE = '''
import torch
from torch import nn


def body(conv, norm, width):
    return nn.Sequential(*[m for _ in range(4) for m in (conv(width, width, 3, padding=1), norm(width), nn.ReLU())])


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(1, 12, 3, padding=1), body(nn.Conv2d, nn.BatchNorm2d, 12), nn.Linear(24, 3)

    def forward(self, left, right):
        return self.head(torch.cat([self.body(self.stem(x)).mean((2, 3)) for x in (left, right)], 1))


class Tones(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv1d(2, 12, 5, stride=2), body(nn.Conv1d, nn.BatchNorm1d, 12), nn.Linear(12, 3)

    def forward(self, sound):
        return self.head(self.body(self.stem(sound)).mean(2))


class Scan(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv3d(1, 12, 3), body(nn.Conv3d, nn.BatchNorm3d, 12), nn.Linear(12, 3)

    def forward(self, volume):
        return self.head(self.body(self.stem(volume)).mean((2, 3, 4)))
'''
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "Pair": {"right": (1, 8, 8), "left": (1, 8, 8)}, "Tones": {"sound": (2, 60)}, "Scan": {"volume": (1, 6, 6, 6)},
}  # fmt: skip
COUNT = 80


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code, a checkpoint of each network, a file of tensors with labels for each, and the converted networks."""
    root = tmp_path_factory.mktemp("tensors")
    (root / "cli_nets.py").write_text(CODE)
    space: dict[str, Any] = {}
    exec(CODE, space)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    for name, shapes in SHAPES.items():
        torch.save(space[name]().state_dict(), root / f"{name}.pt")
        arrays = {key: rng.normal(size=(COUNT, *shape)).astype("f4") for key, shape in shapes.items()}
        np.savez(root / f"{name}.npz", labels=rng.integers(0, 3, COUNT), **arrays)
        convert = ("convert", root / f"{name}.pt", *own(root, name), "--calib", f"tensors:{root / name}.npz")
        report = reported(*convert, "--budget", "50%", "-o", root / f"{name}-shared")
        assert report["params"]["after"] <= report["params"]["before"] / 2
    return root


def own(folder: Path, name: str) -> tuple[str, str]:
    return "--arch", f"{folder / 'cli_nets.py'}:{name}"


def given(folder: Path, name: str) -> tuple[Any, ...]:
    return folder / f"{name}-shared", *own(folder, name), "--data", f"tensors:{folder / name}.npz"


@pytest.mark.parametrize("name", SHAPES)
def test_networks_are_compared_and_measured(folder: Path, name: str, tmp_path: Path) -> None:
    against = reported("eval", *given(folder, name), "--against", folder / f"{name}.pt", "--limit", 50)
    assert against["images"] == 50 and against["outputs"][0]["metric"] == "agreement" and against["divergence"] < 0.1
    turned = reported("eval", folder / f"{name}.pt", *given(folder, name)[1:], "--against", folder / f"{name}-shared")
    assert turned["images"] == COUNT
    labelled = reported("eval", *given(folder, name))
    assert labelled["images"] == COUNT and 0 <= labelled["top1"] <= 1 and labelled["top5"] == 1 and labelled["split"] is None
    claims = {c["name"]: c for c in reported("verify", *given(folder, name), "--source", folder / f"{name}.pt")["claims"]}
    assert claims["macs"]["claimed"] == claims["macs"]["found"] > 0
    assert claims["params before"]["holds"] and claims["agreement"]["found"] is not None and claims["top1"]["found"] is not None
    seen = reported("inspect", folder / f"{name}.pt", *given(folder, name)[1:])
    sizes = [list(SHAPES[name][key]) for key in sorted(SHAPES[name])]
    assert seen["input_size"] == (sizes if len(sizes) > 1 else sizes[0]) and seen["groups"]
    pages = [
        reported("report", *given(folder, name), "-o", tmp_path / f"{len(more)}.html", *more)
        for more in ((), ("--source", folder / f"{name}.pt"))
    ]
    assert all(page["layers"] > 4 and page["groups"] > 0 for page in pages)


@pytest.mark.parametrize("name", SHAPES)
def test_files_for_other_programs_compute_the_same(folder: Path, name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    report = reported("export", *given(folder, name), "-o", tmp_path / "net.onnx")
    arrays = np.load(folder / f"{name}.npz")
    names = sorted(SHAPES[name]) if name == "Pair" else ["images"]
    assert report["inputs"] == names and report["dynamic_batch"]
    feed = {into: arrays[key][:5] for into, key in zip(names, sorted(SHAPES[name]), strict=True)}
    (found,) = runtime.InferenceSession(str(tmp_path / "net.onnx")).run(None, feed)
    reported("expand", folder / f"{name}-shared", *own(folder, name), "-o", tmp_path / "dense.pt")
    space: dict[str, Any] = {}
    exec(CODE, space)
    dense = space[name]().eval()
    dense.load_state_dict(torch.load(tmp_path / "dense.pt", weights_only=True))
    with torch.no_grad():
        wanted = dense(*(torch.from_numpy(feed[into]) for into in names))
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-3, atol=1e-4)
    fixed = reported("export", *given(folder, name), "-o", tmp_path / "net.pt2", "--batch", 3)
    shapes = [[3, *SHAPES[name][key]] for key in sorted(SHAPES[name])]
    assert fixed["input_shape"] == (shapes if len(shapes) > 1 else shapes[0])
    refused(call("export", *given(folder, name), "-o", tmp_path / "more.pt2", "--batch", 500), "it holds 80 samples, --batch 500")
    assert not (tmp_path / "more.pt2").exists()


def test_a_network_of_two_images_is_tuned_rounded_timed_and_swept(folder: Path, tmp_path: Path) -> None:
    data, arch = f"tensors:{folder / 'Pair.npz'}", own(folder, "Pair")
    teacher = ("--teacher", folder / "Pair.pt")  # of the class that --arch names
    short = ("--epochs", 1, "--workers", 0, "--batch-size", 16)
    tuned = tmp_path / "tuned"
    found = reported("finetune", *given(folder, "Pair"), "--limit", 64, "--val", data, *teacher, *short, "-o", tuned)
    assert found["updates"] == 64 // 16 and 0 <= found["top1_after"] <= 1
    small = tmp_path / "small.safetensors"
    told = reported("round", tuned, *arch, "--store", "int8", "--calib", data, "--calib-count", 70, "-o", small)
    assert told["bytes"]["file"] < told["bytes"]["memory"]
    assert reported("eval", small, *arch, "--data", data)["images"] == COUNT
    raced = reported("bench", *given(folder, "Pair"), "--repeats", 1, "--batch", 2, "--no-layers")
    assert raced["input_size"] == [[1, 8, 8], [1, 8, 8]] and raced["macs"]["source"] > 0
    both = ("--data", data, "--calib", data)
    swept = reported("sweep", folder / "Pair.pt", *arch, *both, "--budgets", "50%", "-o", tmp_path / "sizes")
    assert [point["budget"] for point in swept["points"]] == ["dense", "50%"] and swept["split"] is None


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--mean", "0.5"], "--mean is for images"),
        (["--std", "0.5"], "--std is for images"),
        (["--input-size", "1,8,8"], "--input-size is for images"),
        (["--calib-split", "test"], "--calib-split is for images"),
        (["--calib-resize"], "--calib-resize is for images"),
    ],
)
def test_options_of_images_are_refused(folder: Path, tmp_path: Path, option: Sequence[str], words: str) -> None:
    convert = ("convert", folder / "Pair.pt", *own(folder, "Pair"), "--calib", f"tensors:{folder / 'Pair.npz'}")
    refused(call(*convert, *option, "-o", tmp_path / "out"), words)
    assert not (tmp_path / "out").exists()


def test_wrong_files_leave_nothing_behind(folder: Path, tmp_path: Path) -> None:
    arrays = dict(np.load(folder / "Pair.npz"))
    wrong: dict[str, tuple[dict[str, np.ndarray], str]] = {
        "names": ({"a": arrays["left"], "b": arrays["right"]}, "call them left, right"),
        "one": ({"left": arrays["left"]}, "takes 2 (left, right)"),
        "lengths": ({"left": arrays["left"], "right": arrays["right"][1:]}, "different numbers of samples"),
        "nan": ({"left": arrays["left"] * np.nan, "right": arrays["right"]}, "left holds NaN"),
        "shape": ({"left": arrays["left"][:, 0], "right": arrays["right"]}, "Pair fails on its first sample"),
        "objects": ({"left": np.array([{}] * 3), "right": arrays["right"][:3]}, "holds Python objects"),
    }
    for name, (held, words) in wrong.items():
        np.savez(tmp_path / f"{name}.npz", **held)
        convert = ("convert", folder / "Pair.pt", *own(folder, "Pair"), "--calib", f"tensors:{tmp_path / name}.npz")
        refused(call(*convert, "-o", tmp_path / "out"), words)
    convert = ("convert", folder / "Pair.pt", *own(folder, "Pair"))
    refused(call(*convert, "--calib", "tensors:no.npz", "-o", tmp_path / "out"), "no such file")
    refused(call("eval", *given(folder, "Pair"), "--truth", tmp_path), "--truth is for images")
    refused(call("eval", *given(folder, "Pair"), "--split", "val"), "--split is for images")
    np.savez(tmp_path / "plain.npz", left=arrays["left"], right=arrays["right"])
    plain = f"tensors:{tmp_path / 'plain.npz'}"
    refused(call("eval", *given(folder, "Pair")[:3], "--data", plain), "holds no labels to count by")
    refused(call("sweep", folder / "Pair.pt", *given(folder, "Pair")[1:], "-o", tmp_path / "out"), "give --calib, too")
    tune = ("finetune", *given(folder, "Pair"), "-o", tmp_path / "out")
    refused(call(*tune), "give --val tensors:FILE, or --no-val")
    refused(call(*tune, "--val", "digits"), "give tensors for both, or images")
    refused(call(*tune, "--no-val", "--augment", "flip"), "--augment is for images")
    refused(call("bench", folder / "Pair-shared", *own(folder, "Pair"), "--data", "digits"), "give tensors:FILE")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "takes"), [("Pair", "several inputs (left, right)"), ("Tones", "signals"), ("Scan", "volumes")])
def test_verbs_without_tensors_say_what_they_need(folder: Path, tmp_path: Path, name: str, takes: str) -> None:
    dense, shared = (folder / f"{name}.pt", *own(folder, name)), (folder / f"{name}-shared", *own(folder, name))
    for verb, option in (
        (("convert", *dense, "-o", tmp_path / "out"), "--calib"),
        (("inspect", *dense), "--data"),
        (("export", *shared, "-o", tmp_path / "net.pt2"), "--data"),
        (("report", *shared, "-o", tmp_path / "out.html"), "--data"),
        (("round", *shared, "--store", "int8", "-o", tmp_path / "out"), "--calib"),
        (("eval", *dense, "--data", "digits"), "--data"),
    ):
        result = call(*verb)
        refused(result, f"{name} takes {takes}")
        assert f"give samples of them as {option} tensors:FILE" in result.stderr
    refused(call("export", folder / f"{name}-shared", "-o", tmp_path / "net.pt2"), "--arch FILE.py:FACTORY")
    assert list(tmp_path.iterdir()) == []


def test_too_few_samples_for_a_report_are_told_of_by_that_alone(folder: Path, tmp_path: Path) -> None:
    convert = ("convert", folder / "Tones.pt", *own(folder, "Tones"), "--calib", f"tensors:{folder / 'Tones.npz'}")
    said = call(*convert, "--method", "basis", "--no-repair", "-o", tmp_path / "out").output
    assert "agreement not measured: only 80 images" in said and "can be compared" not in said


def test_a_stock_network_takes_normalised_images_as_tensors(tmp_path: Path) -> None:
    """Of another size than its own, at which its MACs are then counted."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(70, 1, 10, 12)))
    out = tmp_path / "out"
    reported("convert", "timm:digits_resnet", "--calib", f"tensors:{tmp_path / 'x.npy'}", "--method", "basis", "-o", out)
    assert reported("export", out, "-o", tmp_path / "net.pt2")["input_shape"] == [None, 1, 10, 12]
    claims = {claim["name"]: claim for claim in reported("verify", out)["claims"]}
    assert claims["macs"]["found"] == claims["macs"]["claimed"] > 0
    shutil.rmtree(out)


def test_labels_are_compared_with_one_output_and_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(
        "from torch import nn\n\n\nclass Two(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.kind, self.age = nn.Linear(4, 3), nn.Linear(4, 2)\n\n"
        "    def forward(self, x):\n        return {'kind': self.kind(x), 'age': self.age(x)}\n"
    )
    random = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", x=random.normal(size=(9, 4)).astype("f4"), labels=random.integers(0, 3, 9))
    space: dict[str, Any] = {}
    exec((tmp_path / "two.py").read_text(), space)
    torch.save(space["Two"]().state_dict(), tmp_path / "two.pt")
    given = ("eval", tmp_path / "two.pt", "--arch", f"{tmp_path / 'two.py'}:Two", "--data", f"tensors:{tmp_path / 'x.npz'}")
    assert reported(*given)["output"] == "kind"
    assert "the output kind alone" in call(*given).stdout


def test_figures_do_not_depend_on_the_order_of_the_images(tmp_path: Path) -> None:
    """How much outputs vary is told by some of them, and many data are sorted."""
    (tmp_path / "line.py").write_text("from torch import nn\n\n\ndef make():\n    return nn.Linear(3, 2)\n")
    torch.save({"weight": torch.eye(3)[:2], "bias": torch.zeros(2)}, tmp_path / "a.pt")
    torch.save({"weight": 0.9 * torch.eye(3)[:2], "bias": torch.zeros(2)}, tmp_path / "b.pt")
    x = np.random.default_rng(0).normal(size=(900, 3)).astype("f4")
    np.save(tmp_path / "plain.npy", x)
    np.save(tmp_path / "sorted.npy", x[np.argsort(x[:, 0])])
    start = ("eval", tmp_path / "b.pt", "--arch", f"{tmp_path / 'line.py'}:make", "--against", tmp_path / "a.pt")
    told = [
        reported(*start, "--outputs", "regression", "--data", f"tensors:{tmp_path / name}.npy")["outputs"][0]["value"]
        for name in ("plain", "sorted")
    ]
    assert told[0] == pytest.approx(0.1, rel=0.08) and told[1] == pytest.approx(told[0], rel=0.08)
