"""``sharefold eval`` against masks, target images and annotated boxes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call, refused, reported
from torch import Tensor, nn
from truth_nets import CFG, STEP, Says, block_box, block_picture, coco, colours, detector, enlarged, grey, save

from sharefold.sources import Source
from sharefold_cli.source import SourceOptions


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> dict[str, nn.Module]:
    """What SOURCE is, under "model"."""
    given: dict[str, nn.Module] = {}

    def opened(self: SourceOptions, look: object = None) -> Source:
        return Source(given["model"], {}, dict(CFG), self.source, "file")

    monkeypatch.setattr(SourceOptions, "open", opened)
    return given


def block_pictures(folder: Path) -> str:
    for name in ("a", "b", "c"):
        save(grey(block_picture()), folder / "pictures" / f"{name}.png")
    return f"imagefolder:{folder / 'pictures'}"


def test_masks(tmp_path: Path, network: dict[str, nn.Module]) -> None:
    network["model"] = Says(lambda x: torch.stack([0.5 - x[:, 0], x[:, 0] - 0.5], 1))
    data = block_pictures(tmp_path)
    for name in "abc":
        truth = save((block_picture() > 0).astype(np.uint8), tmp_path / "masks" / f"{name}.png").parent
    options = ("net.pt", "--data", data, "--truth", truth, "--outputs", "logits:axis=1")
    report = reported("eval", *options, "--limit", 2)
    assert report["task"] == "masks" and report["images"] == 2 and report["output"] == "output" and report["seconds"] > 0
    assert report["figures"] == [
        {"metric": "miou", "value": 1.0, "interval": [1.0, 1.0]},
        {"metric": "pixel_accuracy", "value": 1.0, "interval": [1.0, 1.0]},
    ]
    assert report["parts"][1] == {"id": 1, "name": "", "metric": "iou", "value": 1.0} and len(report["parts"]) == 2
    text = call("eval", *options).stdout
    assert "masks of output" in text and "100.00% (100.00% to 100.00%)" in text and "iou of 1" in text
    refused(call("eval", "net.pt", "--data", data, "--truth", truth), "say what one is, such as --outputs logits:axis=1")
    refused(call("eval", *options, "--against", "other.pt"), "--truth and --against are two questions")
    refused(call("eval", "net.pt", "--data", data, "--outputs", "binary"), "give one of them, too")
    refused(call("eval", "net.pt", "--data", data, "--truth", tmp_path / "no"), "no such folder or file")


def test_images_larger_than_the_pictures(tmp_path: Path, network: dict[str, nn.Module]) -> None:
    network["model"] = Says(enlarged)
    pixels = np.random.default_rng(0).integers(0, 250, (20, 20, 3), dtype=np.uint8)
    save(pixels, tmp_path / "pictures" / "a.png")
    save(pixels.repeat(2, 0).repeat(2, 1) + np.uint8(5), tmp_path / "large" / "a.png")
    report = reported("eval", "net.pt", "--data", f"imagefolder:{tmp_path / 'pictures'}", "--truth", tmp_path / "large")
    assert report["task"] == "images" and report["figures"][0]["value"] == pytest.approx(20 * np.log10(51), abs=1e-3)
    assert [figure["metric"] for figure in report["figures"]] == ["psnr", "ssim"] and report["figures"][0]["interval"] is None
    assert report["scale"].startswith("values were read as 0 to 1 (they lie between ")
    options = ("net.pt", "--data", f"imagefolder:{tmp_path / 'pictures'}", "--truth", tmp_path / "large")
    assert "values were read as 0 to 1 (they" in call("eval", *options).output
    assert "values were read as 0 to 255 (given)" in call("eval", *options, "--outputs", "image:scale=255").output


def test_boxes(tmp_path: Path, network: dict[str, nn.Module]) -> None:
    network["model"] = detector(2)
    data = block_pictures(tmp_path)
    truth = coco(tmp_path, {f"{name}.png": [(2, block_box())] for name in "abc"}, [1, 2])
    report = reported("eval", "net.pt", "--data", data, "--truth", truth)
    assert report["task"] == "boxes" and report["parts"] == [{"id": 2, "name": "kind 2", "metric": "map", "value": 1.0}]
    assert report["figures"][1] == {"metric": "map50", "value": 1.0, "interval": None}
    assert "map of 2 (kind 2)" in call("eval", "net.pt", "--data", data, "--truth", truth).stdout
    long = truth.read_text()
    truth.write_text(long.replace("kind 2", "x" * 3000))
    assert f"map of 2 ({'x' * 80}...)" in call("eval", "net.pt", "--data", data, "--truth", truth).stdout.replace("\n", "")
    text = long.replace('"category_id": 2', '"category_id": 3')
    truth.write_text(text)
    refused(call("eval", "net.pt", "--data", data, "--truth", truth), "category 3, which is none of the file's categories")


def test_masks_in_an_npz_need_no_other_place(tmp_path: Path, network: dict[str, nn.Module]) -> None:
    net = colours(3)
    network["model"] = Says(lambda x: net(x).softmax(1))
    mask = np.random.default_rng(0).integers(0, 3, (5, 20, 20))
    np.savez(tmp_path / "set.npz", val_x=np.stack([grey(one * STEP) for one in mask]), val_y=mask)
    report = reported("eval", "net.pt", "--data", f"npz:{tmp_path / 'set.npz'}")
    assert report["task"] == "masks" and report["figures"][0]["value"] == 1.0 and report["images"] == 5

    def shifted(x: Tensor) -> Tensor:
        return net(x.roll(1, 2)).softmax(1)

    network["model"] = Says(shifted)
    low = reported("eval", "net.pt", "--data", f"npz:{tmp_path / 'set.npz'}")["figures"][0]
    assert low["interval"][0] < low["value"] < low["interval"][1] < 0.5
    against = reported("eval", "net.pt", "--against", "other.pt", "--data", f"npz:{tmp_path / 'set.npz'}")
    assert against["outputs"][0]["value"] == 1.0
