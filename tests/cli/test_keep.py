"""``--keep-agreement``: what is promised is the lower end of an interval, on images that decided nothing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import call

from sharefold.calibration.parts import Parts
from sharefold.errors import SharefoldError
from sharefold.outputs import Figure, parse_target
from sharefold.outputs.intervals import wilson
from sharefold_cli.agreement_text import agreement_text, share_text
from sharefold_cli.keep import check_enough, held_out_for, smallest_keeping

COUNT = 10_000


def figure(share: float, count: int) -> Figure:
    return Figure("logits", "logits", "agreement", share, wilson(share, count), count)


class Attempts:
    """Conversions whose agreement is their share of the parameters; nothing under a floor; on ``report`` it may be less."""

    def __init__(self, floor: float, less: float = 0.0) -> None:
        self.floor, self.less, self.shares = floor, less, []

    def __call__(self, model: torch.nn.Module, share: float) -> SimpleNamespace:
        self.shares.append(share)
        if share < self.floor:
            raise SharefoldError("below the floor")
        model.converted = share
        return SimpleNamespace(outputs=[figure(share - self.less, COUNT)], plan=SimpleNamespace(size=share))


class Deciding:
    """On ``decide``, agreement is the share of the parameters."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def measure(self, model: torch.nn.Module) -> tuple[None, list[Figure]]:
        return None, [figure(model.converted, len(self.images))]


def calibration(decide: int = COUNT, report: int = COUNT, comparable: bool = True) -> SimpleNamespace:
    everything = torch.arange(decide + report)
    parts = Parts(everything[:0], everything[:decide], everything[decide:])
    return SimpleNamespace(
        images=torch.zeros(len(everything), 1), parts=parts, original=None, comparable=comparable, comparison=Deciding,
        decide_images=torch.zeros(decide, 1),
    )  # fmt: skip


@pytest.mark.parametrize(("keep", "floor", "share"), [("50%", 0.0, 0.51), ("20%", 0.6, 0.6), ("90%", 0.1, 0.906)])
def test_bisection_ends_just_above_the_limit(keep: str, floor: float, share: float) -> None:
    model, target = torch.nn.Identity(), parse_target(keep)
    found, done = smallest_keeping(model, target, Attempts(floor), calibration())
    assert share <= done.plan.size <= share + 0.04 and found.converted == done.plan.size
    assert wilson(done.plan.size, COUNT)[0] >= target.value and not hasattr(model, "converted")


def test_the_lower_end_decides() -> None:
    """95 % of 100 images agree at the largest size: that does not show 90 %; of 1,000 it does."""
    with pytest.raises(SharefoldError, match=r"90%: at 95.0% of the parameters .* 95.00% \(88.8.* on 100 decide images"):
        smallest_keeping(torch.nn.Identity(), parse_target("90%"), Attempts(0.0), calibration(decide=100))
    found = smallest_keeping(torch.nn.Identity(), parse_target("90%"), Attempts(0.0), calibration(decide=1000))
    assert found[1].plan.size >= 0.91


def test_the_report_has_the_last_word() -> None:
    """What the decide images promise and the report does not hold is not taken: the next larger network that holds it is."""
    attempts = Attempts(0.0, less=0.1)
    done = smallest_keeping(torch.nn.Identity(), parse_target("60%"), attempts, calibration())[1]
    assert done.outputs[0].interval[0] >= 0.6 and done.plan.size > min(attempts.shares) + 0.1
    larger = [share for share in attempts.shares if 0.61 < share < done.plan.size]
    assert larger and all(wilson(share - 0.1, COUNT)[0] < 0.6 for share in larger)
    with pytest.raises(SharefoldError, match=r"at 95.0% of the parameters .* 85.00% .* on 10000 report images"):
        smallest_keeping(torch.nn.Identity(), parse_target("90%"), Attempts(0.0, less=0.1), calibration())


def test_bisection_gives_up_at_once_where_nothing_helps() -> None:
    attempts = Attempts(0.0)
    with pytest.raises(SharefoldError, match=r"--keep 99%: at 95.0%"):
        smallest_keeping(torch.nn.Identity(), parse_target("99%"), attempts, calibration())
    with pytest.raises(SharefoldError, match="below the floor"):
        smallest_keeping(torch.nn.Identity(), parse_target("50%"), Attempts(0.99), calibration())
    assert len(attempts.shares) == 1


def test_promises_that_no_result_could_show_are_refused() -> None:
    target = parse_target("99%")
    assert held_out_for(target) == 762 and held_out_for(parse_target("psnr 40")) == 2
    check_enough(calibration(381, 381), target)
    with pytest.raises(SharefoldError, match=r"99%: of 761 .* 380 can be reported on, that takes 1,270 images or more"):
        check_enough(calibration(381, 380), target)
    with pytest.raises(SharefoldError, match="no number of images proves 100%"):
        parse_target("100%")
    with pytest.raises(SharefoldError, match="nothing to compare"):
        check_enough(calibration(comparable=False), parse_target("50%"))


def test_agreement_in_words() -> None:
    done = SimpleNamespace(
        agreement=0.98, agreement_interval=wilson(0.98, 150), report_images=150, seen_before=False, new_agreement=0.96,
        new_agreement_interval=wilson(0.96, 150),
    )  # fmt: skip
    assert share_text(0.98, wilson(0.98, 150)) == "98.00% (94.3 to 99.3%)"
    told = agreement_text(done, calibration())
    assert told == "top-1 agreement 98.00% (94.3 to 99.3%) on 150 calibration images kept for the report (95 % interval)"
    done.seen_before = True
    more = "; the network knows these images from its training: of new ones expect 96.00% (91.5 to 98.2%), by mild views of them"
    assert agreement_text(done, calibration()) == told + more
    assert "on real images it may be lower" in agreement_text(done, calibration(), procedural=True)
    done.agreement, done.seen_before = 0.2, False
    assert agreement_text(done, calibration()).endswith("; on most images it says something else: allow more")
    nothing = SimpleNamespace(agreement=None, report_images=0)
    assert agreement_text(nothing, calibration(60, 4)) == "agreement not measured: only 64 images, 200 or more are needed"
    assert "nothing that the network returns" in agreement_text(nothing, calibration(comparable=False))


NET = ["convert", "timm:digits_resnet", "--no-pretrained", "--no-repair", "--method", "svd"]


def test_the_command_keeps_its_promise(tmp_path: Path) -> None:
    result = call(*NET, "--calib-count", "200", "-o", tmp_path / "kept", "--keep-agreement", "75%", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["report_images"] == 50 and report["agreement_interval"] == list(wilson(report["agreement"], 50))
    assert report["agreement_interval"][0] >= 0.75 and report["params"]["after"] < 0.95 * report["params"]["before"]
    assert "on 50 procedural images kept for the report (95 % interval)" in result.stderr
    card = (tmp_path / "kept" / "README.md").read_text()
    assert "95 % interval of 50 report images, on which nothing was fitted) |" in card


def test_too_few_images_for_a_figure(tmp_path: Path) -> None:
    result = call(*NET, "--calib-count", "20", "-o", tmp_path / "net", "--budget", "60%", "--json")
    report = json.loads(result.stdout)
    assert report["agreement"] is None and report["agreement_interval"] is None and report["report_images"] == 0
    assert "agreement not measured: only 20 images, 200 or more are needed" in result.stderr
    refused = call(*NET, "--calib-count", "20", "-o", tmp_path / "kept", "--keep-agreement", "75%")
    assert refused.exit_code == 2 and not (tmp_path / "kept").exists()
    assert "of 20 calibration images 0 can be reported on, that takes 200 images or more" in refused.stderr
