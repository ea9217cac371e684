"""Networks that hold the codes of their file: the same answers, in the memory of the file."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import sharefold
from sharefold.errors import SharefoldError
from sharefold.finetune import finetune
from sharefold.plans import Plan
from sharefold.store import quantize_

from .tiny import Tiny, converted, images, trained

CASES: list[tuple[dict[str, object], str]] = [
    *(({}, text) for text in ("fp16", "int8", "int4", "kmeans4", "mixed:step=0.01", "mixed:step=0.0002")),
    *((form, "int8") for form in ({"pivoted": True}, {"method": "tucker"}, {"shared": False})),
    *((form, "mixed:step=0.01") for form in ({"pivoted": True}, {"method": "tucker"}, {"shared": False})),
]


def rounded(tmp_path: Path, text: str, **form: object) -> Path:
    original, model = converted(**form)
    quantize_(model, text, images(), original=original)
    return sharefold.save(model, tmp_path / "net.safetensors")


@pytest.mark.parametrize(("form", "text"), CASES)
def test_the_same_answers_bit_for_bit(form: dict[str, object], text: str, tmp_path: Path) -> None:
    file = rounded(tmp_path, text, **form)
    plain = sharefold.load(file, model=trained())
    held = sharefold.load(file, model=trained(), keep_codes=True)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(held(images()), plain(images()))
        assert torch.equal(copy.deepcopy(held)(images()), plain(images()))
    assert all(p.dtype != torch.float32 for p in held.parameters() if p.dim() >= 2 and p.shape[1] > 1)


def memory_of(model: nn.Module) -> int:
    """Bytes of all tensors, and of what layers keep between runs."""
    kept = [value for module in model.modules() for name, value in vars(module).items() if name.startswith("_kept")]
    values = [entry.value for value in kept if (entry := value._entry) is not None]
    parts = [part for value in values for part in (value if isinstance(value, tuple) else (value,)) if part is not None]
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers(), *parts])


@pytest.mark.parametrize("shared", [False, True])
def test_an_int8_network_takes_little_more_memory_than_its_file(shared: bool, tmp_path: Path) -> None:
    """Also after it has run: no weight that was put together is kept."""
    original = Tiny(width=64).eval()
    model = copy.deepcopy(original)
    plan = sharefold.plan(model, "60%", images(), method="basis") if shared else Plan([], 0, 0)
    sharefold.convert_(model, plan, images(), repair=False)
    quantize_(model, "int8", images(), original=original)
    file = sharefold.save(model, tmp_path / "net.safetensors")
    held = sharefold.load(file, model=copy.deepcopy(original), keep_codes=True)
    with torch.no_grad():
        held(images())
    assert memory_of(held) < 1.2 * file.stat().st_size
    plain = sharefold.load(file, model=copy.deepcopy(original))
    assert memory_of(plain) > 3 * file.stat().st_size


def test_it_is_for_inference_alone(tmp_path: Path) -> None:
    file = rounded(tmp_path, "int8")
    held = sharefold.load(file, model=trained(), keep_codes=True)
    for what, work in {
        "save": lambda: sharefold.save(held, tmp_path / "other.safetensors"),
        "expand": lambda: sharefold.expand(held),
        "convert": lambda: sharefold.convert_(held, Plan([], 0, 0), images()),
        "store": lambda: quantize_(held, "int4", images()),
        "finetune": lambda: finetune(held, (images(), torch.zeros(48).long()), epochs=1),
    }.items():
        with pytest.raises(SharefoldError, match=rf"^{what}: layer '.*' holds the codes of its file: load the network without"):
            work()
    assert not (tmp_path / "other.safetensors").exists()


@pytest.mark.parametrize("text", ["fp16", "int8", "kmeans4"])
def test_other_number_types_get_numbers_of_theirs(text: str, tmp_path: Path) -> None:
    file = rounded(tmp_path, text)
    plain = sharefold.load(file, model=trained())
    held = sharefold.load(file, model=trained(), keep_codes=True)
    wanted = plain(images())
    with torch.no_grad():
        for kind in (torch.float64, torch.bfloat16, torch.float32):
            found = held.to(kind)(images().to(kind))
            allowed = 0.1 if kind == torch.bfloat16 else 0.01
            assert found.dtype == kind and float((found - wanted).norm() / wanted.norm()) < allowed
    assert torch.equal(held.stem.weight, plain.stem.weight) and torch.equal(held.head.weight, plain.head.weight)


def test_a_network_that_was_not_rounded_has_no_codes(tmp_path: Path) -> None:
    _, model = converted()
    file = sharefold.save(model, tmp_path / "net.safetensors")
    with pytest.raises(SharefoldError, match="none of its matrices is rounded: convert with --store int8"):
        sharefold.load(file, model=trained(), keep_codes=True)
