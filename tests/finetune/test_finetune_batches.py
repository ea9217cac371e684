from __future__ import annotations

import numpy as np
import pytest
import torch
from finetune_nets import images_and_labels, shared_net
from networks import Small
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

from sharefold.data import loader, open_data
from sharefold.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.finetune import FinetuneConfig, finetune, seeds
from sharefold.finetune.augmentation import Augment, Draw, shrunk
from sharefold.finetune.batches import Deal, LoaderBatches, MemoryBatches, SampleBatches
from sharefold.finetune.distributed import World
from sharefold.finetune.loaders import training_batches, validation_batches
from sharefold.format import FileConfig, carry_config, config_of
from sharefold.measure import evaluate
from sharefold.plans import Plan

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def _batches(data, **settings):
    world = settings.pop("world", ALONE)
    return training_batches(data, Small(), FinetuneConfig(**{"batch_size": 8, "workers": 0, **settings}), world)


def _same(left, right):
    assert len(left) == len(right) > 0
    for (x, y), (u, v) in zip(left, right, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)


def test_augment_parses_chains_and_names_an_unknown_part():
    assert Augment.parse("crop4r+flip+rotate10") == Augment(crop=4, reflect=True, flip=True, rotate=10.0)
    assert Augment.parse("none") == Augment() == Augment.parse("")
    with pytest.raises(SharefoldError, match="'swirl'"):
        Augment.parse("flip+swirl")


@pytest.mark.parametrize("reflect", [False, True])
def test_crop_and_flip_equal_padding_and_slicing(reflect):
    images = torch.randint(1, 256, (5, 8, 8, 3), dtype=torch.uint8)
    draw = Draw(
        torch.tensor([0, -2, 2, 1]), torch.tensor([0, 2, -1, -2]), torch.tensor([False, True, False, True]), None
    )
    index = torch.tensor([4, 0, 0, 2])
    found = Augment(crop=2, flip=True, reflect=reflect).apply(images, index, draw)
    mode = "reflect" if reflect else "constant"
    for i in range(4):
        picture = np.pad(images[index[i]].numpy(), ((2, 2), (2, 2), (0, 0)), mode=mode)
        top, left = 2 + int(draw.dy[i]), 2 + int(draw.dx[i])
        expected = picture[top : top + 8, left : left + 8]
        expected = expected[:, ::-1] if draw.flip[i] else expected
        assert np.array_equal(found[i].numpy(), expected)


def test_draws_cover_every_offset_evenly():
    draw = Augment(crop=2, flip=True).draw(20_000, torch.Generator().manual_seed(0))
    counts = torch.bincount(draw.dy + 2, minlength=5)
    assert counts.shape == (5,) and counts.min() > 3700 and counts.max() < 4300
    assert 0.48 < float(draw.flip.float().mean()) < 0.52


def test_affine_without_ranges_is_the_identity_and_a_quarter_turn_rotates():
    images = torch.rand(2, 3, 8, 8)
    chain = Augment(rotate=90)
    still = chain.draw(2, torch.Generator())
    theta = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]] * 2)
    same = chain.warp(images, Draw(still.dy, still.dx, still.flip, theta))
    assert torch.allclose(same, images, atol=1e-5)
    turn = torch.tensor([[[0.0, -1, 0], [1, 0, 0]]] * 2)
    turned = chain.warp(images, Draw(still.dy, still.dx, still.flip, turn))
    assert torch.allclose(turned, images.rot90(1, (2, 3)), atol=1e-5) or torch.allclose(
        turned, images.rot90(-1, (2, 3)), atol=1e-5
    )


@pytest.mark.parametrize("side, small", [(32, 24), (64, 48), (224, 168), (28, 20), (16, 12), (8, 8)])
def test_shrunk_images_keep_their_mean_and_fit_strides(side, small):
    images = torch.rand(2, 3, side, side).cumsum(3) / side
    found = shrunk(images)
    assert found.shape == (2, 3, small, small)
    torch.testing.assert_close(found.mean((2, 3)), images.mean((2, 3)), rtol=0.02, atol=0)


def test_memory_batches_normalise_and_use_each_image_once():
    images, labels = images_and_labels(40)
    batches = _batches((images, labels), augment="none")
    assert isinstance(batches, MemoryBatches) and batches.steps == 5
    got = list(batches.epoch(0))
    seen = torch.cat([x for x, _ in got])
    expected = (images.float() / 255 - 0.5) / 0.25
    order = torch.randperm(40, generator=seeds.generator("order", 0, 0))
    assert torch.allclose(seen, expected[order], atol=1e-5)
    assert torch.equal(torch.cat([y for _, y in got]), labels[order])
    assert not torch.equal(order, torch.randperm(40, generator=seeds.generator("order", 0, 1)))


def test_channels_last_floats_pass_unchanged():
    pictures = torch.randn(16, 8, 8, 3)
    got = torch.cat([x for x, _ in _batches((pictures, torch.zeros(16)), augment="none").epoch(0)])
    order = torch.randperm(16, generator=seeds.generator("order", 0, 0))
    assert torch.equal(got, pictures.permute(0, 3, 1, 2)[order])


@pytest.mark.parametrize("start", [0, 1, 3])
def test_an_epoch_can_start_anywhere(start):
    batches = _batches(images_and_labels(40), augment="crop1+flip+rotate10")
    _same(list(batches.epoch(2))[start:], list(batches.epoch(2, start)))


def test_processes_and_slices_cut_the_same_global_batches():
    data = images_and_labels(40)
    whole = list(_batches(data, augment="crop1+flip").epoch(1))
    ranks = [list(_batches(data, augment="crop1+flip", world=World(r, 2, CPU)).epoch(1)) for r in range(2)]
    _same(whole, [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in zip(*ranks, strict=True)])
    slices = list(_batches(data, augment="crop1+flip", accumulate=2).epoch(1))
    pairs = zip(slices[::2], slices[1::2], strict=True)
    _same(whole, [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in pairs])


def test_deal_names_a_batch_size_that_works():
    with pytest.raises(SharefoldError, match="use 8"):
        Deal(100, 10, accumulate=2, size=2)
    with pytest.raises(SharefoldError, match="use at most 6"):
        Deal(6, 8)


class Pictures(Dataset):
    """PIL images with an augmentation that draws from torch, numpy and python."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        import random

        noise = torch.rand(3, 8, 8) + float(np.random.rand()) + random.random()
        return noise + index, index % 4


@pytest.mark.parametrize("workers", [0, 2])
def test_sample_batches_repeat_their_draws_from_any_start_with_any_workers(workers):
    reference = list(_batches(Pictures()).epoch(0))
    batches = _batches(Pictures(), workers=workers)
    assert isinstance(batches, SampleBatches)
    state = torch.get_rng_state()
    _same(reference[1:], list(batches.epoch(0, 1)))
    if workers == 0:
        assert torch.equal(state, torch.get_rng_state())  # the caller's generator is not touched by samples
    assert not torch.equal(reference[0][0], next(batches.epoch(1))[0])


def test_a_plain_loader_lends_its_data_set_and_batch_size():
    images, labels = images_and_labels(40)
    loader = DataLoader(TensorDataset(images.float(), labels), batch_size=10, shuffle=True)
    batches = _batches(loader)
    assert isinstance(batches, SampleBatches) and (batches.batch_size, batches.steps) == (10, 4)


def test_a_loader_with_its_own_sampler_is_taken_as_it_comes_and_skipped_into():
    images, labels = images_and_labels(40)
    sampler = WeightedRandomSampler([1.0] * 40, 24)
    batches = _batches(DataLoader(TensorDataset(images.float(), labels), batch_size=8, sampler=sampler))
    assert isinstance(batches, LoaderBatches) and batches.steps == 3
    _same(list(batches.epoch(1))[1:], list(batches.epoch(1, 1)))


class _Noisy(TensorDataset):
    """Samples drawn anew each time, from torch's own generator."""

    def __getitem__(self, index):
        images, labels = super().__getitem__(index)
        return images + torch.randn(images.shape), labels


def test_a_loader_with_its_own_sampler_draws_the_same_whatever_steps_draw_between():
    images, labels = images_and_labels(40)
    loader = DataLoader(_Noisy(images.float(), labels), batch_size=8, sampler=WeightedRandomSampler([1.0] * 40, 24))
    batches = _batches(loader)
    whole = []
    for step, batch in enumerate(batches.epoch(1)):
        whole.append(batch)
        torch.manual_seed(100 + step)
    state = torch.get_rng_state()
    _same(whole[1:], list(batches.epoch(1, 1)))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(whole[0][0], whole[1][0]) and not torch.equal(whole[0][0], next(iter(batches.epoch(2)))[0])


def test_data_strings_folders_and_auto_augment(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(i).integers(0, 256, (10, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{i}.png")
    spec = f"imagefolder:{tmp_path}"
    for settings in ({}, {"auto_augment": "rand-m9-mstd0.5-inc1"}):
        batches = _batches(spec, batch_size=4, **settings)
        got = list(batches.epoch(0))
        assert [tuple(x.shape) for x, _ in got] == [(4, 3, 8, 8)] * 2
        assert sorted(torch.cat([y for _, y in got]).tolist()) == [0] * 4 + [1] * 4
        _same(got, list(batches.epoch(0)))
    images, labels = images_and_labels(16)
    mixed = _batches((images, labels), auto_augment="rand-m9-mstd0.5-inc1")
    assert isinstance(mixed, SampleBatches)
    assert next(mixed.epoch(0))[0].shape == (8, 3, 8, 8)


def test_deep_grey_is_scaled_and_timm_images_are_augmented(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    for name, images in (("flat", pixels), ("deep", pixels.astype(np.uint16) * 257)):
        (tmp_path / name / "train" / "a").mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / "train" / "a" / f"{i}.png")

    def epoch(spec, **settings):
        return list(_batches(spec, batch_size=4, **settings).epoch(0))

    plain = epoch(f"imagefolder:{tmp_path / 'flat'}", augment="none")
    for spec in (f"imagefolder:{tmp_path / 'deep'}", f"timm:folder:root={tmp_path / 'deep'}"):
        _same(plain, epoch(spec, augment="none"))
    timm, own = f"timm:folder:root={tmp_path / 'flat'}", f"imagefolder:{tmp_path / 'flat'}"
    given = open_data(timm, "train", transform_cfg=Small().pretrained_cfg)
    before = given[0][0]
    _same(epoch(own), epoch(timm))
    _same(epoch(own), epoch(given))
    assert not torch.equal(epoch(own)[0][0], plain[0][0]) and torch.equal(given[0][0], before)


def test_classes_that_have_another_number_in_each_split_are_refused(tmp_path):
    for split, classes in (("pictures", "abcd"), ("others", "bcd")):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / split / name / "0.png")
    specs = [f"imagefolder:{tmp_path / 'pictures'}", f"imagefolder:{tmp_path / 'others'}"]
    settings = {"epochs": 1, "batch_size": 2, "workers": 0, "device": "cpu", "quiet": True}
    with pytest.raises(SharefoldError, match=r"b is class 1 of the training images and class 0 of .* \(only one of them has a\)"):
        finetune(Small(), *specs, **settings)
    with pytest.warns(SharefoldWarning, match="finetune: the data have 3 classes, the network has 4 outputs"):
        finetune(Small(), specs[1], **settings)
    finetune(Small(), specs[0], specs[0], **settings)


def test_validation_deals_every_image_once_over_processes():
    images, labels = images_and_labels(21)
    config = FinetuneConfig(batch_size=8)
    parts = [list(validation_batches((images, labels), Small(), config, World(r, 2, CPU))) for r in range(2)]
    assert sum(len(x) for part in parts for x, _ in part) == 21
    found = torch.cat([y for part in parts for _, y in part])
    assert sorted(found.tolist()) == sorted(labels.tolist())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((torch.zeros(8, 3, 8, 8), torch.zeros(7)), "8 images but 7 labels"),
        ((torch.zeros(8, 3, 8, dtype=torch.int64), torch.zeros(8)), "want uint8 or float"),
        (torch.zeros(8, 3, 8, 8), "no labels"),
        ("nowhere", "unknown kind"),
        (iter([1]), "want a DATA string"),
    ],
)
def test_unusable_data_says_what_is_wrong(data, message):
    with pytest.raises(SharefoldError, match=message):
        _batches(data)


def _ways(images: torch.Tensor, labels: torch.Tensor) -> list[object]:
    """In memory, by index, and in a loader with an order of its own."""
    normal = TensorDataset(images.float() / 255, labels)
    sampler = WeightedRandomSampler([1.0] * len(images), len(images))
    return [(images, labels), normal, DataLoader(normal, batch_size=8, sampler=sampler)]


@pytest.mark.parametrize(("label", "words"), [(99, "labels go up to 99, the model has 4 classes"), (-1, "a label is -1")])
@pytest.mark.parametrize("way", range(3))
def test_labels_that_the_network_has_no_class_for(label: int, words: str, way: int) -> None:
    images, labels = images_and_labels(16)
    wrong = labels.clone()
    wrong[5] = label
    config = {"epochs": 1, "batch_size": 8, "lr": 1e-3, "quiet": True, "workers": 0, "device": "cpu"}
    with pytest.raises(SharefoldError, match=words):
        finetune(Small(), _ways(images, wrong)[way], **config)
    if way < 2:
        with pytest.raises(SharefoldError, match=words):
            finetune(Small(), (images, labels), _ways(images, wrong)[way], **config)


def test_labels_as_shares_of_other_classes() -> None:
    images, _ = images_and_labels(16)
    with pytest.raises(SharefoldError, match="the labels are for 7 classes, the model has 4"):
        finetune(Small(), (images, torch.ones(16, 7) / 7), epochs=1, batch_size=8, quiet=True, device="cpu")


@pytest.mark.parametrize("shares", [torch.float32, torch.float64, torch.int64])
def test_shares_of_classes_are_counted_and_mixed_as_the_classes_they_stand_for(shares: torch.dtype) -> None:
    images, labels = images_and_labels(32)
    soft = torch.nn.functional.one_hot(labels, 4).to(shares)
    config = {"epochs": 2, "batch_size": 8, "keep": "best", "quiet": True, "workers": 0, "device": "cpu"}
    for mix in ({}, {"mixup": 0.5, "cutmix": 0.5}):
        for hard, way in zip(_ways(images, labels)[:2], _ways(images, soft)[:2], strict=True):
            wanted, found = (finetune(shared_net(), data, data, **config, **mix) for data in (hard, way))
            assert 0 < found.top1_before < 1 and found.top1_before == wanted.top1_before
            assert found.top1_after == wanted.top1_after
            for one, other in zip(found.history, wanted.history, strict=True):
                assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {"auto_augment": "rand-m9-mstd0.5-inc1"}])
@pytest.mark.parametrize("cfg", [{}, Small().pretrained_cfg])
@pytest.mark.parametrize("stored", ["none", "val", "train"])
def test_images_in_memory_are_learned_from_and_measured_at_the_size_that_they_have(tmp_path, settings, cfg, stored) -> None:
    images, labels = images_and_labels(16)
    data = images.repeat_interleave(2, 2).repeat_interleave(2, 3), labels
    np.savez(tmp_path / "data.npz", x=data[0].permute(0, 2, 3, 1).numpy(), y=labels.numpy())
    train, val = (f"npz:{tmp_path}/data.npz" if part == stored else data for part in ("train", "val"))
    seen, model, teacher = set(), Small(), Small()
    model.pretrained_cfg = teacher.pretrained_cfg = cfg
    carry_config(model, FileConfig(Plan([], 1, 1, "by hand"), None, dict(cfg)))
    for network in (model, teacher):
        network.register_forward_pre_hook(lambda network, given: seen.add((network.training, tuple(given[0].shape[1:]))))
    report = finetune(
        model, train, val, teacher=teacher, epochs=1, batch_size=8, augment="none", quiet=True, workers=0, device="cpu", ema=0.0,
        **settings,
    )  # fmt: skip
    assert seen == {(True, (3, 16, 16)), (False, (3, 16, 16))}
    said = config_of(model).pretrained_cfg
    assert tuple(said["input_size"]) == (3, 16, 16)
    dataset = open_data(f"npz:{tmp_path}/data.npz", "test", transform_cfg=said)
    assert evaluate(model, loader(dataset, 16))["top1"] == report.top1_after


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(1, 6, 5), (2, 6, 3), (12, 6, 5), (16, 16, 16)])
def test_the_network_tells_which_axis_of_images_in_memory_counts_the_channels(shape, kind) -> None:
    channels = shape[0]
    images = torch.arange(8 * channels).reshape(8, channels, 1, 1).expand(8, *shape).to(kind)  # each channel of one value
    mean, std = sum(IMAGENET_MEAN) / 3, sum(IMAGENET_STD) / 3
    wanted = images if kind == torch.float32 else (images.float() / 255 - mean) / std
    orders = [images] if shape == (16, 16, 16) else [images, images.permute(0, 2, 3, 1).contiguous()]
    for given in [*orders, *([images[:, 0]] if channels == 1 else [])]:
        model = nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        data, config = (given, torch.arange(8) % 4), FinetuneConfig(batch_size=8, augment="none")
        ((seen, _),) = validation_batches(data, model, config, ALONE)
        torch.testing.assert_close(seen, wanted)
        ((seen, _),) = training_batches(data, model, config, ALONE).epoch(0)
        torch.testing.assert_close(seen, wanted[torch.randperm(8, generator=seeds.generator("order", 0, 0))])


def test_mean_and_std_are_those_of_the_images_channels() -> None:
    model = nn.Sequential(nn.Conv2d(12, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.full((8, 12, 6, 6), 51, dtype=torch.uint8)
    config = FinetuneConfig(batch_size=8, augment="none", mean=[k / 12 for k in range(12)], std=[0.5] * 12)
    ((seen, _),) = validation_batches((images, torch.zeros(8)), model, config, ALONE)
    assert seen[0, :, 0, 0].tolist() == pytest.approx([(0.2 - k / 12) / 0.5 for k in range(12)], abs=1e-6)
    with pytest.raises(SharefoldError, match="auto_augment: is for 1 or 3 channels, not 12"):
        training_batches((images, torch.zeros(8)), model, FinetuneConfig(auto_augment="rand-m9-mstd0.5-inc1"), ALONE)


def test_images_that_a_network_takes_in_both_orders_are_as_its_configuration_says() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    for channels, turned in ((3, True), (8, False)):
        model.pretrained_cfg = {"input_size": (channels, 8, 8), "mean": (0.5,) * 3}
        images = torch.randn(8, 8, 8, 3)
        ((seen, _),) = validation_batches((images, torch.zeros(8)), model, FinetuneConfig(batch_size=8), ALONE)
        assert torch.equal(seen, images.permute(0, 3, 1, 2) if turned else images)
