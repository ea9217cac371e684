from __future__ import annotations

import math

import pytest
import torch
from finetune_nets import shared_net
from networks import Small
from torch import nn

from sharefold.errors import SharefoldError
from sharefold.finetune.block_outputs import Taps, giving_tensors, matching_blocks
from sharefold.finetune.losses import Bases, block_error, collect_bases, distillation, moments, orthogonality, spread


def test_distillation_is_t_squared_kl_of_softened_outputs():
    student, teacher, t = torch.randn(5, 3).double(), torch.randn(5, 3).double(), 3.0
    expected = 0.0
    for s, q in zip(student.tolist(), teacher.tolist(), strict=True):
        p = [math.exp(v / t) / sum(math.exp(w / t) for w in q) for v in q]
        r = [math.exp(v / t) / sum(math.exp(w / t) for w in s) for v in s]
        expected += t * t * sum(a * math.log(a / b) for a, b in zip(p, r, strict=True)) / 5
    assert float(distillation(student, teacher, t)) == pytest.approx(expected, rel=1e-5)
    assert float(distillation(teacher, teacher, t)) == pytest.approx(0, abs=1e-6)


def test_block_error_is_relative_to_the_teachers_spread():
    teacher = torch.randn(6, 3, 4, 4) * 10 + 5
    student = teacher + torch.randn_like(teacher)
    within = sum(float(((teacher[:, c] - teacher[:, c].mean()) ** 2).mean()) for c in range(3)) / 3
    assert spread(moments(teacher)) == pytest.approx(within, rel=1e-4)
    expected = float(((student - teacher) ** 2).mean()) / within
    assert float(block_error([student], [teacher], [within])) == pytest.approx(expected, rel=1e-4)
    loud = spread(moments(teacher * 7))
    both = block_error([student, student * 7], [teacher, teacher * 7], [within, loud])
    assert float(both) == pytest.approx(expected, rel=1e-3)  # a louder block counts no more


def test_spread_of_tokens_is_taken_within_their_last_axis():
    tokens = torch.randn(2, 50, 8) + 100 * torch.arange(8)
    assert 0.8 < spread(moments(tokens)) < 1.2


def _entries(rows: torch.Tensor) -> torch.Tensor:
    return (rows @ rows.T - torch.eye(len(rows))) ** 2


def test_orthogonality_mean_pools_all_entries():
    a, b = torch.randn(3, 7), torch.randn(5, 9)
    expected = (_entries(a).sum() + _entries(b).sum()) / (9 + 25)
    found = orthogonality([Bases(a, []), Bases(b, [])], "mean")
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_orthogonality_of_joint_matrix_counts_cross_terms():
    a, b = torch.randn(3, 7), torch.randn(2, 7)
    joined = float(orthogonality([Bases(torch.cat([a, b]), [])]))
    cross = float(((a @ b.T) ** 2).sum())
    apart = float(_entries(a).sum() + _entries(b).sum())
    assert joined == pytest.approx((apart + 2 * cross) / 25, rel=1e-5)


def test_orthogonality_separate_adds_the_means_of_the_kinds():
    a, b, c = torch.randn(3, 9), torch.randn(4, 9), torch.randn(2, 4)
    found = orthogonality([Bases(a, [], "3x3"), Bases(b, [], "3x3"), Bases(c, [], "1x1")], "separate")
    expected = (_entries(a).sum() + _entries(b).sum()) / 25 + _entries(c).mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_orthogonality_with_unique_visits_the_published_entries():
    shared, own = torch.randn(3, 8), [torch.randn(2, 8), torch.randn(2, 8)]
    total, count = 0.0, 0
    everything = [*shared, *own[0], *own[1]]
    for i, row in enumerate(shared):  # shared rows against all rows
        for j, other in enumerate(everything):
            total += float(row @ other - float(i == j)) ** 2
            count += 1
    for layer in own:  # own rows among themselves; own rows of different layers are free
        for i, row in enumerate(layer):
            for j, other in enumerate(layer):
                total += float(row @ other - float(i == j)) ** 2
                count += 1
    assert count == 3 * 7 + 2 * 2 * 2
    assert float(orthogonality([Bases(shared, own)], "with-unique")) == pytest.approx(total / count, rel=1e-5)


def test_orthonormal_rows_cost_nothing_and_no_banks_cost_nothing():
    rows = torch.linalg.qr(torch.randn(9, 4)).Q.T
    assert float(orthogonality([Bases(rows, [])])) < 1e-10
    assert float(orthogonality([])) == 0


def test_collect_bases_reads_banks_and_own_filters_and_honours_the_switch():
    net = shared_net(unique=2)
    (found,) = collect_bases(net)
    assert found.shared.shape == (6, 72)
    assert [tuple(u.shape) for u in found.unique] == [(2, 72)] * 4
    assert torch.equal(found.shared, net.sharefold_banks["layer1"].basis.flatten(1))
    orthogonality([found], "with-unique").backward()
    assert net.sharefold_banks["layer1"].basis.grad is not None
    assert net.layer1[0].conv1.unique.grad is not None
    assert collect_bases(net, skip="^layer1$") == []
    assert collect_bases(Small()) == []


def test_matching_blocks_finds_repeated_blocks_by_name():
    net = Small()
    assert matching_blocks(shared_net(), net) == ["layer1.0", "layer1.1"]
    assert matching_blocks(net, net, r"layer1\.1\.conv.") == ["layer1.1.conv1", "layer1.1.conv2"]
    with pytest.raises(SharefoldError, match="no such block"):
        matching_blocks(net, net, "nothing")


def test_blocks_are_matched_by_what_gives_a_tensor():
    """Innermost blocks of which only the parts are called have nothing to compare; what is around them has."""

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)))

        def forward(self, x):
            first, second = self.parts[0]
            return second(first(x))

    net = nn.Sequential(Around(), Around())
    assert matching_blocks(net, net) == ["0.parts.0", "1.parts.0"]
    giving = giving_tensors(net, lambda: net(torch.randn(2, 3, 4, 4)))
    assert matching_blocks(net, net, "auto", giving) == ["0", "1"]
    assert not any(module._forward_hooks for module in net.modules())


def test_taps_keep_outputs_and_leave_no_hooks():
    net = Small().eval()
    x = torch.randn(2, 3, 8, 8)
    with Taps(net, ["layer1.0", "layer1.1"]) as taps:
        net(x)
        first, second = taps.outputs()
        assert torch.allclose(net.layer1[1](first), second)
        with pytest.raises(SharefoldError, match=r"layer1\.0"):
            Taps(net, ["layer1.0"]).outputs()
    assert all(not module._forward_hooks for module in net.modules())
