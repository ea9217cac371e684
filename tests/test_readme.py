"""The README keeps its word: two set-up commands, examples that run, tables that come from results."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import ModuleType

import click
import pytest
from doc_blocks import ROOT, commands, make_files, run_document
from script_loader import load_script

from sharefold_cli.main import cli

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


def test_verbs_and_options_of_the_goals_exist() -> None:
    """``sharefold VERB ... --option`` in the table; an option alone is one of ``convert``."""
    goals = README.read_text().split("| goal | command |")[1].split("\n\n")[0]
    lines = re.findall(r"`([^`]+)`", goals)
    assert sum(line.startswith("sharefold ") for line in lines) >= 15
    for line in lines:
        words = shlex.split(line if line.startswith("sharefold ") else f"sharefold convert {line}")
        command = cli.get_command(click.Context(cli), words[1])
        assert command is not None, line
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert [word for word in words[2:] if word.startswith("-") and word not in known] == [], line


def tables_module() -> ModuleType:
    for name in ("table_parts", "gpu_tables", "speed_tables", "task_tables"):  # which it imports
        load_script(f"benchmarks/{name}.py")
    return load_script("benchmarks/tables.py")


def test_tables_are_those_of_the_results() -> None:
    module = tables_module()
    names = set()
    for path in module.PAGES:
        text = path.read_text()
        assert module.render(text) == text, f"{path.name}: run python benchmarks/tables.py"
        names |= set(re.findall(r"<!-- table: (\w+) -->", text))
    assert names == set(module.TABLES)
    assert json.loads(module.DATES.read_text()) == module.dates(), "results have changed: run python benchmarks/tables.py"


def test_scripts_named_in_documents_exist() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for script in re.findall(r"(?:benchmarks|scripts)/\w+\.py", path.read_text()):
            assert (ROOT / script).exists(), f"{path.name}: {script}"
