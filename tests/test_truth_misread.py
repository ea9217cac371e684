"""What is easily taken for something else: scales of images, masks of 0 and 255, the wrong files, outputs without numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from truth_nets import CFG, Says, block_box, block_picture, coco, colours, detector, grey, opened, raw_detector, save

import sharefold
from sharefold.data import Preprocess
from sharefold.errors import SharefoldError
from sharefold.outputs.leaf import BYTES, NORMALISED, SHARES
from sharefold.tasks.image_scale import image_scale
from sharefold.tasks.truth_scores import MaskScores

CLASSES = "logits:axis=1"
NORMAL = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def pictures(folder: Path, truth: Any, count: int = 2) -> Path:
    """So many pictures with a bright block, each with the same ``truth``."""
    for index in range(count):
        save(grey(block_picture()), folder / "pictures" / f"{index}.png")
        save(truth, folder / "truth" / f"{index}.png")
    return folder / "truth"


class TestScale:
    @pytest.mark.parametrize("value", [0.5, 1.0])
    def test_the_truth_has_no_say(self, tmp_path: Path, value: float) -> None:
        dark = np.random.default_rng(0).integers(0, 12, (20, 40)).astype(np.uint8)
        truth = pictures(tmp_path, grey(dark))
        wide = {**CFG, "input_size": (3, 20, 40)}
        found = sharefold.evaluate_task(Says(lambda x: x * 0 + value), opened(tmp_path, truth, wide), outputs="image")
        assert found["psnr"] == pytest.approx(-10 * np.log10(((value - dark / 255) ** 2).mean()), abs=1e-3)
        assert found.scale.startswith("values were read as 0 to 1 (they lie between")

    @pytest.mark.parametrize("cfg", [{}, NORMAL])
    @pytest.mark.parametrize("name", [SHARES, BYTES, NORMALISED])
    @pytest.mark.parametrize("most", [1.0, 0.06])
    def test_of_bright_and_dark_pictures(self, cfg: dict[str, Any], name: str, most: float) -> None:
        preprocess = Preprocess.from_cfg({**CFG, **cfg})
        shares = torch.rand(4, 3, 20, 20) * most
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocess.mean, preprocess.std))
        made = {SHARES: shares, BYTES: shares * 255, NORMALISED: (shares - mean) / std}[name]
        scale = image_scale(made, preprocess)
        torch.testing.assert_close(scale(made), shares)
        assert scale.name == (SHARES if name == NORMALISED and not cfg else name)

    def test_networks_may_overshoot(self) -> None:
        made = torch.rand(4, 3, 20, 20) * 1.15 - 0.05
        made[0, 0, 0, :5] = torch.tensor([-3.0, 4, 9, -8, 300])
        assert image_scale(made, Preprocess.from_cfg({**CFG, **NORMAL})).name == SHARES

    def test_what_lies_below_0_is_spoken_of_where_nothing_says_that_it_is_normalised(self) -> None:
        scale = image_scale(torch.rand(4, 3, 20, 20) * 2 - 1, Preprocess.from_cfg(CFG))
        assert scale.name == SHARES and scale.text.endswith("in the first pictures; what lies below 0 is cut off)")

    def test_bright_normalised_images(self) -> None:
        preprocess = Preprocess.from_cfg({**CFG, **NORMAL})
        assert image_scale(torch.rand(4, 3, 20, 20) + 1, preprocess).name == NORMALISED
        assert image_scale(torch.rand(4, 1, 20, 20) + 1, preprocess).name == BYTES  # its mean and std are of three channels
        assert image_scale(torch.rand(4, 3, 20, 20) + 1, Preprocess.from_cfg(CFG)).name == BYTES

    def test_batches_make_no_difference(self, tmp_path: Path) -> None:
        truth = pictures(tmp_path, grey(block_picture()), 12)
        for index in range(1, 12):  # one dark picture first
            save(grey(255 - block_picture()), tmp_path / "pictures" / f"{index}.png")
        save(grey(block_picture() // 255), tmp_path / "pictures" / "0.png")
        pairs = opened(tmp_path, truth, {**CFG, "input_size": (3, 20, 40)})
        one, all_of_them = (sharefold.evaluate_task(Says(lambda x: x * 255), pairs, batch_size=size) for size in (1, 12))
        assert one.figures == all_of_them.figures and one.scale == all_of_them.scale and "0 to 255" in one.scale

    def test_the_user_may_say_it(self, tmp_path: Path) -> None:
        truth = pictures(tmp_path, grey(block_picture()))
        pairs = opened(tmp_path, truth, {**CFG, "input_size": (3, 20, 40)})
        found = sharefold.evaluate_task(Says(lambda x: +x), pairs, outputs="image:scale=1")
        assert found["psnr"] == 200 and found.scale == "values were read as 0 to 1 (given)"
        assert sharefold.evaluate_task(Says(lambda x: +x), pairs, outputs="output:image:scale=255")["psnr"] < 15
        with pytest.raises(SharefoldError, match="only an image has a scale: say image:scale=255"):
            sharefold.evaluate_task(Says(lambda x: +x), pairs, outputs="binary:scale=255")
        with pytest.raises(SharefoldError, match="scale of an image"):
            sharefold.evaluate_task(Says(lambda x: +x), pairs, outputs="image:scale=normalized")
        with pytest.raises(SharefoldError, match="takes 3 channels and makes 1: which mean and std"):
            sharefold.evaluate_task(Says(lambda x: x[:, :1]), pairs, outputs="image:scale=normalised")

    def test_of_networks_that_end_in_tanh(self, tmp_path: Path) -> None:
        pairs = opened(tmp_path, pictures(tmp_path, grey(block_picture())), {**CFG, "input_size": (3, 20, 40)})
        ends = Says(lambda x: torch.tanh((x - 0.5) * 40))
        found = sharefold.evaluate_task(ends, pairs)
        assert found["psnr"] > 100
        assert found.scale.startswith("values were read as -1 to 1 (the network ends in tanh, and they lie between -1 and 1")
        scaled = Says(lambda x: torch.tanh((x - 0.5) * 40) / 2 + 0.5)  # from 0 to 1 again
        assert sharefold.evaluate_task(scaled, pairs).scale.startswith("values were read as 0 to 1")
        # Without a tanh at the end nothing says what lies below 0 is; the user may.
        plain = Says(lambda x: (2 * x - 1).clamp(-1, 1))
        assert "what lies below 0 is cut off" in sharefold.evaluate_task(plain, pairs, outputs="image").scale
        said = sharefold.evaluate_task(plain, pairs, outputs="image:scale=tanh")
        assert said["psnr"] == 200 and said.scale == "values were read as -1 to 1 (given)"

    def test_a_tanh_is_seen_by_networks_that_write_into_their_input(self, tmp_path: Path) -> None:
        pairs = opened(tmp_path, pictures(tmp_path, grey(block_picture())), {**CFG, "input_size": (3, 20, 40)})
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.Tanh()).requires_grad_(False)
        torch.nn.init.dirac_(net[0].weight).mul_(40)
        torch.nn.init.constant_(net[0].bias, -20)
        assert "ends in tanh" in sharefold.evaluate_task(net, pairs).scale
        assert "ends in tanh" in sharefold.evaluate_task(Says(lambda x: x.mul_(40).sub_(20).tanh()), pairs).scale

    def test_a_tanh_is_seen_behind_a_crop_and_another_order_of_axes(self, tmp_path: Path) -> None:
        pairs = opened(tmp_path, pictures(tmp_path, grey(block_picture())), {**CFG, "input_size": (3, 20, 40)})
        padded = Says(lambda x: torch.tanh(torch.nn.functional.pad(x, (0, 4, 0, 4)) * 40 - 20)[..., :20, :40])
        assert "ends in tanh" in sharefold.evaluate_task(padded, pairs).scale
        turned = Says(lambda x: torch.tanh((x * 40 - 20).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous().clamp(-1, 1))
        assert "ends in tanh" in sharefold.evaluate_task(turned, pairs).scale

    @pytest.mark.parametrize("yes", [1, 255])
    def test_one_channel_may_be_a_mask(self, tmp_path: Path, yes: int) -> None:
        truth = pictures(tmp_path, block_picture() // 255 * np.uint8(yes))
        pairs = opened(tmp_path, truth, {**CFG, "input_size": (3, 20, 40)})
        shares = Says(lambda x: x[:, :1].clamp(0.1, 0.9))
        with pytest.raises(SharefoldError, match="output has one channel .* which: --outputs binary:sigmoid or --outputs image"):
            sharefold.evaluate_task(shares, pairs)
        for said in ("binary:sigmoid", "binary"):  # values from 0 to 1 have passed a sigmoid
            assert sharefold.evaluate_task(shares, pairs, outputs=said)["miou"] == 1.0
        assert sharefold.evaluate_task(shares, pairs, outputs="image").task == "images"
        grey_alone = opened(tmp_path, truth, {**CFG, "input_size": (1, 20, 40), "mean": (0.0,), "std": (1.0,)})
        with pytest.raises(SharefoldError, match="say which: --outputs binary or --outputs image"):
            sharefold.evaluate_task(Says(lambda x: x * 2 - 1), grey_alone)
        save(np.tile(np.array([0, 1, 255, 0], np.uint8), (20, 10)), truth / "0.png")  # with void
        with pytest.raises(SharefoldError, match="no other values than 0, 1 and 255, as masks do"):
            sharefold.evaluate_task(shares, pairs)
        save(np.full((20, 40), 7, np.uint8), truth / "0.png")
        assert sharefold.evaluate_task(shares, pairs).task == "images"


class TestMasks:
    def test_two_classes_and_masks_of_0_and_255(self, tmp_path: Path) -> None:
        truth = pictures(tmp_path, block_picture())
        pairs = opened(tmp_path, truth, {**CFG, "input_size": (3, 20, 40)})
        right = Says(lambda x: torch.stack([0.5 - x[:, 0], x[:, 0] - 0.5], 1))
        nothing = Says(lambda x: torch.stack([x[:, 0] * 0 + 1, x[:, 0] * 0], 1))
        share = (block_picture() == 0).mean()

        def measured(net: Says, form: str) -> sharefold.TaskReport:
            if not form:
                return sharefold.evaluate_task(net, pairs, outputs=CLASSES)
            return sharefold.evaluate_task(Says(lambda x: getattr(net(x), form)(1)), pairs)

        for form in ("", "softmax", "argmax"):
            assert measured(right, form)["miou"] == 1.0
            found = measured(nothing, form)
            assert found["pixel_accuracy"] == pytest.approx(share) and found["miou"] == pytest.approx(share / 2)

    def test_255_is_void_beside_1_and_with_more_classes(self) -> None:
        said, mask = torch.tensor([[0, 1, 1]]), torch.tensor([[0, 1, 255]])
        for scores, true in (
            (MaskScores(2), mask), (MaskScores(3), torch.tensor([[0, 255, 255]])), (MaskScores(256, counted=False), mask),
        ):  # fmt: skip
            scores.add(said, true, "")
            assert [figure.value for figure in scores.figures(0)[0]] == [1.0, 1.0]
        many = MaskScores(256, counted=False)
        many.add(torch.tensor([[0, 2, 1]]), torch.tensor([[0, 255, 255]]), "")
        assert many.figures(0)[0][0].value == 1.0

    def test_jpeg_changes_class_numbers(self, tmp_path: Path) -> None:
        truth = pictures(tmp_path, np.zeros((20, 40), np.uint8), 1)
        mask = Image.fromarray((np.arange(800).reshape(20, 40) % 2).astype(np.uint8))
        for suffix, options in ((".jpg", {}), (".tif", {"compression": "jpeg"})):
            (truth / "0.png").unlink(missing_ok=True)
            mask.save(truth / f"0{suffix}", **options)
            with pytest.raises(SharefoldError, match=r"0\.(jpg|tif): JPEG changes the numbers of a mask"):
                sharefold.evaluate_task(colours(2), opened(tmp_path, truth), outputs=CLASSES)
            (truth / f"0{suffix}").unlink()
        mask.save(truth / "0.webp", lossless=True)
        with pytest.raises(SharefoldError, match="a mask holds one class number a pixel, grey or as a palette, and this is RGB"):
            sharefold.evaluate_task(colours(2), opened(tmp_path, truth), outputs=CLASSES)  # WebP knows colours alone
        (truth / "0.webp").unlink()
        save(grey(block_picture()), truth / "0.jpg")
        wide = {**CFG, "input_size": (3, 20, 40)}
        assert sharefold.evaluate_task(Says(lambda x: +x), opened(tmp_path, truth, wide))["psnr"] > 20  # of images it is no harm


class TestFiles:
    def test_several_are_named_so(self, tmp_path: Path) -> None:
        truth = pictures(tmp_path, np.zeros((20, 40), np.uint8), 1)
        save(np.zeros((20, 40), np.uint8), truth / "0.tif")
        with pytest.raises(SharefoldError, match=r"2 things in it are named like \S+0.png, \S+0.png and \S+0.tif: keep one"):
            opened(tmp_path, truth)
        save(np.zeros((20, 40), np.uint8), truth / "a" / "0.bmp")
        with pytest.raises(SharefoldError, match=r"3 things in it are named like .* and 1 more: keep one"):
            opened(tmp_path, truth)
        save(np.zeros((20, 40), np.uint8), truth / "pictures" / "0.bmp")  # its folder is named as the picture's
        assert len(opened(tmp_path, truth)) == 1

    def test_a_picture_is_not_its_own_truth(self, tmp_path: Path) -> None:
        truth = pictures(tmp_path, grey(block_picture()), 1)
        (truth / "0.png").unlink()
        (truth / "0.png").symlink_to(tmp_path / "pictures" / "0.png")
        for place in (tmp_path / "pictures", truth, tmp_path / "truth" / ".." / "pictures"):
            with pytest.raises(SharefoldError, match="is the picture itself: give the folder of its truth"):
                opened(tmp_path, place)

    def test_a_byte_order_mark(self, tmp_path: Path) -> None:
        pictures(tmp_path, grey(block_picture()), 1)
        file = coco(tmp_path, {"0.png": [(2, block_box())]}, [1, 2])
        file.write_text(file.read_text(), encoding="utf-8-sig")
        assert sharefold.evaluate_task(detector(2), opened(tmp_path, file))["map"] == 1.0

    def test_crowds_alone(self, tmp_path: Path) -> None:
        pictures(tmp_path, grey(block_picture()), 1)
        file = coco(tmp_path, {"0.png": [(2, block_box()), (1, block_box())]}, [1, 2])
        content = json.loads(file.read_text())
        content["annotations"][0]["iscrowd"] = 1
        file.write_text(json.dumps(content))
        found = sharefold.evaluate_task(detector(2), opened(tmp_path, file))
        assert found["map"] == 0.0 and [part.id for part in found.parts] == [1]
        content["annotations"][1]["iscrowd"] = 1
        file.write_text(json.dumps(content))
        with pytest.raises(SharefoldError, match=r"only crowds \(2 with iscrowd 1\) are annotated in these pictures"):
            sharefold.evaluate_task(detector(2), opened(tmp_path, file))


class TestOptionsAndOutputs:
    @pytest.mark.parametrize(
        ("option", "value", "least"),
        [("limit", 0, 1), ("limit", -1, 1), ("limit", 1.5, 1), ("workers", -1, 0), ("batch_size", 0, 1), ("batch_size", None, 1)],
    )
    def test_counts(self, tmp_path: Path, option: str, value: Any, least: int) -> None:
        pairs = opened(tmp_path, pictures(tmp_path, grey(block_picture())))
        with pytest.raises(SharefoldError, match=rf"evaluate_task: {option}={value}: want a whole number from {least} on"):
            sharefold.evaluate_task(Says(lambda x: +x), pairs, **{option: value})

    def test_no_numbers(self, tmp_path: Path) -> None:
        truth = pictures(tmp_path, block_picture())
        save(grey(np.full((20, 40), 99)), tmp_path / "pictures" / "1.png")
        boxes = coco(tmp_path, {name: [(2, block_box())] for name in ("0.png", "1.png")}, [1, 2])

        def lost(x: torch.Tensor) -> torch.Tensor:
            """NaN for the grey picture alone."""
            bad = (x.flatten(1).std(1) < 0.01).view(-1, 1, 1, 1)
            return torch.where(bad, torch.nan, 0.0)

        parts = ["boxes:axis=1:channels=0-4", "scores:axis=1:channels=4-6"]
        nets: list[tuple[Path, Says, Any]] = [
            (truth, Says(lambda x: x + lost(x)), "image"),
            (truth, Says(lambda x: x[:, :1] + lost(x)), "binary"),
            (truth, Says(lambda x: colours(2)(x) + lost(x)), CLASSES),
            (boxes, Says(lambda x: [{**one, "scores": one["scores"] * torch.nan} for one in detector(2)(x)]), None),
            (boxes, Says(lambda x: raw_detector(2, 1)(x) + lost(x)[:, 0]), parts),
        ]
        for place, net, outputs in nets:
            with pytest.raises(SharefoldError, match=r"of its values for \S+.png are NaN \(no numbers\)") as error:
                sharefold.evaluate_task(net, opened(tmp_path, place), outputs=outputs)
            assert "\n" not in str(error.value)

    def test_where_boxes_are_is_said_with_the_scores_scale(self, tmp_path: Path) -> None:
        pictures(tmp_path, grey(block_picture()))
        truth = coco(tmp_path, {name: [(2, block_box())] for name in ("0.png", "1.png")}, [1, 2])
        raw = raw_detector(2, 1)
        nets = {"": Says(lambda x: torch.cat([raw(x)[:, :4], raw(x)[:, 4:].logit()], 1)), ":sigmoid": raw}
        hint = "--outputs scores:channels=4-84, or scores:channels=4-84:sigmoid where the scores lie between 0 and 1 already"
        with pytest.raises(SharefoldError, match=hint):
            sharefold.evaluate_task(nets[""], opened(tmp_path, truth), outputs="regression")
        for word, net in nets.items():  # as the hint says it, the scores of both are the same
            parts = ["boxes:axis=1:channels=0-4", f"scores:axis=1:channels=4-6{word}"]
            assert sharefold.evaluate_task(net, opened(tmp_path, truth), outputs=parts)["map"] == 1.0
