"""Every command and every Python block of docs/ runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from doc_blocks import ROOT, commands, make_files, run_document

from sharefold_cli.main import available

DOCUMENTS = sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_document_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path)
    run_document(path)


@pytest.mark.parametrize("path", [*DOCUMENTS, *ROOT.glob("*.md")], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_verbs_exist(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (path.parent / target).exists(), target
    for line in commands(path):
        if line.startswith("sharefold "):
            assert line.split()[1] in available(), line


def test_the_index_lists_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / target).resolve() for target in re.findall(r"\]\(([^)#]+)", index.read_text())}
    api = ROOT / "docs" / "api"  # has an index of its own
    assert {path for path in DOCUMENTS if path.parent != api} <= {*linked, index} and api / "README.md" in linked


def test_every_method_that_a_budget_can_choose_has_a_page() -> None:
    from sharefold.methods import METHODS

    heads = [page.read_text().splitlines()[0] for page in (ROOT / "docs" / "methods").glob("*.md")]
    assert [name for name in METHODS if not any(name in re.split("[,:# ]+", head) for head in heads)] == []
