"""Outputs: whole or not at all, under their name at every moment, with a user's own files left alone."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from command_line import call

import sharefold
from sharefold import checkpoint, files
from sharefold.errors import SharefoldError
from sharefold.exchange import exchange
from sharefold.finetune.run_state import write_state
from sharefold.format import FileConfig, carry_config
from sharefold.plans import Plan
from sharefold.sources import build_base

BASE = {"library": "timm", "name": "digits_resnet", "kwargs": {}}


def network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = build_base(BASE)
    carry_config(model, FileConfig(Plan([], 0, 0), BASE))
    return model


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def write(text: str) -> files.Callable[[Path], None]:
    def fill(folder: Path) -> None:
        (folder / files.CONFIG_NAME).write_text(text)
        (folder / "50").mkdir()
        (folder / "50" / files.CONFIG_NAME).write_text(text)

    return fill


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_permissions_are_those_of_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        files.write_folder(tmp_path / "out", write("a"))
        files.write_file(tmp_path / "one", lambda path: path.write_text("x"))
    finally:
        os.umask(before)
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*"), tmp_path / "one"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask


@pytest.mark.parametrize("step", [True, False])
def test_replacing_keeps_a_users_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: bool) -> None:
    if not step:
        monkeypatch.setattr(files, "exchange", lambda *_: False)
    out = tmp_path / "out"
    files.write_folder(out, write("a"))
    (out / "thesis.txt").write_text("years")
    (out / "thesis.txt").chmod(0o640)
    (out / "notes" / "deep").mkdir(parents=True)
    (out / "notes" / "deep" / "README.md").write_text("mine")
    (out / "50" / "log.txt").write_text("mine too")
    (out / "README.md").write_text("card")
    (out / "25").mkdir()
    (out / "25" / files.CONFIG_NAME).write_text("stale")
    (out / "link").symlink_to("nowhere")
    files.write_folder(out, write("b"))
    assert names(out) == sorted([
        "50", f"50/{files.CONFIG_NAME}", "50/log.txt", "link", "notes", "notes/deep", "notes/deep/README.md", files.CONFIG_NAME,
        "thesis.txt",
    ])  # fmt: skip
    assert (out / files.CONFIG_NAME).read_text() == (out / "50" / files.CONFIG_NAME).read_text() == "b"
    assert (out / "thesis.txt").read_text() == "years" and stat.S_IMODE((out / "thesis.txt").stat().st_mode) == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_the_old_folder_and_what_is_in_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    files.write_folder(out, write("a"))
    (out / "mine").write_text("x")
    before = names(out)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    with pytest.raises(SharefoldError, match="could not be written: No space left on device"):
        files.write_folder(out, fail)
    def fail_too(file: Path) -> None:
        file.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(SharefoldError, match="No space left"):
        files.write_file(tmp_path / "one", fail_too)
    assert names(out) == before and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_exchange(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.write_text("2")
    if not exchange(one, two):
        pytest.skip("this file system has no exchange")
    assert one.read_text() == "2" and two.is_dir()
    assert exchange(one, tmp_path / "gone") is False


def test_a_folder_is_never_without_its_name(tmp_path: Path) -> None:
    """Two processes write, this one reads: every read gives one of the two networks whole."""
    if not exchange(tmp_path, tmp_path):
        pytest.skip("this file system has no exchange")
    out = tmp_path / "net"
    models = [network(1), network(2)]
    sharefold.save(models[0], out)
    stop = threading.Event()

    def keep_writing(model: torch.nn.Module) -> None:
        while not stop.is_set():
            sharefold.save(model, out, force=True)

    writers = [threading.Thread(target=keep_writing, args=(model,)) for model in models]
    for writer in writers:
        writer.start()
    try:
        x = torch.randn(2, 1, 8, 8)
        with torch.no_grad():
            wanted = [model.eval()(x) for model in models]
            for _ in range(12):
                found = sharefold.load(out)(x)
                assert any(torch.equal(found, w) for w in wanted)
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def dead_process() -> int:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_what_dead_processes_left_is_removed_or_put_back(tmp_path: Path) -> None:
    process, out = dead_process(), tmp_path / "out"
    for name in (f".out.{process}.tmp", f".out.{files._HOST}-{process}-3.tmp", f".out.{process}.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("lost" if name.endswith("old") else "")
    alive = tmp_path / f".out.{files._HOST}-{os.getppid()}-0.tmp"
    other = tmp_path / f".out.elsewhere-{process}-0.tmp"
    for folder in (alive, other):
        folder.mkdir()
    (tmp_path / ".out.txt").write_text("a user's")

    def fill(folder: Path) -> None:
        assert (out / "x").read_text() == "lost"  # what a kill between two renames took away is back
        (folder / "y").write_text("")

    files.write_folder(out, fill)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([alive.name, other.name, ".out.txt", "out"])
    os.utime(other, (0, 0))
    files.write_folder(out, write("b"))
    assert not other.exists() and alive.exists()


@contextmanager
def full_disk(free: int) -> Iterator[None]:
    """No file may grow beyond ``free`` bytes: the system answers as it does when a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("target", ["net", "net.safetensors"])
def test_a_full_disk_while_saving(tmp_path: Path, target: str) -> None:
    out = sharefold.save(network(1), tmp_path / target)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with full_disk(100_000), pytest.raises(SharefoldError, match="could not be written") as error:
        sharefold.save(network(2), out, force=True)
    assert "\n" not in str(error.value)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "verb",
    [
        ["expand", "net", "-o", "out.safetensors"],
        ["expand", "net", "-o", "out.pt"],
        ["export", "net", "--format", "dense", "-o", "out.pth"],
        ["export", "net", "--format", "pt2", "-o", "out.pt2"],
        ["convert", "timm:digits_resnet", "--plan", "plan.json", "--no-repair", "--calib", "digits", "--calib-count", "8",
         "-o", "out"],
    ],
    ids=lambda verb: verb[0] + verb[-1][3:],
)  # fmt: skip
def test_verbs_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    sharefold.save(network(), tmp_path / "net")
    (tmp_path / "plan.json").write_text(Plan([], 0, 0).to_json())
    before = names(tmp_path)
    with full_disk(100_000):
        done = call(*verb)
    assert done.exit_code == 2, done.output
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: ")
    assert names(tmp_path) == before


def test_a_run_state_on_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    write_state(path, {"updates": 1})
    before = path.read_bytes()
    with full_disk(100_000), pytest.raises(SharefoldError, match="could not be written"):
        write_state(path, {"model": torch.randn(100_000)})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_a_reader_sees_one_network_though_its_parts_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are read from the old folder and the copy of the configuration from the new one: read again."""
    out = sharefold.save(network(1), tmp_path / "net", metrics={"top1": 0.1})
    later, calls = network(2), []
    later.sharefold_config = FileConfig(Plan([], 5, 5), BASE)
    read = checkpoint.read_config_file

    def slow(file: Path) -> FileConfig:
        calls.append(file)
        if len(calls) == 1:
            sharefold.save(later, out, force=True)
        return read(file)

    monkeypatch.setattr(checkpoint, "read_config_file", slow)
    found = sharefold.load(out)
    assert found.sharefold_config.plan.params_before == 5 and len(calls) == 2
