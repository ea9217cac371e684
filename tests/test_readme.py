"""The README keeps its word: two set-up commands, examples that run, tables that come from results."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
from doc_blocks import ROOT, commands, make_files, run_document
from script_loader import load_script

README = ROOT / "README.md"


def test_exactly_two_commands_set_it_up() -> None:
    section = README.read_text().split("## Set up")[1].split("\n## ")[0]
    lines = [line for block in re.findall(r"```bash\n(.*?)```", section, flags=re.S) for line in block.splitlines()]
    assert lines == ["pip install -e '.[demo]' && sharefold demo", "pip install -e '.[test]' && pytest"]
    assert not any("pip install" in line for line in commands(README)[2:])


def test_every_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path)
    text = README.read_text().split("## Command line")[1]
    (tmp_path / "readme.md").write_text(text)
    run_document(tmp_path / "readme.md")


def tables_module() -> ModuleType:
    return load_script("benchmarks/tables.py")


def test_tables_are_those_of_the_results() -> None:
    module = tables_module()
    names = set()
    for path in module.PAGES:
        text = path.read_text()
        assert module.render(text) == text, f"{path.name}: run python benchmarks/tables.py"
        names |= set(re.findall(r"<!-- table: (\w+) -->", text))
    assert names == set(module.TABLES)


def test_scripts_named_in_documents_exist() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for script in re.findall(r"(?:benchmarks|scripts)/\w+\.py", path.read_text()):
            assert (ROOT / script).exists(), f"{path.name}: {script}"
