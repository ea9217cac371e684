"""Every figure against one worked out by hand."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharefold.errors import SharefoldError
from sharefold.measure import agreement, count_macs, count_parameters, evaluate, first_logits, latency, model_bytes
from sharefold.outputs import read_outputs
from sharefold.running import evaluating


class Fixed(nn.Module):
    """Logits that depend on the first pixel alone: row number ``int(pixel)`` of a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, x: Tensor) -> Tensor:
        return self.table[x[:, 0, 0, 0].long()]


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),
    )  # fmt: skip


def test_parameters_and_bytes() -> None:
    model = small()
    assert count_parameters(model) == 216 + 16 + 45
    model[0].weight.requires_grad_(False)
    assert count_parameters(model, trainable_only=True) == 61
    assert model_bytes(model) == 4 * (277 + 16) + 8  # num_batches_tracked is an int64
    model[1].register_buffer("scratch", torch.zeros(1000), persistent=False)
    assert model_bytes(model) == 4 * (277 + 16) + 8
    assert model_bytes(model.half()) == 2 * (277 + 16) + 8


def test_a_shared_tensor_counts_once() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    assert count_parameters(model) == 16 and model_bytes(model) == 64


def test_macs_of_one_image() -> None:
    model = small().train()
    wanted = 8 * 3 * 9 * 16 * 16 + 8 * 5
    assert count_macs(model, torch.zeros(4, 3, 16, 16)) == wanted
    assert all(module.training for module in model.modules())
    grouped = nn.Conv2d(8, 8, 3, groups=4, stride=2, padding=1)
    assert count_macs(grouped, torch.zeros(1, 8, 10, 10)) == 8 * 2 * 9 * 25
    assert count_macs(small().to("meta"), torch.zeros(1, 3, 16, 16, device="meta")) == wanted


def test_macs_leave_out_what_is_cached() -> None:
    class Composed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 4))
            self.cache: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.cache is None:
                self.cache = self.a @ self.b
            return x @ self.cache

    assert count_macs(Composed(), torch.randn(1, 4)) == 16


def test_evaluating_restores_every_mode() -> None:
    model = small().train()
    model[1].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
    assert model.training and not model[1].training and model[0].training and torch.is_grad_enabled()


def test_first_logits() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert first_logits(a) is a
    assert first_logits({"aux": b, "out": a}) is a
    assert first_logits((a, b)) is a and first_logits([(a, b)]) is a
    with pytest.raises(SharefoldError, match="NoneType"):
        first_logits(None)


def test_agreement_by_hand() -> None:
    a = Fixed(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    b = Fixed(torch.tensor([[1.0, 0.0], [3.0, 1.0]]))
    images = torch.tensor([0.0, 0, 0, 1]).view(4, 1, 1, 1)
    found = agreement(a, b, images, batch_size=3)

    def kl(p: list[float], q: list[float]) -> float:
        p, q = ([math.exp(v) / sum(map(math.exp, row)) for v in row] for row in (p, q))
        return sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))

    assert found.top1 == 0.75
    assert found.kl == pytest.approx((3 * kl([2, 0], [1, 0]) + kl([0, 1], [3, 1])) / 4, rel=1e-5)
    assert agreement(a, a, images) == (1.0, pytest.approx(0.0, abs=1e-7))


def test_agreement_counts_pixels_of_segmentation() -> None:
    class Map(nn.Module):
        def __init__(self, flip: bool) -> None:
            super().__init__()
            self.flip = flip

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            out = torch.stack([x[:, 0], -x[:, 0]], 1)
            if self.flip:
                out[:, :, 0, 0] = out[:, :, 0, 0].flip(1)
            return {"out": out}

    images = torch.randn(5, 1, 2, 2)
    reading = read_outputs(Map(False), images, overrides="logits:axis=1")
    assert agreement(Map(False), Map(True), images, reading=reading).top1 == 0.75
    with pytest.raises(SharefoldError, match="cannot be compared"):
        agreement(Fixed(torch.zeros(1, 2)), Fixed(torch.zeros(1, 3)), torch.zeros(1, 1, 1, 1))
    with pytest.raises(SharefoldError, match="no images"):
        agreement(Map(False), Map(True), torch.zeros(0, 1, 2, 2))


def test_evaluate_by_hand() -> None:
    table = torch.eye(7) * 3
    table[1] = torch.tensor([9.0, 5, 8, 7, 6, 4, 3])  # class 1 is fourth best: wrong, but in the top five
    table[2] = torch.tensor([9.0, 8, 0, 7, 6, 5, 4])  # class 2 is last
    model = Fixed(table)
    images, labels = torch.tensor([0.0, 1, 2, 3]).view(4, 1, 1, 1), torch.tensor([0, 1, 2, 3])
    seen: list[int] = []
    result = evaluate(model, [(images[:3], labels[:3]), (images[3:], labels[3:])], progress=seen.append)
    assert (result["top1"], result["top5"], result["images"]) == (0.5, 0.75, 4) and seen == [3, 4]
    assert result["loss"] == pytest.approx(float(nn.functional.cross_entropy(table[:4], labels)), rel=1e-5)
    assert result["seconds"] > 0 and "output" not in result
    assert evaluate(model, [(images, labels)], limit=1)["top1"] == 1.0
    assert evaluate(model, [(images[:2], labels[:2]), (images[2:], labels[2:])], limit=3)["images"] == 3


def test_evaluate_takes_the_logarithm_of_probabilities() -> None:
    table = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    images, labels = torch.arange(6.0).view(6, 1, 1, 1), torch.tensor([0, 1, 2, 3, 4, 5])
    plain, soft = (evaluate(Fixed(values), [(images, labels)]) for values in (table, table.softmax(1)))
    assert soft["loss"] == pytest.approx(plain["loss"], rel=1e-5) and soft["top1"] == plain["top1"]
    certain = torch.eye(6)  # what is impossible is not infinitely wrong
    assert evaluate(Fixed(certain), [(images, labels.roll(1))])["loss"] == pytest.approx(math.log(1e30), rel=1e-4)


def test_evaluate_says_which_of_several_outputs_it_counts() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            right = nn.functional.one_hot(x.flatten().long(), 3).float()
            return {"wrong": [right.flip(1), right.roll(1, 1)], "logits": right}

    images, labels = torch.tensor([0.0, 1, 2]).view(3, 1, 1, 1), torch.tensor([0, 1, 2])
    result = evaluate(Two(), [(images, labels)])
    assert (result["output"], result["top1"]) == ("logits", 1.0)


@pytest.mark.parametrize(
    ("labels", "words"),
    [([0, 2], "go up to 2, the model has 2 outputs"), ([0, -1], "no labels"), ([[0, 1], [1, 0]], "have shape (2, 2)")],
)
def test_evaluate_refuses_labels_that_do_not_fit(labels: list[Any], words: str) -> None:
    with pytest.raises(SharefoldError, match=re.escape(words)):
        evaluate(Fixed(torch.eye(2)), [(torch.zeros(2, 1, 1, 1), torch.tensor(labels))])


def test_evaluate_without_images_or_classes() -> None:
    with pytest.raises(SharefoldError, match="no images"):
        evaluate(small(), [])
    with pytest.raises(SharefoldError, match="eval wants"):
        evaluate(nn.Conv2d(3, 2, 1), [(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64))])


def test_latency_is_a_median_of_real_passes() -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return x

    threads = torch.get_num_threads()
    assert latency(Counting(), torch.zeros(1), repeats=5, warmup=2, threads=1) > 0
    assert Counting.calls == 7 and torch.get_num_threads() == threads
    with pytest.raises(SharefoldError, match="at least 1"):
        latency(Counting(), torch.zeros(1), repeats=0)


def test_peak_memory_grows_with_use() -> None:
    """In a process of its own: after other tests it would take gigabytes to exceed what was used so far."""
    code = (
        "import torch; from sharefold.measure import peak_memory; before = peak_memory()\n"
        "block = torch.ones(before // 4 + 16_000_000)\n"  # as large as everything so far, and 64 MB more
        "assert block.sum() > 0; print(before, peak_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 0 < before + 32_000_000 < after
