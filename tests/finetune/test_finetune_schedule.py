from __future__ import annotations

import itertools

import pytest
import torch
from finetune_nets import shared_net
from networks import Small
from torch import nn

from sharefold.errors import SharefoldError
from sharefold.finetune import FinetuneConfig
from sharefold.finetune.schedule import Schedule, build_optimizer, parameter_groups, roles
from sharefold.layers import Bank, BasisConv, HybridConv, SpatialConv, form_of


def _groups(**settings):
    groups = parameter_groups(shared_net(unique=2), FinetuneConfig(weight_decay=0.1, **settings))
    return {(g["lr_scale"], g["weight_decay"]): set(g["names"]) for g in groups}


def test_every_parameter_is_in_one_group():
    net = shared_net(unique=2)
    names = [name for group in parameter_groups(net, FinetuneConfig()) for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in net.named_parameters())


def test_sgd_takes_a_kth_of_the_step_on_a_bank_and_decays_filters_only():
    groups = _groups(optimizer="sgd")
    assert groups[0.25, 0.1] == {"sharefold_banks.layer1.basis"}  # four layers use it
    members = [f"layer1.{i}.conv{j}" for i in range(2) for j in (1, 2)]
    assert groups[1.0, 0.1] == {"stem.weight", "head.weight", *(f"{m}.unique" for m in members)}
    norms = {
        f"{n}.{p}" for n in ("bn", *(f"layer1.{i}.bn{j}" for i in range(2) for j in (1, 2))) for p in ("weight", "bias")
    }
    assert groups[1.0, 0.0] == {"head.bias", *norms, *(f"{m}.coefficients" for m in members)}


def test_own_filters_of_every_kind_decay_and_what_combines_them_does_not():
    form = form_of(nn.Conv2d(4, 6, 3))
    assert form is not None
    columns = torch.randn(3, 4, 3, 1)
    net = nn.Sequential(
        BasisConv(form, torch.randn(6, 3), None, torch.randn(3, 4, 3, 3), bias=torch.randn(6)),
        SpatialConv(form, columns, torch.randn(6, 3, 1, 3), gain=torch.randn(6, 1, 1, 1)),
        HybridConv(form, torch.randn(6, 14), Bank({"basis": torch.randn(5, 4, 3, 3)}, uses=1), columns),
    )
    decaying = {name for name, role in roles(net).items() if role.decays}
    assert decaying == {"0.unique", "1.vertical", "2.vertical"}
    assert roles(net).keys() - decaying == {
        "0.coefficients", "0.own_bias", "1.horizontal", "1.gain", "2.coefficients"
    }  # fmt: skip


def test_adaptive_optimizers_take_the_full_step_unless_told():
    assert {scale for scale, _ in _groups()} == {1.0}
    assert (0.25, 0.1) in _groups(bank_step="1/K")
    assert (0.5, 0.1) in _groups(bank_step="0.5")
    with pytest.raises(SharefoldError, match="bank_step='half'"):
        _groups(bank_step="half")


def test_decay_all_is_the_published_rule_and_frozen_parameters_stay_out():
    assert {decay for _, decay in _groups(decay="all")} == {0.1}
    net = Small()
    net.stem.requires_grad_(False)
    assert "stem.weight" not in {n for g in parameter_groups(net, FinetuneConfig()) for n in g["names"]}
    with pytest.raises(SharefoldError, match="no trainable parameter"):
        parameter_groups(net.requires_grad_(False), FinetuneConfig())


def _rates(steps, **settings):
    config = FinetuneConfig(optimizer="sgd", lr=0.1, warmup_lr=0.0, **settings)
    optimizer = build_optimizer(shared_net(), config)
    schedule = Schedule(optimizer, config, steps)
    rates = []
    for update in range(config.epochs * steps):
        schedule.step(update)
        rates.append([g["lr"] for g in optimizer.param_groups])
        scales = [g["lr_scale"] for g in optimizer.param_groups]
        assert rates[-1] == pytest.approx([rates[-1][scales.index(1.0)] * s for s in scales])
    return [max(r) for r in rates]


def test_cosine_warms_up_and_ends_low():
    rates = _rates(10, epochs=4, warmup_epochs=1.0, min_lr=0.001)
    assert rates[:10] == pytest.approx([0.01 * i for i in range(10)])
    assert max(rates) == rates[10] == 0.1
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[25] == pytest.approx((0.1 + 0.001) / 2, rel=1e-6) and rates[-1] < 0.0015


def test_multistep_exponential_cyclical_and_constant():
    rates = _rates(2, epochs=5, schedule="multistep", milestones=(1, 3.5), warmup_epochs=0.0)
    assert rates == pytest.approx([0.1] * 2 + [0.01] * 5 + [0.001] * 3)
    assert _rates(1, epochs=3, schedule="exponential", gamma=(0.5,), warmup_epochs=0.0) == pytest.approx(
        [0.1, 0.05, 0.025]
    )
    uneven = {"schedule": "multistep", "milestones": (1, 2), "gamma": (0.1, 0.5), "warmup_epochs": 0.0}
    assert _rates(1, epochs=3, **uneven) == pytest.approx([0.1, 0.01, 0.005])
    cycle = _rates(1, epochs=27, schedule="cyclical", warmup_epochs=0.0)
    assert cycle[:3] == pytest.approx([0.1, 0.15, 0.2])
    assert cycle[7:9] == pytest.approx([0.4, 0.34])
    assert cycle[25:] == pytest.approx([0.1, 0.15])
    assert _rates(1, epochs=3, schedule="constant", warmup_epochs=0.0) == pytest.approx([0.1] * 3)


def test_an_unknown_optimizer_and_eps_reach_the_user_and_the_optimizer():
    with pytest.raises(SharefoldError, match="optimizer='adamx'"):
        build_optimizer(Small(), FinetuneConfig(optimizer="adamx"))
    assert build_optimizer(Small(), FinetuneConfig(eps=1e-3)).defaults["eps"] == 1e-3
    assert isinstance(build_optimizer(Small(), FinetuneConfig()), torch.optim.AdamW)


def test_config_rejects_what_makes_no_sense():
    for bad, message in (
        ({"epochs": 0}, "at least 1"),
        ({"distill": 1.5}, "between 0 and 1"),
        ({"schedule": "wavy"}, "choose one of cosine"),
        ({"lr": "fast"}, "expected float"),
        ({"lr": float("nan")}, "positive and finite"),
        ({"orthogonality": -1.0}, "orthogonality=-1.0: must not be negative"),
        ({"weight_decay": float("inf")}, "nor without limit"),
        ({"mean": (0.5,)}, "give both"),
        ({"mean": (float("nan"),)}, "mean=.nan,.: numbers must be finite"),
        ({"gamma": (-0.1,)}, "factors must be finite and not negative"),
        ({"milestones": ("a",)}, "expected numbers"),
        ({"lr": 1e300}, "positive and finite"),
        ({"block_names": "("}, "block_names='.' is not a regular expression"),
        ({"orthogonality_skip": "("}, "not a regular expression"),
    ):
        with pytest.raises(SharefoldError, match=message):
            FinetuneConfig(**bad)
    with pytest.raises(SharefoldError, match="did you mean batch_size"):
        FinetuneConfig.build(batchsize=3)


def test_config_survives_json():
    import json

    config = FinetuneConfig(milestones=[3, 4], lr=1)
    assert config.milestones == (3, 4) and config.lr == 1.0
    assert FinetuneConfig.build(**json.loads(json.dumps(config.to_dict()))) == config
