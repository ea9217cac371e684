"""What `pip install` takes along: the editable installation that tests run from hides whatever is left out of a wheel."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")  # Python 3.11
ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def files(folder: str) -> list[Path]:
    """Those under version control, or all of an unpacked archive."""
    listed = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split() or [str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*") if p.is_file()]
    return [Path(name) for name in names if "__pycache__" not in name]


def test_every_package_is_installed() -> None:
    folders = {str(path.parent).replace("/", ".") for path in files("sharefold") if path.suffix == ".py"}
    assert len(folders) > 10 and folders | {"sharefold_cli"} == set(SETTINGS["packages"])
    assert {path.parent for path in files("cli")} == {Path("cli")}


def test_every_other_file_is_installed() -> None:
    others = {path for path in files("sharefold") if path.suffix != ".py"}
    patterns = SETTINGS["package-data"]["sharefold"]
    taken = {path.relative_to(ROOT) for pattern in patterns for path in (ROOT / "sharefold").glob(pattern)}
    assert others and others <= taken
