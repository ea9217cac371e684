"""Networks against the truth: figures by hand, geometry, numbers of classes, and a line for every bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index
from truth_nets import (
    BLOCK,
    CFG,
    STEP,
    Says,
    block_box,
    block_picture,
    coco,
    colours,
    detector,
    enlarged,
    grey,
    opened,
    raw_detector,
    save,
)

import sharefold
import sharefold.data.coco
from sharefold.data import open_data, with_truth
from sharefold.data.coco import Objects
from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.outputs.found_again import are_corners
from sharefold.outputs.intervals import bootstrap
from sharefold.tasks.detections import Found, class_ids
from sharefold.tasks.truth_scores import BoxScores, MaskScores

CLASSES = "logits:axis=1"


def small(height: int, width: int, **more: Any) -> dict[str, Any]:
    """A configuration of pictures that are not resized."""
    return {**CFG, "input_size": (3, height, width), **more}


def masks(folder: Path, *pairs: tuple[Any, Any]) -> Path:
    """Pictures that ``colours`` reads as the first of each pair, and the second as their masks."""
    for index, (said, true) in enumerate(pairs):
        save(grey(np.array(said) * STEP), folder / "pictures" / f"{index}.png")
        save(np.array(true, dtype=np.uint8), folder / "masks" / f"{index}.png")
    return folder / "masks"


class TestMasks:
    def test_by_hand(self, tmp_path: Path) -> None:
        truth = masks(tmp_path, ([[0, 1], [1, 1]], [[0, 0], [1, 255]]), ([[0, 0], [0, 0]], [[0, 0], [0, 0]]))
        found = sharefold.evaluate_task(colours(4), opened(tmp_path, truth, small(2, 2)), outputs=CLASSES)
        # Class 0: 5 of 6; class 1: 1 of 2; the others occur nowhere. 6 of 7 pixels that are not void are right.
        assert found["miou"] == pytest.approx((5 / 6 + 1 / 2) / 2) and found["pixel_accuracy"] == pytest.approx(6 / 7)
        assert [(part.id, part.metric) for part in found.parts] == [(0, "iou"), (1, "iou")]
        assert [part.value for part in found.parts] == pytest.approx([5 / 6, 1 / 2])
        assert found.task == "masks" and found.output == "output" and found.images == 2
        low, high = found.figures[0].interval or (1.0, 0.0)
        assert low == pytest.approx(0.5) and high == 1.0  # the first picture twice, the second twice

    def test_as_torchmetrics_counts(self) -> None:
        said, true = torch.randint(5, (6, 9, 7)), torch.randint(5, (6, 9, 7))
        true[torch.rand(true.shape) < 0.1] = 255
        said[said == 3], true[true == 3] = 0, 0
        scores = MaskScores(5)
        for one, mask in zip(said, true, strict=True):
            scores.add(one, mask, "")
        (miou, accuracy), parts = scores.figures(0)
        options: dict[str, Any] = {"num_classes": 5, "ignore_index": 255}
        assert miou.value == pytest.approx(float(multiclass_jaccard_index(said, true, average="macro", **options)))
        assert accuracy.value == pytest.approx(float(multiclass_accuracy(said, true, average="micro", **options)))
        assert [part.id for part in parts] == [0, 1, 2, 4]
        assert miou.interval is not None and miou.interval[0] < miou.value < miou.interval[1]

    def test_a_wide_picture_is_seen_whole_and_decided_at_its_own_size(self, tmp_path: Path) -> None:
        mask = np.zeros((20, 40), np.uint8)
        mask[:, :4], mask[10:, 30:] = 1, 1  # what a crop of the middle would cut off
        save(grey(mask * STEP), tmp_path / "pictures" / "wide.png")
        truth = save(mask, tmp_path / "masks" / "wide.png").parent
        found = sharefold.evaluate_task(colours(2), opened(tmp_path, truth), outputs=CLASSES)
        assert found["miou"] == found["pixel_accuracy"] == 1.0 and found.figures[0].interval is None

    def test_small_maps_are_enlarged_before_they_are_decided_by(self, tmp_path: Path) -> None:
        save(grey(np.zeros((4, 4))), tmp_path / "pictures" / "a.png")
        mask = np.array([[0, 0, 0, 1]] * 4, np.uint8)
        truth = save(mask, tmp_path / "masks" / "a.png").parent
        margins = torch.tensor([[-3.0, 1.0]]).expand(2, 2)  # at 4 wide: -3, -2, 0, 1 and one in between that is below 0
        net = Says(lambda x: torch.stack([-margins, margins]).expand(len(x), 2, 2, 2))
        found = sharefold.evaluate_task(net, opened(tmp_path, truth, small(4, 4)), outputs=CLASSES)
        # Nearest would say 0 0 1 1. The third of the four lies at -3 + 4 * 0.75 = 0, which no class wins: the first is taken.
        assert found["miou"] == 1.0

    @pytest.mark.parametrize("yes", [1, 255])
    def test_yes_and_no(self, tmp_path: Path, yes: int) -> None:
        truth = masks(tmp_path, ([[0, 1], [1, 1]], [[0, 0], [yes, yes]]))
        net = Says(lambda x: x[:, :1] * 255 / STEP - 0.5)
        found = sharefold.evaluate_task(net, opened(tmp_path, truth, small(2, 2)), outputs="binary")
        assert [part.value for part in found.parts] == pytest.approx([1 / 2, 2 / 3])
        shares = Says(lambda x: (x[:, 0] * 255 / STEP - 0.5).sigmoid())
        again = sharefold.evaluate_task(shares, opened(tmp_path, truth, small(2, 2)), outputs="binary:sigmoid")
        assert again.parts == found.parts

    def test_of_yes_and_no_255_is_void_beside_1(self, tmp_path: Path) -> None:
        truth = masks(tmp_path, ([[0, 1], [1, 1]], [[0, 255], [1, 1]]))
        net = Says(lambda x: x[:, :1] * 255 / STEP - 0.5)
        assert sharefold.evaluate_task(net, opened(tmp_path, truth, small(2, 2)), outputs="binary")["miou"] == 1.0

    def test_class_numbers_and_probabilities_need_no_word(self, tmp_path: Path) -> None:
        truth = masks(tmp_path, ([[0, 1], [2, 1]], [[0, 1], [2, 2]]), ([[2, 2], [0, 1]], [[2, 2], [0, 1]]))
        pairs = opened(tmp_path, truth, small(2, 2))
        net = colours(3)
        expected = (1 + 2 / 3 + 3 / 4) / 3
        assert sharefold.evaluate_task(Says(lambda x: net(x).argmax(1)), pairs)["miou"] == pytest.approx(expected)
        assert sharefold.evaluate_task(Says(lambda x: net(x).softmax(1)), pairs)["miou"] == pytest.approx(expected)
        last = Says(lambda x: {"out": net(x).softmax(1).movedim(1, 3), "aux": net(-x)})
        found = sharefold.evaluate_task(last, pairs, outputs=["out:probabilities:axis=3", "aux:logits:axis=1"])
        assert found.output == "out" and found["miou"] == pytest.approx(expected)

    def test_a_palette_holds_class_numbers(self, tmp_path: Path) -> None:
        truth = masks(tmp_path, ([[0, 1], [1, 1]], [[0, 1], [1, 1]]))
        from PIL import Image

        with Image.open(truth / "0.png") as image:
            image.putpalette([200, 0, 0, 0, 200, 0])
            image.save(truth / "0.png")
        assert sharefold.evaluate_task(colours(2), opened(tmp_path, truth, small(2, 2)), outputs=CLASSES)["miou"] == 1.0

    def test_a_folder_of_the_split_and_names_in_two_folders(self, tmp_path: Path) -> None:
        for folder, value in (("a", 0), ("b", 1)):
            save(grey(np.full((2, 2), value * STEP)), tmp_path / "pictures" / "val" / folder / "0.jpeg")
            save(np.full((2, 2), value, np.uint8), tmp_path / "masks" / "val" / folder / "0.png")
            save(np.full((2, 2), 7, np.uint8), tmp_path / "masks" / "train" / folder / "0.png")
        found = sharefold.evaluate_task(colours(2), opened(tmp_path, tmp_path / "masks", small(2, 2)), outputs=CLASSES)
        assert found["miou"] == 1.0 and found.images == 2


class TestImages:
    def test_psnr_by_hand(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        for name, off in (("a", 10), ("b", 20)):
            pixels = rng.integers(30, 200, (12, 16, 3), dtype=np.uint8)
            save(pixels, tmp_path / "pictures" / f"{name}.png")
            save(pixels + np.uint8(off), tmp_path / "clean" / f"{name}.png")
        found = sharefold.evaluate_task(Says(lambda x: x * 1), opened(tmp_path, tmp_path / "clean", small(12, 16)))
        each = [20 * np.log10(255 / off) for off in (10, 20)]
        assert found.task == "images" and found["psnr"] == pytest.approx(sum(each) / 2, abs=1e-3)
        assert found.figures[0].interval == pytest.approx((each[1], each[0]), abs=1e-3)
        assert 0.9 < found["ssim"] < 1

    @pytest.mark.parametrize(
        ("what", "cfg"),
        [
            ("from 0 to 1", {}), ("from 0 to 255", {}), ("normalised", {"mean": (0.5,) * 3, "std": (0.25,) * 3}),
            ("from 0 to 1", {"mean": (0.4,) * 3, "std": (0.2,) * 3}),
        ],
    )  # fmt: skip
    def test_an_image_may_be_made_in_three_scales(self, tmp_path: Path, what: str, cfg: dict[str, Any]) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        save(pixels, tmp_path / "pictures" / "a.png")
        save(pixels, tmp_path / "clean" / "a.bmp")
        mean, std = cfg.get("mean", [0.0])[0], cfg.get("std", [1.0])[0]
        nets = {
            "from 0 to 1": Says(lambda x: x * std + mean),
            "from 0 to 255": Says(lambda x: x * 255),
            "normalised": Says(lambda x: +x),
        }
        found = sharefold.evaluate_task(nets[what], opened(tmp_path, tmp_path / "clean", small(12, 12, **cfg)), outputs="image")
        assert found["psnr"] > 120 and found["ssim"] == pytest.approx(1)

    def test_an_enlarged_image(self, tmp_path: Path) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
        save(pixels, tmp_path / "pictures" / "a.png")
        save(pixels.repeat(2, 0).repeat(2, 1), tmp_path / "large" / "a.png")
        found = sharefold.evaluate_task(Says(enlarged), opened(tmp_path, tmp_path / "large", small(8, 6)))
        assert found["psnr"] == 200 and found["ssim"] == pytest.approx(1)
        with pytest.raises(SharefoldError, match="its target is 12x16 of 6x8 pixels, the network makes 6x8 of 6x8"):
            sharefold.evaluate_task(Says(lambda x: +x), opened(tmp_path, tmp_path / "large", small(8, 6)))

    def test_a_picture_of_another_size_is_resized_with_its_target_and_that_is_said(self, tmp_path: Path) -> None:
        smooth = grey(np.linspace(0, 255, 80)[None].repeat(40, 0))
        save(smooth[::2, ::2], tmp_path / "pictures" / "a.png")
        save(smooth, tmp_path / "large" / "a.png")
        with pytest.warns(SharefoldWarning, match="1 pictures were resized to 20x20, and their targets with them"):
            found = sharefold.evaluate_task(Says(enlarged), opened(tmp_path, tmp_path / "large"))
        assert found["psnr"] > 25

    def test_of_images_under_11_pixels_there_is_no_ssim(self, tmp_path: Path) -> None:
        for folder in ("pictures", "clean"):
            save(grey(np.arange(100).reshape(10, 10)), tmp_path / folder / "a.png")
        found = sharefold.evaluate_task(Says(lambda x: +x), opened(tmp_path, tmp_path / "clean", small(10, 10)))
        assert [figure.metric for figure in found.figures] == ["psnr"]


class TestBoxes:
    def pictures(self, folder: Path, count: int = 2) -> list[str]:
        names = [f"{index}.png" for index in range(count)]
        for name in names:
            save(grey(block_picture()), folder / "pictures" / name)
        return names

    def test_boxes_are_scaled_back_to_the_picture(self, tmp_path: Path) -> None:
        names = self.pictures(tmp_path)
        truth = coco(tmp_path, {name: [(7, block_box())] for name in names}, [3, 7])
        found = sharefold.evaluate_task(detector(7), opened(tmp_path, truth))
        assert found.task == "boxes" and found.output == "detections" and found["map"] == found["map50"] == 1.0
        assert [(part.id, part.name, part.value) for part in found.parts] == [(7, "kind 7", 1.0)]
        assert [figure.interval for figure in found.figures] == [None, None]
        other = coco(tmp_path, {name: [(7, [x / 2 for x in block_box()])] for name in names}, [3, 7])
        assert sharefold.evaluate_task(detector(7), opened(tmp_path, other))["map50"] == 0.0

    def test_categories_by_hand(self, tmp_path: Path) -> None:
        names = self.pictures(tmp_path, 3)
        boxes = {names[0]: [(3, block_box())], names[1]: [(3, block_box()), (9, [0, 0, 5, 5])], names[2]: []}
        found = sharefold.evaluate_task(detector(3), opened(tmp_path, coco(tmp_path, boxes, [3, 9])))
        # Three boxes of the same score, two of them right; in the picture without an object there is one that is wrong.
        assert [part.id for part in found.parts] == [3, 9] and found.parts[1].value == 0.0
        assert 0.6 < found.parts[0].value <= 1.0 and found["map"] == pytest.approx(found.parts[0].value / 2)

    def test_map_by_hand(self) -> None:
        scores = BoxScores({1: "a"})
        objects = Objects(torch.tensor([[0.0, 0, 100, 100]]), torch.tensor([1]), torch.tensor([0]))
        scores.add(Found(torch.tensor([[0.0, 0, 100, 72]]), torch.tensor([0.5]), torch.tensor([1])), objects)
        figures, _ = scores.figures(0)
        assert [figure.value for figure in figures] == pytest.approx([0.5, 1.0])  # right from an IoU of 0.5 to 0.7, five of ten

    def test_a_crowd_is_neither_right_nor_wrong(self) -> None:
        scores = BoxScores({1: "a"})
        boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 90, 90]])
        objects = Objects(boxes, torch.tensor([1, 1]), torch.tensor([0, 1]))
        scores.add(Found(boxes, torch.tensor([0.5, 0.9]), torch.tensor([1, 1])), objects)
        assert scores.figures(0)[0][0].value == pytest.approx(1.0)

    @pytest.mark.parametrize("form", [{}, {"corners": True}, {"side": 20.0}])
    def test_raw_boxes(self, tmp_path: Path, form: dict[str, Any]) -> None:
        names = self.pictures(tmp_path)
        truth = coco(tmp_path, {name: [(5, block_box())] for name in names}, [2, 5, 8])
        parts = ["boxes:axis=1:channels=0-4", "scores:axis=1:channels=4-7:sigmoid"]
        found = sharefold.evaluate_task(raw_detector(3, 1, **form), opened(tmp_path, truth), outputs=parts)
        assert found["map"] == 1.0 and found.output == "output"  # of the two overlapping boxes the surer one is left
        if not form.get("side"):
            assert sharefold.evaluate_task(raw_detector(3, 1, **form), opened(tmp_path, truth)).figures == found.figures

    def test_boxes_and_scores_in_two_tensors(self, tmp_path: Path) -> None:
        names = self.pictures(tmp_path)
        truth = coco(tmp_path, {name: [(2, block_box())] for name in names}, [1, 2])
        raw = raw_detector(3, 2)  # as many as the largest id and one: numbers are ids
        net = Says(lambda x: {"places": raw(x)[:, :4].mT, "sure": raw(x)[:, 4:].mT.logit()})
        found = sharefold.evaluate_task(net, opened(tmp_path, truth), outputs=["places:boxes:axis=2", "sure:scores:axis=2"])
        assert found["map"] == 1.0 and found.output == "places"

    def test_numbers_of_classes(self) -> None:
        assert class_ids(3, [9, 4, 7]).tolist() == [4, 7, 9]
        assert class_ids(10, [9, 4, 7]).tolist() == list(range(10))
        with pytest.raises(SharefoldError, match="scores 5 classes, the annotation file has 3 categories, the largest with id 9"):
            class_ids(5, [9, 4, 7])

    def test_centres_of_what_fills_the_picture_are_no_corners(self) -> None:
        boxes = torch.tensor([[[10.0, 10, 19, 18], [4, 16, 2, 2], [15, 3, 1, 1]]])
        sure = torch.tensor([[True, False, False]])
        assert not are_corners(boxes, sure)
        assert are_corners(torch.tensor([[[1.0, 1, 19, 18], [4, 16, 5, 17], [15, 3, 15, 3]]]), sure)


class TestStored:
    def test_masks_and_images_in_an_npz(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        mask = rng.integers(0, 3, (4, 12, 12))
        images = np.stack([grey(one * STEP) for one in mask])
        np.savez(tmp_path / "masks.npz", test_x=images, test_y=mask)
        pairs = with_truth(open_data(f"npz:{tmp_path / 'masks.npz'}", transform_cfg=small(12, 12)))
        found = sharefold.evaluate_task(colours(3), pairs, outputs=CLASSES, limit=3, workers=1)
        assert found["miou"] == 1.0 and found.images == 3
        with pytest.raises(SharefoldError, match=r"truth is int64 .* this network makes images of 3 channels"):
            sharefold.evaluate_task(Says(lambda x: +x), pairs)
        np.savez(tmp_path / "images.npz", test_x=images, test_y=images[:, ::-1])
        stored = with_truth(open_data(f"npz:{tmp_path / 'images.npz'}", transform_cfg=small(12, 12)))
        assert sharefold.evaluate_task(Says(lambda x: x.flip(2)), stored)["psnr"] == 200
        with pytest.raises(SharefoldError, match=r"this network makes masks, whose truth is \(N, H, W\)"):
            sharefold.evaluate_task(colours(3), stored, outputs=CLASSES)

    def test_stored_truth_must_fit(self, tmp_path: Path) -> None:
        images = np.zeros((4, 8, 8, 3), np.uint8)
        for name, answers, words in (
            ("few", np.zeros((3, 8, 8), int), "want a mask"), ("deep", np.zeros((4, 8, 8, 3, 1), int), "want a mask"),
        ):  # fmt: skip
            np.savez(tmp_path / f"{name}.npz", test_x=images, test_y=answers)
            with pytest.raises(SharefoldError, match=words):
                with_truth(open_data(f"npz:{tmp_path / name}.npz", transform_cfg=small(8, 8)))
        np.savez(tmp_path / "classes.npz", test_x=images, test_y=np.arange(4))
        dataset = open_data(f"npz:{tmp_path / 'classes.npz'}", transform_cfg=small(8, 8))
        assert int(dataset[3][1]) == 3
        with pytest.raises(SharefoldError, match="the data holds no masks or images beside its images: give --truth"):
            with_truth(dataset)
        with pytest.raises(SharefoldError, match=r"truth masks: it goes by the names of the pictures.*give imagefolder:DIR"):
            with_truth(dataset, "masks")


def measured(folder: Path, truth: Path, net: Says, outputs: Any = None, **cfg: Any) -> sharefold.TaskReport:
    return sharefold.evaluate_task(net, opened(folder, truth, {**small(2, 2), **cfg}), outputs=outputs)


class TestRefused:
    def folder(self, tmp_path: Path) -> Path:
        return masks(tmp_path, ([[0, 1], [1, 1]], [[0, 1], [1, 1]]))

    def test_masks(self, tmp_path: Path) -> None:
        truth = self.folder(tmp_path)
        cases: list[tuple[np.ndarray, str]] = [
            (np.array([[0, 3], [1, 1]], np.uint8), "its mask holds class 3, the network tells 2 apart"),
            (np.zeros((2, 3), np.uint8), "the mask is 3x2 pixels, its picture 2x2: they must be of one size"),
            (grey(np.zeros((2, 2))), "a mask holds one class number a pixel, grey or as a palette, and this is RGB"),
        ]
        for pixels, words in cases:
            save(pixels, truth / "0.png")
            with pytest.raises(SharefoldError, match=words):
                measured(tmp_path, truth, colours(2), CLASSES)
        save(np.full((2, 2), 255, np.uint8), truth / "0.png")
        with pytest.raises(SharefoldError, match="every pixel of the masks is void"):
            measured(tmp_path, truth, colours(3), CLASSES)
        (truth / "0.png").write_bytes(b"no image")
        with pytest.raises(SharefoldError, match="not a readable image"):
            measured(tmp_path, truth, colours(2), CLASSES)

    def test_places_and_names(self, tmp_path: Path) -> None:
        truth = self.folder(tmp_path)
        (tmp_path / "truth.txt").write_text("")
        for name, words in (("no", "no such folder or file"), ("truth.txt", "neither a folder nor a .json file")):
            with pytest.raises(SharefoldError, match=words):
                opened(tmp_path, tmp_path / name)
        with pytest.raises(SharefoldError, match="truth.json: no such file"):
            opened(tmp_path, tmp_path / "truth.json")
        save(np.zeros((2, 2), np.uint8), truth / "more" / "0.png")
        with pytest.raises(SharefoldError, match=r"2 things in it are named like .*0.png, .*0.png and .*more.0.png: keep one"):
            opened(tmp_path, truth)
        save(grey(np.zeros((2, 2))), tmp_path / "pictures" / "1.png")
        (truth / "more" / "0.png").unlink()
        with pytest.raises(SharefoldError, match=r"nothing in it is named like .*1.png: add it, or take the picture out"):
            opened(tmp_path, truth)
        (tmp_path / "pictures" / "1.png").rename(tmp_path / "pictures" / "0.jpg")
        with pytest.raises(SharefoldError, match="is named like two pictures"):
            opened(tmp_path, truth)

    def test_networks(self, tmp_path: Path) -> None:
        truth = self.folder(tmp_path)
        boxes = coco(tmp_path, {"0.png": [(1, [0, 0, 1, 1])]}, [1])
        cases: list[tuple[Path, Says, Any, str]] = [
            (truth, colours(2), None, r"no output of the network is a mask or an image \(output: regression, .*say what one is"),
            (truth, colours(2), "multi-label", "no output of the network is a mask or an image"),
            (truth, detector(1), None, "the network returns detections, whose truth is a COCO annotation file"),
            (truth, Says(lambda x: (x * 1, x.long()[:, 0])), None, r"0 \(images\) and 1 \(masks\): leave out"),
            (boxes, colours(2), CLASSES, "the network returns no boxes beside scores"),
        ]
        for place, net, outputs, words in cases:
            with pytest.raises(SharefoldError, match=words):
                measured(tmp_path, place, net, outputs)
        with pytest.warns(SharefoldWarning, match="the network finds classes 4, the annotation file has 1: another file"):
            assert measured(tmp_path, boxes, detector(4))["map"] == 0.0
        with pytest.raises(SharefoldError, match="no object is annotated"):
            measured(tmp_path, coco(tmp_path, {"0.png": []}, [1]), detector(1))

    def test_deep_targets_and_odd_channels(self, tmp_path: Path) -> None:
        self.folder(tmp_path)
        save(np.zeros((2, 2), np.uint16), tmp_path / "deep" / "0.png")
        with pytest.raises(SharefoldError, match="a target has 8 bits a channel, and this is I;16"):
            measured(tmp_path, tmp_path / "deep", Says(lambda x: +x), "image")
        (tmp_path / "deep" / "0.png").unlink()
        Image.fromarray(np.zeros((2, 2), ">u2")).save(tmp_path / "deep" / "0.tif")
        with pytest.raises(SharefoldError, match="a target has 8 bits a channel, and this is I;16B"):
            measured(tmp_path, tmp_path / "deep", Says(lambda x: +x), "image")
        with pytest.raises(SharefoldError, match="image files give 1 or 3 channels, the network makes 2"):
            measured(tmp_path, tmp_path / "masks", Says(lambda x: x[:, :2] + 0), "image")

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda c: c.pop("images"), "is no COCO annotation file: want lists images, annotations and categories"),
            (lambda c: c.update(annotations={}), "is no COCO annotation file"),
            (lambda c: c.update(images=[3]), "is no COCO annotation file"),
            (lambda c: c.update(categories=[]), "it has no categories"),
            (lambda c: c["categories"][0].update(id="1"), "has the id '1': want a whole number of its own"),
            (lambda c: c["categories"].append({"id": 1, "name": "\x1b[2J"}), r"category '\\x1b\[2J' has the id 1"),
            (lambda c: c["images"][0].pop("file_name"), "want a file_name and an id of its own"),
            (lambda c: c["images"].append({"id": 0, "file_name": "1.png"}), "want a file_name and an id of its own"),
            (lambda c: c["images"].append({"id": 7, "file_name": "b.png"}), "1 of its 2 pictures are not among the data"),
            (lambda c: c["images"][0].update(file_name="other.png"), r"nothing in it is named like .*0.png"),
            (lambda c: c["images"][0].update(width=5, height=4), "0.png is 2x2 pixels, the file says 5x4"),
            (lambda c: c["annotations"][0].update(image_id=9), "annotation 0 is of image 9, which is none of the file's images"),
            (lambda c: c["annotations"][0].update(image_id=[]), "annotation 0 is of image"),
            (lambda c: c["annotations"][0].update(category_id=9), "annotation 0 is of category 9, which is none of the file's"),
            (lambda c: c["annotations"][0].update(bbox=[0, 0, 1]), r"annotation 0 has the bbox \[0, 0, 1\]: want \[x, y, width"),
            (lambda c: c["annotations"][0].update(bbox=[0, 0, -1, 1]), "annotation 0 has the bbox"),
            (lambda c: c["annotations"][0].update(bbox=[0, 0, 1e30, 1]), "annotation 0 has the bbox"),
            (lambda c: c["annotations"][0].update(bbox=[0, 0, float("nan"), 1]), "annotation 0 has the bbox"),
            (lambda c: c["annotations"][0].update(iscrowd="1"), "annotation 0 has the iscrowd '1': want 0 or 1"),
            (lambda c: c["annotations"][0].update(iscrowd="yes"), "annotation 0 has the iscrowd 'yes': want 0 or 1"),
        ],
    )
    def test_annotation_files(self, tmp_path: Path, change: Any, words: str) -> None:
        self.folder(tmp_path)
        file = coco(tmp_path, {"0.png": [(1, [0, 0, 1, 1])]}, [1])
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
        with pytest.raises(SharefoldError, match=words) as error:
            measured(tmp_path, file, detector(1))
        assert "\n" not in str(error.value) and "\x1b" not in str(error.value)

    def test_annotation_files_that_are_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder(tmp_path)
        file = tmp_path / "truth.json"
        for text, words in (("{", "is not JSON"), ("[" * 100 + "]" * 100, "nested too deeply"), ("[]", "is no COCO")):
            file.write_text(text)
            with pytest.raises(SharefoldError, match=words):
                opened(tmp_path, file)
        monkeypatch.setattr(sharefold.data.coco, "LIMIT", 1 << 20)
        file.write_text(" " * (1 << 20) + "{}")
        with pytest.raises(SharefoldError, match="has more than 1 MB"):
            opened(tmp_path, file)

    @pytest.mark.parametrize("module", ["torchmetrics.detection", "torchmetrics.functional.classification", "faster_coco_eval"])
    def test_without_the_packages(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
        truth = self.folder(tmp_path)
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(SharefoldError, match=rf"need {module.split('.')[0]}: pip install 'sharefold\[metrics\]'"):
            measured(tmp_path, truth, colours(2), CLASSES)

    def test_pairs_say_of_which_task(self, tmp_path: Path) -> None:
        with pytest.raises(SharefoldError, match="of which task"):
            opened(tmp_path, self.folder(tmp_path))[0]


def test_every_picture_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        save(grey(block_picture()), tmp_path / "pictures" / f"{name}.png")
        save(block_picture() // 255, tmp_path / "truth" / f"{name}.png")
    pairs = opened(tmp_path, tmp_path / "truth").of("masks")
    read: list[str] = []
    original = Image.open

    def counted(path: Path, *rest: Any, **more: Any) -> Any:
        read.append(Path(path).parent.name)
        return original(path, *rest, **more)

    monkeypatch.setattr(Image, "open", counted)
    image, answer = pairs[0]
    assert image.shape == (3, 20, 20) and answer.size == (20, 40) and answer.name.endswith("a.png")
    assert sorted(read) == ["pictures", "truth"]


def test_a_network_stays_as_it_was(tmp_path: Path) -> None:
    truth = masks(tmp_path, ([[0, 1], [1, 1]], [[0, 1], [1, 1]]))
    net = colours(2).train()
    measured(tmp_path, truth, net, CLASSES)
    assert net.training


def test_bootstrap() -> None:
    values = torch.randn(300, generator=torch.Generator().manual_seed(1))
    low, high = bootstrap(values, lambda sums: sums.flatten() / 300) or (0.0, 0.0)
    mean, error = float(values.mean()), float(values.std()) / 300**0.5
    assert low == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.2 * error)
    assert (low, high) == bootstrap(values, lambda sums: sums.flatten() / 300)
    assert bootstrap(values[:1], lambda sums: sums.flatten()) is None


def test_the_block_is_whole_pixels_of_the_input() -> None:
    assert all(corner * scale == int(corner * scale) for corner, scale in zip(BLOCK, (0.5, 1, 0.5, 1), strict=True))
