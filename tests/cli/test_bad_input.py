"""Bad input, as users bring it: one clear line, exit 2, nothing written, nothing run."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from command_line import call
from safetensors.torch import save_file
from torch import nn

import sharefold.models  # noqa: F401  (registers the network)

NET = "timm:digits_resnet"


class Trap:
    """Unpickling it writes a file; no test should find that file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


class OwnNet(nn.Sequential):
    """A module of a class that only this file knows."""


def convert(folder: Path, source: object, *arguments: object) -> str:
    """The one line of a refused conversion, after checking that it wrote nothing."""
    before = sorted(folder.rglob("*"))
    result = call("convert", source, "-o", folder / "out", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr and sorted(folder.rglob("*")) == before
    return result.stderr


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in timm.create_model("digits_resnet").state_dict().items()}


def test_missing_file_and_folder_without_a_model(tmp_path: Path) -> None:
    assert "missing.pt" in convert(tmp_path, tmp_path / "missing.pt")
    (tmp_path / "empty").mkdir()
    assert "empty" in convert(tmp_path, tmp_path / "empty")


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
@pytest.mark.parametrize("keep", [0, 10, 1000, 100_000])
def test_truncated_checkpoints(tmp_path: Path, state: dict[str, torch.Tensor], name: str, keep: int) -> None:
    path = tmp_path / name
    torch.save(state, path) if name.endswith(".pt") else save_file(state, path)
    path.write_bytes(path.read_bytes()[:keep])
    assert name in convert(tmp_path, path)


@pytest.mark.parametrize("name", ["noise.pt", "noise.th", "noise.safetensors", "noise"])
def test_random_bytes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(np.random.default_rng(0).bytes(20_000))
    assert name in convert(tmp_path, tmp_path / name)


def test_a_truncated_shared_network(shared_digits: Path, tmp_path: Path) -> None:
    shutil.copytree(shared_digits, tmp_path / "net")
    file = tmp_path / "net" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    for verb in (["eval", "--data", "digits"], ["expand", "-o", str(tmp_path / "dense.pt")], ["inspect"]):
        result = call(verb[0], tmp_path / "net", *verb[1:])
        assert result.exit_code == 2 and "damaged" in result.stderr and result.stderr.count("\n") == 1, result.output
    assert not (tmp_path / "dense.pt").exists()


def test_pickled_modules_are_refused_with_what_they_would_run(tmp_path: Path) -> None:
    torch.save(OwnNet(nn.Conv2d(3, 4, 3)), tmp_path / "module.pt")
    line = convert(tmp_path, tmp_path / "module.pt")
    assert "OwnNet" in line and "--trust-pickle" in line
    torch.save({"state_dict": Trap(tmp_path / "sprung")}, tmp_path / "trap.pt")
    line = convert(tmp_path, tmp_path / "trap.pt")
    assert "touch" in line or "Path" in line
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    convert(tmp_path, tmp_path / "old.pth")
    assert not (tmp_path / "sprung").exists()


def test_a_state_dict_of_no_known_architecture_names_the_nearest(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    changed = {name: tensor for name, tensor in state.items() if not name.startswith("layer1.2")}
    changed["extra.weight"] = torch.zeros(3, 3)
    save_file(changed, tmp_path / "other.safetensors")
    line = convert(tmp_path, tmp_path / "other.safetensors")
    assert "digits_resnet" in line and "extra.weight" in line and "layer1.2" in line, line
    assert line.count("timm:") + line.count("tv:") >= 3, line


def test_an_architecture_that_the_weights_do_not_fit(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    save_file(state, tmp_path / "net.safetensors")
    assert "resnet20_cifar" in convert(tmp_path, tmp_path / "net.safetensors", "--arch", "timm:resnet20_cifar")
    assert "digits_resnt" in convert(tmp_path, "timm:digits_resnt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(tmp_path: Path, state: dict[str, torch.Tensor], value: float) -> None:
    broken = {name: tensor.clone() for name, tensor in state.items()}
    broken["layer2.1.conv1.weight"][0, 0, 0, 0] = value
    save_file(broken, tmp_path / "net.safetensors")
    assert "layer2.1.conv1.weight" in convert(tmp_path, tmp_path / "net.safetensors")


def test_budgets_below_the_floor_name_it(tmp_path: Path) -> None:
    images = ("--calib", "digits", "--calib-count", 20)
    line = convert(tmp_path, NET, *images, "--method", "average", "--budget", "5%", "-q")
    assert "the floor is 38,194 parameters (19.2%)" in line
    line = convert(tmp_path, NET, *images, "--method", "svd", "--exclude", "layer[23]", "--budget", "9%", "-q")
    assert line.rstrip().endswith(". 8 layers stay as they are: 8 x excluded")
    assert "above" in convert(tmp_path, NET, "--keep-agreement", "0")


@pytest.mark.parametrize(
    ("shape", "words"), [((4, 8, 8, 3), "3x8x8"), ((4, 9, 9, 1), "1x9x9"), ((0, 8, 8, 1), ""), ((4, 8), "")]
)
def test_calibration_images_that_do_not_fit(tmp_path: Path, shape: tuple[int, ...], words: str) -> None:
    np.savez(tmp_path / "c.npz", train_x=np.zeros(shape, dtype=np.uint8))
    assert words in convert(tmp_path, NET, "--calib", f"npz:{tmp_path / 'c.npz'}")


def test_calibration_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "c.npz").write_bytes(b"PK\x03\x04 no zip")
    convert(tmp_path, NET, "--calib", f"npz:{tmp_path / 'c.npz'}")
    np.savez(tmp_path / "object.npz", train_x=np.array([{"a": 1}], dtype=object))
    convert(tmp_path, NET, "--calib", f"npz:{tmp_path / 'object.npz'}")
    (tmp_path / "folder").mkdir()
    convert(tmp_path, NET, "--calib", f"imagefolder:{tmp_path / 'folder'}")


@pytest.mark.parametrize(
    "text",
    [
        '{"groups": [{"name": "g", "method": "basis", "members": ["nowhere", "lost"], "options": {"rank": 2}}]}',
        '{"groups": [{"name": "g", "method": "magic", "members": ["layer1.0.conv1"]}]}',
        '{"groups": [{"name": "g", "method": "basis", "members": ["layer1.0.conv1"], "options": {"rank": -2}}]}',
        '{"groups": [{"name": "g", "method": "svd", "members": ["layer1.0.conv1", "layer2.1.conv1"],'
        ' "options": {"rank": 2}}]}',
        '{"groups": [{"name": "g", "method": "basis", "members": ["layer1.0.bn1"], "options": {"rank": 2}}]}',
        '{"groups": [], "plan_version": 99}',
        '{"groups": 7}',
    ],
)
def test_plans_that_do_not_fit(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    convert(tmp_path, NET, "--calib", "digits", "--calib-count", 20, "--plan", tmp_path / "plan.json")


def test_existing_and_unwritable_outputs(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "exists: pass --force" in convert(tmp_path, NET)
    assert "did not write" in convert(tmp_path, NET, "--force")
    result = call("convert", NET, "-o", "/proc/sharefold/out")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1


def test_a_teacher_of_no_known_architecture_is_told_by_its_own_option(tmp_path: Path) -> None:
    torch.save({"layer.weight": torch.ones(3, 3)}, tmp_path / "teacher.pt")
    result = call("finetune", NET, "--data", "digits", "--teacher", tmp_path / "teacher.pt", "-o", tmp_path / "out")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
    assert result.stderr.startswith("error: --teacher: ") and "with --teacher-arch" in result.stderr
