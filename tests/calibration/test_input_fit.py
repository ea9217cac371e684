"""Images against what BatchNorms remember: a reference by hand, and the settings that people get wrong."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from command_line import call
from torch import Tensor, nn

import sharefold
from sharefold.calibration.input_fit import Fit, Setting, better_setting, fit_of, known_settings, sample_size, setting_of
from sharefold.data import Preprocess, calibration_images
from sharefold.procedural import dead_leaves

HALF = Setting((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = Setting((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def pixels(count: int = 64, seed: int = 0) -> Tensor:
    """Coloured pictures in 0..1 with more red than blue, as photographs have."""
    return dead_leaves(count, (16, 16), 3, seed) * torch.tensor([1.0, 0.9, 0.7]).view(3, 1, 1)


def trained(setting: Setting) -> nn.Module:
    """A network whose BatchNorms have seen such pictures, prepared by ``setting``."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.BatchNorm2d(8))
    net[1].momentum = net[4].momentum = None  # type: ignore[assignment]
    with torch.no_grad():
        for seed in range(10, 14):
            net(setting.normalized(pixels(200, seed)))
    return net.eval()


def test_the_distance_is_the_one_by_hand() -> None:
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(3)
    norm.running_mean, norm.running_var = torch.randn(3), torch.rand(3) + 0.5
    x = torch.randn(20, 3, 4, 5) * 2 + 1

    def reference(x: Tensor) -> float:
        total = 0.0
        for channel in range(3):
            values = x[:, channel].double().flatten()
            mean, variance = float(norm.running_mean[channel]), float(norm.running_var[channel]) + norm.eps
            spread = float(values.var(unbiased=False)) + norm.eps
            d = (float(values.mean()) - mean) ** 2 / variance + ((spread / variance) ** 0.5 - 1) ** 2
            total += d / (1 + d) / 3
        return total

    found = fit_of(norm.train(), x)
    assert found is not None and norm.training and int(norm.num_batches_tracked) == 0
    assert found.whole == pytest.approx(reference(x), rel=1e-5)
    assert found.quarters == pytest.approx([reference(part) for part in x.chunk(4)], rel=1e-5)


def test_the_median_over_the_norms_and_only_the_first() -> None:
    net, images = trained(HALF), HALF.normalized(pixels() * 0.8)
    first, both = fit_of(net, images, 1), fit_of(net, images)
    alone = fit_of(net[4], net[:4](images).detach())
    assert first is not None and both is not None and alone is not None
    assert both.whole == pytest.approx((first.whole + alone.whole) / 2, rel=1e-4)
    ran: list[int] = []
    net[2].register_forward_hook(lambda *a: ran.append(1))
    assert fit_of(net, images, 1) == first and not ran


def test_nothing_to_go_by() -> None:
    net = trained(HALF)
    assert fit_of(net, HALF.normalized(pixels(15))) is None
    assert fit_of(nn.Conv2d(3, 4, 3), pixels()) is None
    assert fit_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), pixels()) is None
    assert better_setting(nn.Conv2d(3, 4, 3), pixels(), *(HALF.mean, HALF.std)) is None


def test_better_on_all_images_and_on_every_quarter() -> None:
    assert Fit(0.1, (0.1, 0.1, 0.1, 0.1)).clearly_better(Fit(0.2, (0.2, 0.2, 0.2, 0.2)))
    assert not Fit(0.1, (0.1, 0.1, 0.1, 0.3)).clearly_better(Fit(0.2, (0.2, 0.2, 0.2, 0.2)))
    assert not Fit(0.15, (0.1, 0.1, 0.1, 0.1)).clearly_better(Fit(0.2, (0.2, 0.2, 0.2, 0.2)))


@pytest.mark.parametrize("right", [HALF, IMAGENET], ids=["half", "imagenet"])
def test_the_right_setting_is_found_and_let_alone(right: Setting) -> None:
    net = trained(right)
    assert better_setting(net, right.normalized(pixels()), right.mean, right.std) is None
    for wrong in known_settings(3):
        if wrong.mean == right.mean or wrong.reverse:
            continue
        found = better_setting(net, wrong.normalized(pixels()), wrong.mean, wrong.std)
        assert found is not None and found.setting == right, wrong
    swapped = better_setting(net, right.normalized(pixels().flip(1)), right.mean, right.std)
    assert swapped is not None and swapped.setting == Setting(right.mean, right.std, reverse=True)
    assert "channels in reverse order (BGR for RGB) would fit better" in str(swapped)


@pytest.mark.parametrize(("scale", "shift", "words"), [(255, 0, "in 0..255 now"), (1, 0, "in 0..1 now"), (2, -1, "in -1..1 now")])
def test_images_that_were_not_normalised(scale: float, shift: float, words: str) -> None:
    found = better_setting(trained(IMAGENET), pixels() * scale + shift, IMAGENET.mean, IMAGENET.std)
    assert found is not None and (found.setting.mean, found.setting.std) == (IMAGENET.mean, IMAGENET.std)
    assert f"--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225, for images that are {words} would fit better" in str(found)


def test_one_channel_and_a_setting_of_its_own() -> None:
    source = sharefold.open_source("timm:digits_resnet")
    own = setting_of(source.pretrained_cfg)
    images = calibration_images("digits", source.pretrained_cfg, 200)
    assert better_setting(source.model, images, own.mean, own.std) is None
    images = calibration_images("digits", Preprocess((1, 8, 8), (0.5,), (0.5,)), 200)
    found = better_setting(source.model, images, (0.5,), (0.5,), own)
    assert found is not None and found.setting == own and "--mean 0.305 --std 0.376 would fit" in str(found)
    assert len(known_settings(1)) == 3 and len(known_settings(3)) == 12


def test_how_many_images() -> None:
    assert (sample_size(32, 32), sample_size(224, 224), sample_size(1000, 1000)) == (256, 48, 16)


@pytest.mark.parametrize("verb", ["inspect", "eval", "convert"])
def test_the_commands_warn(verb: str, tmp_path: object) -> None:
    command = [verb, "timm:digits_resnet", "--json", "--calib" if verb == "convert" else "--data", "digits"]
    if verb == "convert":
        command += ["--calib-count", "60", "--method", "svd", "--no-repair", "-o", f"{tmp_path}/net", "--force"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        right, wrong = (call(*command, *more) for more in ([], ["--mean", "0.5", "--std", "0.5"]))
    assert right.exit_code == wrong.exit_code == 0, (right.output, wrong.output)
    assert json.loads(right.stdout)["input_warning"] is None and "BatchNorms" not in right.stderr
    told = json.loads(wrong.stdout)["input_warning"]
    assert "--mean 0.305 --std 0.376 would fit better" in told and f"warning: {told}" in wrong.stderr
