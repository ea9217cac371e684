"""Twins, architectures with the same names and shapes: the file's BatchNorms say which one it was trained as."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Chain
from torch import Tensor, nn

from sharefold.architectures.matching import Match
from sharefold.errors import SharefoldWarning
from sharefold.procedural import dead_leaves
from sharefold.sources import twins
from sharefold.sources.twins import settled

CONFIG = {"input_size": (3, 24, 24), "mean": (0.5,) * 3, "std": (0.5,) * 3}


class Net(Chain):
    """Strided convolutions; ``kind``: pads on both sides, twice as much, or blurs first; "same" computes what "both" does."""

    def __init__(self, kind: str) -> None:
        super().__init__(4, stride=2, padding=0)
        self.kind = kind
        for norm in self.norms:
            norm.momentum = None  # type: ignore[assignment]

    def before(self, x: Tensor) -> Tensor:
        if self.kind == "blur":
            x = F.avg_pool2d(x, 3, 1, 1)
        return F.pad(x, (2, 2, 2, 2) if self.kind == "wide" else (1, 1, 1, 1))


def base(name: str) -> dict[str, Any]:
    return {"library": "timm", "name": name, "kwargs": {}}


def state(kind: str, trained: bool = True) -> dict[str, Tensor]:
    torch.manual_seed(0)
    net = Net(kind)
    for _ in range(4 if trained else 0):
        net(2 * dead_leaves(100, (24, 24), 3, 5) - 1)
    return net.state_dict()


def look(config: dict[str, Any]) -> Tensor:
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (dead_leaves(32, (24, 24), 3, 1) - mean) / std


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    def preprocessing(model: nn.Module, base: dict[str, Any], file: str) -> dict[str, Any]:
        return {**CONFIG, "mean": (0.0,) * 3} if "shifted" in base["name"] else CONFIG

    monkeypatch.setattr(twins, "build_base", lambda base: Net(base["name"].split("-")[0]).eval())
    monkeypatch.setattr(twins, "preprocessing", preprocessing)


def match(first: str, *others: str, rule: str = "plainest name") -> Match:
    return Match(base(first), tuple(f"timm:{name}" for name in others), rule, frozenset(), tuple(map(base, others)))


@pytest.mark.parametrize("real", [True, False])
def test_the_twin_that_the_file_was_trained_as(real: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for true, other in (("both", "blur"), ("blur", "both"), ("both", "both-shifted")):
            for given in (match(true, other), match(other, true)):
                found = settled(given, state(true.split("-")[0]), "x.pt", look if real else None)
                assert found.base["name"] == true and found.others == (f"timm:{other}",) and found.rule == "its BatchNorms"


def test_a_name_is_doubted_on_real_images_alone() -> None:
    named = match("both", "blur", rule="name in the file name")
    assert settled(named, state("blur"), "both.pt") is named
    with pytest.warns(SharefoldWarning, match=r"both.pt is named like timm:both, but .* trained as timm:blur, which is taken"):
        assert settled(named, state("blur"), "both.pt", look).base["name"] == "blur"
    found = settled(named, state("both"), "both.pt", look)
    assert found.base["name"] == "both" and found.rule == "name in the file name"


def test_one_and_the_same_function_is_no_question() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = match("both", "both-again")
        assert settled(given, state("both"), "x.pt") is given
        found = settled(match("blur", "both", "both-again"), state("both"), "x.pt")
        assert found.base["name"] == "both" and found.others == ("timm:blur", "timm:both-again")


def test_no_evidence_changes_nothing() -> None:
    for given, tensors in ((match("both", "blur"), state("blur", trained=False)), (match("both"), state("blur"))):
        assert settled(given, tensors, "x.pt", look) is given


def test_where_it_is_not_clear_the_candidates_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twins, "CLEAR", 1e6)
    given = match("both", "blur")
    with pytest.warns(SharefoldWarning, match=r"x.pt fits timm:both, which is taken, and as well timm:blur, .* with --arch"):
        assert settled(given, state("blur"), "x.pt") is given
