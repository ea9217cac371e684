"""Data sets by name, preprocessing, loaders, calibration images."""

from __future__ import annotations

import gzip
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import Small
from PIL import Image
from torch.utils.data import DataLoader

from sharefold.data import (
    ArrayDataset,
    BatchLoader,
    FileDataset,
    Preprocess,
    calibration_images,
    loader,
    open_data,
)
from sharefold.data.class_names import class_numbers
from sharefold.data.preprocess import parse_size
from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.measure import evaluate

CFG = {"input_size": (3, 8, 8), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.5)}


def pixels(count: int = 6, size: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def npz_of(folder: Path, **arrays: np.ndarray) -> str:
    """What ``--data`` is given for a file of these arrays."""
    np.savez(folder / "set.npz", **arrays)
    return f"npz:{folder / 'set.npz'}"


@pytest.fixture
def npz(tmp_path: Path) -> str:
    return npz_of(tmp_path, train_x=pixels(20), train_y=np.arange(20), test_x=pixels(6), test_y=np.arange(6))


def normalised(images: np.ndarray) -> torch.Tensor:
    scaled = (images / 255.0 - np.array(CFG["mean"])) / np.array(CFG["std"])
    return torch.from_numpy(scaled.transpose(0, 3, 1, 2)).float()


def test_npz_is_normalised_exactly(npz: str) -> None:
    data = open_data(npz, "test", transform_cfg=CFG)
    images, labels = next(iter(loader(data, 6)))
    assert torch.allclose(images, normalised(pixels(6)), atol=1e-5)
    assert images.dtype == torch.float32 and images.is_contiguous()
    assert labels.tolist() == [0, 1, 2, 3, 4, 5] and labels.dtype == torch.int64
    one, label = data[4]
    assert torch.equal(one, images[4]) and label == 4


@pytest.mark.parametrize(("split", "size"), [("train", 20), ("test", 6), ("val", 6), ("validation", 6), ("eval", 6)])
def test_split_aliases(npz: str, split: str, size: int) -> None:
    assert len(open_data(npz, split, transform_cfg=CFG)) == size


def test_overrides_beat_the_configuration(npz: str) -> None:
    data = open_data(npz, "test", transform_cfg=CFG, mean=0.0, std=[1.0, 1.0, 1.0])
    images, _ = data.batch(slice(0, 2))
    assert torch.allclose(images, torch.from_numpy(pixels(6)[:2]).permute(0, 3, 1, 2) / 255, atol=1e-6)
    assert open_data(npz, "test", transform_cfg=CFG, input_size="3,16,16")[0][0].shape == (3, 16, 16)


def test_unsplit_npz_serves_every_split(tmp_path: Path) -> None:
    spec = npz_of(tmp_path, x=pixels(5))
    for split in ("train", "test"):
        data = open_data(spec, split, transform_cfg=CFG)
        assert len(data) == 5 and not data.labelled and data[0][1] == -1
    assert calibration_images(spec, CFG).shape == (5, 3, 8, 8)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"train_x": pixels(2)}, "no test_x"),
        ({"test_x": pixels(2).astype(np.float32)}, "float32"),
        ({"test_x": pixels(2)[0, 0]}, "want uint8, N x H x W x C"),
        ({"test_x": pixels(2).transpose(0, 3, 1, 2)}, "channels first"),
        ({"test_x": pixels(2), "test_y": np.arange(3)}, "2 images but 3 labels"),
        ({"test_x": pixels(2), "test_y": np.array([0.5, 1.0])}, "float64"),
        ({"test_x": pixels(2, channels=1)}, "1x8x8, the model wants 3x8x8"),
        ({"test_x": pixels(0)}, "no images"),
        ({"test_x": np.array([{}, []], dtype=object)}, "plain arrays"),
    ],
)
def test_npz_that_cannot_serve_is_refused_in_one_line(tmp_path: Path, arrays: dict, words: str) -> None:
    with pytest.raises(SharefoldError, match=words) as caught:
        open_data(npz_of(tmp_path, **arrays), "test", transform_cfg=CFG)
    assert "\n" not in str(caught.value)


def test_npz_with_a_pickle_inside_runs_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (marker,))

    spec = npz_of(tmp_path, test_x=np.array([Evil()], dtype=object))
    with pytest.raises(SharefoldError):
        open_data(spec, "test", transform_cfg=CFG)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 truncated"])
def test_damaged_npz(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(SharefoldError, match="not a readable npz"):
        open_data(f"npz:{tmp_path / 'd.npz'}", "test", transform_cfg=CFG)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("npz:/no/such.npz", "no such file"),
        ("nonsense:x", "unknown kind 'nonsense'"),
        ("npz:", "a place must follow"),
        ("just-a-word", "unknown kind"),
        ("imagefolder:/no/such", "no such directory"),
        ("cifar10:/no/such", "no such directory"),
        ("timm:torch/nothing:root", "key=value"),
    ],
)
def test_bad_specs(spec: str, words: str) -> None:
    with pytest.raises(SharefoldError, match=words):
        open_data(spec, "test", transform_cfg=CFG)


def write_folder(root: Path, images: np.ndarray, labels: list[str]) -> None:
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = root / label
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index}.png")


def test_imagefolder_agrees_with_the_array(tmp_path: Path) -> None:
    images = pixels(4)
    write_folder(tmp_path / "val", images, ["cat", "dog", "cat", "eel"])
    data = open_data(f"imagefolder:{tmp_path}", "test", transform_cfg=CFG)
    assert data.classes == ["cat", "dog", "eel"] and data.labels == [0, 0, 1, 2]
    stacked = torch.stack([data[i][0] for i in range(4)])
    assert torch.allclose(stacked, normalised(images[[0, 2, 1, 3]]), atol=1e-5)
    with pytest.raises(SharefoldError, match="no train folder"):
        open_data(f"imagefolder:{tmp_path}", "train", transform_cfg=CFG)


def test_imagefolder_without_splits_and_without_classes(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", pixels(2), ["one", "two"])
    assert len(open_data(f"imagefolder:{tmp_path / 'a'}", "train", transform_cfg=CFG)) == 2
    write_folder(tmp_path / "b", pixels(3), [".", ".", "."])
    flat = open_data(f"imagefolder:{tmp_path / 'b'}", "train", transform_cfg=CFG)
    assert len(flat) == 3 and not flat.labelled
    (tmp_path / "c").mkdir()
    with pytest.raises(SharefoldError, match="no images"):
        open_data(f"imagefolder:{tmp_path / 'c'}", "test", transform_cfg=CFG)


def test_a_split_that_lacks_a_class_numbers_it_as_the_others_do(tmp_path: Path) -> None:
    for split, classes in (("train", "abd"), ("val", "bcd"), ("test", ["images"]), ("spare", "xyz")):
        write_folder(tmp_path / split, pixels(len(classes)), list(classes))

    def found(place: Path, split: str) -> dict[str, int]:
        data = open_data(f"imagefolder:{place}", split, transform_cfg=CFG)
        assert class_numbers(data) == {name: number for number, name in enumerate(data.classes)}
        return {file.parent.name: label for file, label in zip(data.files, data.labels, strict=True)}

    for place in (tmp_path, tmp_path / "train"):
        assert found(place, "train") == {"a": 0, "b": 1, "d": 3}
    for place in (tmp_path, tmp_path / "val"):
        assert found(place, "val") == {"b": 1, "c": 2, "d": 3}
    assert found(tmp_path, "test") == {"images": 0}  # nothing in common with the rest
    assert found(tmp_path / "spare", "test") == {"x": 0, "y": 1, "z": 2}


def test_fewer_class_folders_than_outputs_are_told(tmp_path: Path) -> None:
    write_folder(tmp_path, pixels(3), ["a", "b", "c"])
    net = Small()
    for spec in (f"imagefolder:{tmp_path}", f"timm:folder:root={tmp_path}"):
        with pytest.warns(SharefoldWarning, match="eval: the data have 3 classes, the network has 4 outputs"):
            evaluate(net, loader(open_data(spec, transform_cfg=CFG), 2))
    (tmp_path / "bb").mkdir()  # an empty folder counts
    with warnings.catch_warnings():
        warnings.simplefilter("error", SharefoldWarning)
        evaluate(net, loader(open_data(f"imagefolder:{tmp_path}", transform_cfg=CFG), 2))


def test_image_files_are_resized_and_converted(tmp_path: Path) -> None:
    write_folder(tmp_path, pixels(1, size=40), ["a"])
    data = open_data(f"imagefolder:{tmp_path}", "test", transform_cfg=CFG)
    assert data[0][0].shape == (3, 8, 8)
    cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}
    grey = open_data(f"imagefolder:{tmp_path}", "test", transform_cfg=cfg)
    assert grey[0][0].shape == (1, 8, 8)


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    data = open_data(f"imagefolder:{tmp_path}", "test", transform_cfg=CFG)
    with pytest.raises(SharefoldError, match=r"broken\.png"):
        data[0]


def tiff(bits: int, values: np.ndarray, black: int = 1) -> bytes:
    """One row of big-endian grey in 12 or 16 ``bits``; ``black`` 0 says that 0 is white."""
    if bits == 16:
        strip = values.astype(">u2").tobytes()
    else:
        strip = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in values.reshape(-1, 2).tolist())
    tags = ((256, len(values)), (257, 1), (258, bits), (259, 1), (262, black), (273, 8), (277, 1), (278, 1), (279, len(strip)))
    order, mark = ("<", b"II") if bits == 12 or not black else (">", b"MM")
    if order == "<" and bits == 16:
        strip = values.astype("<u2").tobytes()
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    return (mark + struct.pack(f"{order}HI", 42, 8 + len(strip)) + strip + struct.pack(f"{order}H", len(tags)) + entries
            + bytes(4))  # fmt: skip


GREY = np.arange(0, 256, 17, dtype=np.int64)  # 16 levels from black to white


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("png", lambda: Image.fromarray((GREY * 257).astype(np.uint16)[None])),
        ("pgm", lambda: b"P5 16 1 65535\n" + (GREY * 257).astype(">u2").tobytes()),
        ("pgm", lambda: b"P5 16 1 510\n" + (GREY * 2).astype(">u2").tobytes()),
        ("tif", lambda: tiff(16, GREY * 257)),
        ("tif", lambda: tiff(16, 65535 - GREY * 257, black=0)),
        ("tif", lambda: tiff(12, GREY * 4095 // 255)),
    ],
    ids=["png", "pgm", "pgm of 510", "tiff", "tiff of white 0", "tiff of 12 bits"],
)
def test_deep_grey_is_what_it_is_in_8_bits(tmp_path: Path, name: str, content: Callable[[], Any]) -> None:
    file, found = tmp_path / f"a.{name}", content()
    file.write_bytes(found) if isinstance(found, bytes) else found.save(file)
    for channels in (1, 3):
        cfg = {"input_size": (channels, 1, 16), "mean": (0.0,), "std": (1.0,)}
        image = open_data(f"imagefolder:{tmp_path}", transform_cfg=cfg)[0][0]
        assert torch.allclose(image * 255, torch.from_numpy(GREY).float().expand(channels, 1, 16), atol=1e-3)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_grey_of_unknown_white_is_refused(tmp_path: Path, dtype: Any) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(GREY.astype(dtype)[None]).save(tmp_path / "a" / "deep.png", format="TIFF")
    for spec in (f"imagefolder:{tmp_path}", f"timm:folder:root={tmp_path}", f"timm:torch/image_folder:root={tmp_path}"):
        with pytest.raises(SharefoldError, match=r"^[^\n]*deep\.png: [^\n]*which of them is white: save it[^\n]*$"):
            open_data(spec, transform_cfg=CFG)[0]


@pytest.mark.parametrize("kind", ["folder", "torch/image_folder"])
def test_deep_grey_through_timm(tmp_path: Path, kind: str) -> None:
    images = pixels(1)[..., 0].astype(np.uint16) * 257
    write_folder(tmp_path, images, ["a"])
    image = open_data(f"timm:{kind}:root={tmp_path}", transform_cfg=CFG)[0][0]
    assert torch.allclose(image, normalised(np.repeat(pixels(1)[..., :1], 3, 3))[0], atol=1e-5)


def write_fashion(root: Path, count: int = 3) -> np.ndarray:
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images = pixels(count, 28, 1)[..., 0]
    for split in ("train", "t10k"):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">iiii", 2051, count, 28, 28) + images.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, count) + bytes(range(count)))
    return images


@pytest.mark.parametrize("inner", ["", "FashionMNIST"])
def test_fashionmnist_is_read_from_its_own_files(tmp_path: Path, inner: str) -> None:
    images = write_fashion(tmp_path)
    cfg = {"input_size": (1, 28, 28), "mean": (0.0,), "std": (1.0,)}
    data = open_data(f"fashionmnist:{tmp_path / inner}", "test", transform_cfg=cfg)
    batch, labels = data.batch(slice(None))
    assert torch.allclose(batch[:, 0], torch.from_numpy(images) / 255, atol=1e-6) and labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashionmnist"])
def test_incomplete_torchvision_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    with gzip.open(tmp_path / "cifar-10-batches-py" / "data_batch_1", "wb") as file:
        file.write(b"not the published file")
    with pytest.raises(SharefoldError, match="nothing is downloaded"):
        open_data(f"{name}:{tmp_path}", "test", transform_cfg=CFG)


def test_timm_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "validation", pixels(4), ["a", "b", "a", "b"])
    data = open_data(f"timm:folder:root={tmp_path}", "test", transform_cfg=CFG)
    image, label = data[0]
    assert torch.allclose(image, normalised(pixels(4))[0], atol=1e-5) and label == 0
    with pytest.raises(SharefoldError, match="timm could not open it"):
        open_data("timm:folder:root=/no/such/place", "test", transform_cfg=CFG)


def test_digits_split_is_fixed_and_disjoint() -> None:
    pytest.importorskip("sklearn")
    cfg = {"input_size": (1, 8, 8), "mean": (0.0,), "std": (1.0,)}
    train, test = (open_data("digits", split, transform_cfg=cfg) for split in ("train", "test"))
    assert (len(train), len(test)) == (1438, 359)
    assert train[0][0].max() <= 1 and float(train.batch(slice(None))[0].max()) == 1.0
    everything = torch.cat([train.images, test.images]).flatten(1).long()
    from sklearn.datasets import load_digits

    assert int(everything.sum()) == int(np.rint(load_digits().images * 255 / 16).sum())
    with pytest.raises(SharefoldError, match="1x8x8, the model wants 3x8x8"):
        open_data("digits", "test", transform_cfg=CFG)


def test_small_images_are_resized_like_timm() -> None:
    array = pixels(1, size=20)
    preprocess = Preprocess.from_cfg({**CFG, "crop_pct": 1.0})
    got = ArrayDataset(array, None, preprocess)[0][0]
    by_pillow = np.array(Image.fromarray(array[0]).resize((8, 8), Image.Resampling.BICUBIC))
    wanted = preprocess.normalize(torch.from_numpy(by_pillow).permute(2, 0, 1)[None])[0]
    assert torch.allclose(got, wanted, atol=1e-5)


def test_a_wide_picture_is_cropped_squashed_or_bordered_as_the_network_says() -> None:
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8))

    def shown(mode: str) -> torch.Tensor:
        return Preprocess.from_cfg({**CFG, "crop_pct": 1.0, "crop_mode": mode}).image(wide)

    def resized(picture: Image.Image, size: tuple[int, int]) -> torch.Tensor:
        return normalised(np.array(picture.resize(size, Image.Resampling.BICUBIC))[None])[0]

    squashed = resized(wide, (8, 8))
    assert torch.allclose(shown("squash"), squashed, atol=1e-5)
    assert torch.allclose(Preprocess.from_cfg(CFG).whole.image(wide), squashed, atol=1e-5)
    assert torch.allclose(shown("center"), resized(wide, (16, 8))[:, :, 4:12], atol=1e-5)
    bordered = shown("border")
    assert torch.allclose(bordered[:, 2:6], resized(wide, (8, 4)), atol=1e-5)
    assert float(bordered[:, [0, 1, 6, 7]].abs().max()) < 0.02  # the mean, as near as whole numbers come to it


@pytest.mark.parametrize(
    ("text", "size"), [("32", (3, 32, 32)), ("24,32", (3, 24, 32)), ("1x28x28", (1, 28, 28)), ((3, 4, 5), (3, 4, 5))]
)
def test_sizes(text: object, size: tuple[int, int, int]) -> None:
    assert parse_size(text) == size  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "a,b,c", "3,0,8", "1,2,3,4"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(SharefoldError, match="input size"):
        parse_size(text)


def test_mean_and_std_must_fit() -> None:
    with pytest.raises(SharefoldError, match="mean has 2 values, the model has 3"):
        Preprocess.from_cfg(CFG, mean=[0.1, 0.2])
    with pytest.raises(SharefoldError, match="std"):
        Preprocess.from_cfg(CFG, std=0.0)
    assert Preprocess.from_cfg({"input_size": (1, 8, 8)}).mean == (pytest.approx(0.449),)
    assert Preprocess.from_cfg(None).size == (3, 224, 224)
    assert Preprocess.from_cfg(Preprocess.from_cfg(CFG).cfg) == Preprocess.from_cfg(CFG)


def test_loader_order_depends_on_the_seed_and_the_pass_alone(npz: str) -> None:
    data = open_data(npz, "train", transform_cfg=CFG)

    def passes(seed: int) -> list[list[int]]:
        batches = loader(data, 6, shuffle=True, seed=seed)
        return [[int(y) for _, labels in batches for y in labels] for _ in range(2)]

    first, second = passes(3)
    assert sorted(first) == list(range(20)) and first != second and passes(3) == [first, second] != passes(4)
    batches = loader(data, 6, shuffle=True, seed=3)
    assert isinstance(batches, BatchLoader) and len(batches) == 4
    batches.set_epoch(1)
    assert [int(y) for _, labels in batches for y in labels] == second
    assert [len(labels) for _, labels in loader(data, 6, drop_last=True)] == [6, 6, 6]
    with pytest.raises(SharefoldError, match="batch size 0"):
        loader(data, 0)


def test_file_loader_gives_the_same_images(tmp_path: Path) -> None:
    write_folder(tmp_path, pixels(5), list("abcde"))
    data = open_data(f"imagefolder:{tmp_path}", "test", transform_cfg=CFG)
    batches = loader(data, 2, shuffle=True, seed=1)
    assert isinstance(data, FileDataset) and isinstance(batches, DataLoader)
    seen = {int(label): image for images, labels in batches for image, label in zip(images, labels, strict=True)}
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert torch.allclose(seen[3], normalised(pixels(5))[3], atol=1e-5)


def test_calibration_is_a_seeded_subset_without_labels(npz: str) -> None:
    everything = normalised(pixels(20))
    images = calibration_images(npz, CFG, count=7, seed=1)
    assert images.shape == (7, 3, 8, 8)
    distance = torch.cdist(images.flatten(1), everything.flatten(1))
    rows = distance.argmin(1)
    assert float(distance.min(1).values.max()) < 1e-3 and rows.unique().numel() == 7
    assert torch.equal(images, calibration_images(npz, CFG, count=7, seed=1))
    assert not torch.equal(images, calibration_images(npz, CFG, count=7, seed=2))
    assert len(calibration_images(npz, CFG, count=100)) == 20


def test_calibration_from_tensors_and_loaders(npz: str) -> None:
    ready = torch.randn(9, 3, 8, 8)
    assert torch.equal(calibration_images(ready, CFG), ready)
    assert len(calibration_images(ready, CFG, count=4)) == 4
    raw = torch.from_numpy(pixels(4)).permute(0, 3, 1, 2)
    assert torch.allclose(calibration_images(raw, CFG), normalised(pixels(4)), atol=1e-5)
    data = open_data(npz, "train", transform_cfg=CFG)
    assert torch.allclose(calibration_images(loader(data, 6), CFG, count=8), normalised(pixels(20))[:8], atol=1e-5)
    assert len(calibration_images(data, CFG, count=8)) == 8


def test_calibration_out_of_nothing() -> None:
    images = calibration_images(None, CFG, count=12, seed=5)
    again = calibration_images("procedural", CFG, count=12, seed=5)
    assert images.shape == (12, 3, 8, 8) and torch.equal(images, again)
    pixel = images * torch.tensor(CFG["std"]).view(3, 1, 1) + torch.tensor(CFG["mean"]).view(3, 1, 1)
    assert float(pixel.min()) >= -1e-5 and float(pixel.max()) <= 1 + 1e-5


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (torch.randn(4, 1, 28, 28), "images are 1x28x28, the model wants 3x8x8: give images with 3 channels"),
        (torch.randn(4, 3, 9, 8), "calibration images are 3x9x8, the model wants 3x8x8"),
        (torch.randn(4, 3, 8), "want .n, C, H, W."),
        (torch.randn(0, 3, 8, 8), "n >= 1"),
        (torch.full((2, 3, 8, 8), float("nan")), "NaN"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "int64"),
        ([], "no images"),
        ([torch.randn(3, 8, 8), torch.randn(3, 9, 9)], "differ in size"),
        (["text"], "want image tensors"),
    ],
)
def test_calibration_refusals(source: object, words: str) -> None:
    with pytest.raises(SharefoldError, match=words) as caught:
        calibration_images(source, CFG)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_calibration_arrays_of_another_size(tmp_path: Path) -> None:
    spec = npz_of(tmp_path, train_x=pixels(3, size=12))
    with pytest.raises(SharefoldError, match="are 3x12x12, the model wants 3x8x8"):
        calibration_images(spec, CFG)
    assert calibration_images(spec, CFG, resize=True).shape == (3, 3, 8, 8)
    with pytest.raises(SharefoldError, match="at least 1"):
        calibration_images(spec, CFG, count=0)
    grey = npz_of(tmp_path, train_x=pixels(3, channels=1))
    with pytest.raises(SharefoldError, match="are 1x8x8, the model wants 3x8x8"):
        calibration_images(grey, CFG, resize=True)
