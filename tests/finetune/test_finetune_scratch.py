from __future__ import annotations

import pytest
import torch
from finetune_nets import shared_net
from networks import Small

import sharefold.finetune
from sharefold.errors import SharefoldError
from sharefold.finetune.losses import Bases, collect_bases, orthogonality
from sharefold.finetune.published import SCHEDULES, published
from sharefold.finetune.schedule import Schedule, build_optimizer
from sharefold.finetune.scratch import reinitialize
from sharefold.format import FileConfig, carry_config
from sharefold.layers import Bank, add_bank
from sharefold.plans import GroupPlan, Plan


def test_the_published_numbers():
    bases = published("filter-bases-cifar10").config()
    assert (bases.epochs, bases.batch_size, bases.lr, bases.momentum) == (300, 256, 0.1, 0.9)
    assert (bases.weight_decay, bases.milestones, bases.gamma, bases.decay) == (5e-4, (150.0, 225.0), (0.1,), "all")
    assert (bases.orthogonality, bases.orthogonality_form) == (10.0, "with-unique")
    assert (bases.distill, bases.ema, bases.bank_step) == (0.0, 0.0, "1.0")
    mixer = published("kernel-sharing-convmixer").config()
    assert (mixer.optimizer, mixer.lr, mixer.eps, mixer.clip, mixer.epochs) == ("adamw", 1e-2, 1e-3, 1.0, 200)
    assert (mixer.mixup, mixer.cutmix, mixer.label_smoothing, mixer.random_erase) == (0.5, 0.5, 0.1, 0.25)
    lrunet = published("lrunet").config()
    assert (lrunet.batch_size, lrunet.milestones, lrunet.mean, lrunet.std) == (
        256,
        (200.0, 250.0),
        (0.0,) * 3,
        (1.0,) * 3,
    )
    wide = published("sharesnet-cifar").config()
    assert (wide.milestones, wide.gamma, wide.augment) == ((60.0, 120.0, 160.0), (0.2,), "crop4r+flip")


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_schedule_builds_and_starts_at_its_rate(name):
    config = published(name).config()
    optimizer = build_optimizer(shared_net(), config)
    assert (
        all(group["weight_decay"] == config.weight_decay for group in optimizer.param_groups) or config.decay != "all"
    )
    Schedule(optimizer, config, 10)
    assert {group["lr"] for group in optimizer.param_groups} == {config.lr}
    assert isinstance(optimizer, torch.optim.SGD) == (config.optimizer in {"sgd", "momentum"})
    if isinstance(optimizer, torch.optim.SGD):
        assert optimizer.defaults["nesterov"] == name.startswith("sharesnet")


def test_an_unknown_schedule_names_its_neighbours():
    with pytest.raises(SharefoldError, match="sharesnet-cifar"):
        published("sharesnet-cifr")


def test_reinitialize_draws_kernels_norms_and_orthonormal_bases():
    net = shared_net(unique=2)
    with torch.no_grad():
        net.bn.running_mean.fill_(3)
        net.bn.weight.fill_(2)
    reinitialize(net, seed=1)
    assert float(orthogonality(collect_bases(net)).detach()) < 1e-8
    assert torch.equal(net.bn.running_mean, torch.zeros(8)) and torch.equal(net.bn.weight, torch.ones(8))
    fan_out = 8 * 9
    assert float(net.stem.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.25)
    again = shared_net(seed=9, unique=2)
    reinitialize(again, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))


def test_two_bases_of_a_stage_can_be_orthonormal_together():
    net = Small()
    for name, rows in (("one", 5), ("two", 6)):
        add_bank(net, name, Bank({"basis": torch.randn(rows, 8, 3, 3)}, uses=2))
    groups = [GroupPlan(name, "basis", ("layer",), role=role) for name, role in (("one", "conv1"), ("two", "conv2"))]
    carry_config(net, FileConfig(Plan(groups, 0, 0)))
    reinitialize(net, joint=True)
    (together,) = collect_bases(net, joint=True)
    assert together.shared.shape == (11, 72) and float(orthogonality([together]).detach()) < 1e-8
    apart = collect_bases(net)
    assert [b.kind for b in apart] == ["conv1", "conv2"]
    reinitialize(net)
    assert float(orthogonality([Bases(torch.cat([b.shared for b in collect_bases(net)]), [])]).detach()) > 1e-4


def test_a_schedule_trains_from_scratch():
    from finetune_nets import images_and_labels

    config = sharefold.finetune.FinetuneConfig.build(
        published("filter-bases-cifar10").config(),
        epochs=6,
        milestones=(4,),
        batch_size=32,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        augment="crop1+flip",
        device="cpu",
    )
    net = shared_net()
    reinitialize(net, seed=2)
    report = sharefold.finetune(net, images_and_labels(256), images_and_labels(100, seed=1), config=config, quiet=True)
    assert report.top1_after is not None and report.top1_after > 0.9
