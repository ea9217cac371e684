"""Networks of ultralytics: by name, from a trained file, converted, saved, and back in its own YOLO. Needs `sharefold[yolo]`."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call
from doc_blocks import ROOT, blocks
from PIL import Image
from torch import Tensor, nn

import sharefold
from sharefold.architectures import yolo
from sharefold.architectures.bases import base_of
from sharefold.architectures.build import build_base
from sharefold.errors import SharefoldError

ultralytics = pytest.importorskip("ultralytics")
IMAGES = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def trained(model: nn.Module) -> nn.Module:
    """With statistics and biases as a trained one may have them."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2), module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def test_a_first_network_on_the_meta_device_leaves_nothing_there() -> None:
    """Tensors that the package's classes hold are made when it is imported, here by a process of its own."""
    code = (
        "import copy, torch; from sharefold.architectures.build import build_base, build_on_meta\n"
        "base = {'library': 'ultralytics', 'name': 'yolov8n', 'kwargs': {}}\n"
        "assert all(p.is_meta for p in build_on_meta(base).parameters())\n"
        "model = build_base(base); model(torch.rand(1, 3, 64, 64)); copy.deepcopy(model).to('cpu')\n"
        "from ultralytics.nn.modules.head import Detect; assert not Detect.anchors.is_meta"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def detector() -> Any:
    """ultralytics' own object around YOLOv8n."""
    found = ultralytics.YOLO("yolov8n.yaml")
    trained(found.model)
    return found


@pytest.fixture(scope="module")
def file(detector: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As its trainer writes it: a pickle of the network in halves."""
    path = tmp_path_factory.mktemp("yolo") / "best.pt"
    torch.save({"epoch": 3, "best_fitness": None, "model": copy.deepcopy(detector.model).half(), "ema": None}, path)
    return path


@pytest.fixture(scope="module")
def converted(detector: Any) -> nn.Module:
    model = copy.deepcopy(detector.model)
    cal = sharefold.calibrate(model, IMAGES)
    sharefold.convert_(model, sharefold.plan(model, "60%", cal, method=["spatial", "svd"]), cal, repair=False)
    return model


def boxes(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IMAGES)[0]


def test_networks_are_known_by_their_sizes() -> None:
    assert {"yolov8n", "yolov8x-seg", "yolo11s", "yolo11n-cls", "yolov8n-pose"} <= set(yolo.names())
    assert "yolov8" not in yolo.names()


@pytest.mark.parametrize(("name", "side"), [("yolov8n", 640), ("yolo11n-seg", 640), ("yolov8n-cls", 224)])
def test_named(name: str, side: int, capfd: pytest.CaptureFixture[str]) -> None:
    source = sharefold.open_source(f"yolo:{name}:num_classes=3", pretrained=False)
    assert source.kind == "ultralytics" and source.base == {"library": "ultralytics", "name": name, "kwargs": {"num_classes": 3}}
    assert source.pretrained_cfg["input_size"] == (3, side, side) and source.pretrained_cfg["std"] == (1.0, 1.0, 1.0)
    assert base_of(source.model) == source.base
    assert type(build_base(source.base)) is type(source.model)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("yolo:yolov8q", "unknown model yolo:yolov8q: did you mean yolov8"),
        ("yolo:yolov8n", "give the trained file, yolo:yolov8n.pt --trust-pickle"),
        ("yolo:absent.pt", "absent.pt does not exist"),
        ("yolo:best.pt:num_classes=3", "a file knows its architecture"),
    ],
)
def test_refusals(source: str, words: str) -> None:
    with pytest.raises(SharefoldError, match=words):
        sharefold.open_source(source)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("weight=2", "unexpected arguments weight"), ("num_classes=0", "from 1 to 65536"),
        ("num_classes=16000000", "from 1 to 65536"), ("in_chans=5000", "from 1 to 256"), ("in_chans=True", "from 1 to 256"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments: str, words: str) -> None:
    with pytest.raises(SharefoldError, match=words):
        sharefold.open_source(f"yolo:yolov8n:{arguments}", pretrained=False)


def test_configurations_in_the_current_folder_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's own reader takes them first, and evaluates what they say of activations."""
    monkeypatch.chdir(tmp_path)
    shipped, _ = yolo._shipped()["yolov8n-cls"]
    bad = 'activation: "__import__(\'pathlib\').Path(\'ran\').touch() or torch.nn.SiLU()"\n'
    for name in ("yolov8n-cls.yaml", "yolov8-cls.yaml"):
        Path(name).write_text(shipped.read_text() + bad)
    model = sharefold.open_source("yolo:yolov8n-cls:num_classes=3", pretrained=False).model
    assert base_of(model) is not None and not Path("ran").exists()


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    with pytest.raises(SharefoldError, match="needs ultralytics: pip install ultralytics"):
        sharefold.open_source("yolo:yolov8n", pretrained=False)


def test_a_trained_file_opens_with_consent_alone(file: Path, detector: Any) -> None:
    with pytest.raises(SharefoldError, match="--trust-pickle"):
        sharefold.open_source(f"yolo:{file}")
    for given in (f"yolo:{file}", str(file)):
        source = sharefold.open_source(given, trust_pickle=True)
        assert source.base == {"library": "ultralytics", "name": "yolov8n", "kwargs": {"num_classes": 80}}
        assert source.pretrained_cfg["input_size"] == (3, 640, 640)
        assert next(source.model.parameters()).dtype == torch.float32
        assert torch.allclose(boxes(source.model), boxes(detector.model), rtol=2e-2, atol=0.5)


def test_a_converted_one_is_saved_and_loaded(converted: nn.Module, detector: Any, tmp_path: Path) -> None:
    before = sum(p.numel() for p in detector.model.parameters())
    assert sum(p.numel() for p in converted.parameters()) <= 0.6 * before
    sharefold.save(converted, tmp_path / "net")
    loaded = sharefold.load(tmp_path / "net")
    assert type(loaded) is type(detector.model) and torch.equal(boxes(loaded), boxes(converted))
    assert loaded.task == "detect" and torch.equal(loaded.stride, detector.model.stride)


def test_it_goes_back_into_its_own_yolo(converted: nn.Module, tmp_path: Path) -> None:
    """Which merges BatchNorms into convolutions before it predicts."""
    expected = boxes(converted)
    sharefold.save(converted, tmp_path / "net")
    user = ultralytics.YOLO("yolov8n.yaml")
    names = user.model.names
    user.model = sharefold.load(tmp_path / "net")
    user.model.names = names
    results = user.predict(IMAGES[:2], verbose=False, conf=0.0001, imgsz=64)
    assert len(results) == 2 and results[0].names == names
    merged = copy.deepcopy(converted).fuse(verbose=False)
    assert merged.is_fused() and not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules())
    assert torch.allclose(boxes(merged), expected, rtol=1e-3, atol=1e-2)


def test_the_page_runs(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("best.pt").write_bytes(file.read_bytes())
    Path("pictures").mkdir()
    for index, image in enumerate(IMAGES):
        Image.fromarray((255 * image).byte().permute(1, 2, 0).numpy()).save(f"pictures/{index}.png")
    page = ROOT / "docs" / "yolo.md"
    (line,) = (line for text in blocks(page, "sh") for line in text.splitlines())
    shorter = ("--input-size", "3,64,64", "--method", "svd", "--no-repair")
    done = call(*line.split()[1:], *shorter)
    assert done.exit_code == 0, done.output
    seen: dict[str, Any] = {"images": IMAGES}
    for code in blocks(page, "py"):
        exec(code.replace('"60%", cal', '"60%", cal, method="svd"').replace(", cal)", ", cal, repair=False)"), seen)
        assert len(seen["results"]) == len(IMAGES)
        assert sum(p.numel() for p in seen["yolo"].model.parameters()) < 0.61 * 3_157_200
