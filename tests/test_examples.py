"""The examples run as they stand, offline, and print what they promise."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from doc_blocks import in_short

import sharefold

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What it prints, in this process and with fewer images and methods where it leaves them open."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with in_short():
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(script: Path) -> None:
    assert len(script.read_text().splitlines()) < 40


def test_quickstart(tmp_path: Path, run_here: Callable[..., str]) -> None:
    out = run_here("quickstart.py")
    kept, before = re.search(r"([\d,]+) parameters in quickstart-shared", out), 198_898
    assert kept is not None and int(kept[1].replace(",", "")) <= before / 2
    assert "parameters (" in out and float(re.search(r"differs by (\S+)", out)[1]) < 1e-3  # type: ignore[index]
    model = sharefold.load(tmp_path / "quickstart-shared")
    assert f"{sum(p.numel() for p in model.parameters()):,}" == kept[1]


def test_own_network(tmp_path: Path, run_here: Callable[..., str]) -> None:
    out = run_here("own_network.py", "net")
    assert "logits identical: True" in out and "parameters (" in out
    assert (tmp_path / "net" / "model.safetensors").is_file()


def test_finetune_shared(tmp_path: Path, run_here: Callable[..., str]) -> None:
    out = run_here("finetune_shared.py", "tuned")
    original, converted, tuned = (float(share) / 100 for share in re.findall(r": +([\d.]+)%", out))
    assert original > 0.95 and converted < original and tuned > converted
    assert sharefold.load(tmp_path / "tuned").sharefold_config.plan.params_after <= 0.08 * 198_898
