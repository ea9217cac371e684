"""Outputs: whole or not at all, under their name at every moment, with a user's own files left alone."""

from __future__ import annotations

import json
import os
import resource
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call, refused

import sharefold
from sharefold import checkpoint, files
from sharefold.errors import SharefoldError
from sharefold.exchange import exchange
from sharefold.finetune.run_state import write_state
from sharefold.format import FileConfig, carry_config
from sharefold.ownership import CONFIG_NAME, NETWORK_FILES, SWEEP_FILES
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


def write(text: str, *sizes: str) -> files.Callable[[Path], None]:
    """A sweep's folder."""

    def fill(folder: Path) -> None:
        (folder / "sweep.json").write_text(json.dumps({"text": text, "networks": sizes or ["50"]}))
        for size in sizes or ["50"]:
            (folder / size).mkdir()
            (folder / size / CONFIG_NAME).write_text(text)

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
    files.write_folder(out, write("a", "25", "50"))
    mine = {"thesis.txt": "years", "README.md": "notes", "model.safetensors": "own weights", "50/log.txt": "mine too",
            "notes/deep/README.md": "mine", f"best/{CONFIG_NAME}": "a network that the user put there"}  # fmt: skip
    for name, text in mine.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    (out / "thesis.txt").chmod(0o640)
    (out / "notes" / "deep").chmod(0o700)
    (out / "link").symlink_to("nowhere")
    out.chmod(0o750)
    files.write_folder(out, write("b"))
    found = {str(p.relative_to(out)): p.read_text() for p in out.rglob("*") if p.is_file()}
    assert found == {**mine, "sweep.json": (out / "sweep.json").read_text(), f"50/{CONFIG_NAME}": "b"}
    assert json.loads(found["sweep.json"])["text"] == "b"
    assert os.readlink(out / "link") == "nowhere" and not (out / "25").exists()
    modes = {name: stat.S_IMODE((out / name).stat().st_mode) for name in (".", "thesis.txt", "notes/deep")}
    assert modes == {".": 0o750, "thesis.txt": 0o640, "notes/deep": 0o700}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "name", ["50", "README.md/mine.txt", "best/README.md", f"50/{CONFIG_NAME}/mine.txt", "sweep.csv/mine.txt"]
)
def test_a_users_file_with_the_name_of_an_output(tmp_path: Path, name: str) -> None:
    """A sweep with one network, ``best``; the folder was a sweep's with another."""
    out = tmp_path / "out"
    files.write_folder(out, write("a", "25"))
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("mine")
    before = {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}

    def fill(folder: Path) -> None:
        write("b", "best", "50")(folder)
        (folder / "sweep.csv").write_text("")
        (folder / "best" / "README.md").write_text("card")
        (folder / "README.md").write_text("card")

    with pytest.raises(SharefoldError, match="is there and not of sharefold") as late:
        files.write_folder(out, fill)
    with pytest.raises(SharefoldError) as early:
        files.check_output(out, True, (*SWEEP_FILES, "README.md"), ["best", "50"])
    assert str(early.value) == str(late.value) and "\n" not in str(late.value)
    assert {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")} == before


def test_saving_over_a_network_with_a_users_files(tmp_path: Path) -> None:
    out = sharefold.save(network(1), tmp_path / "net")
    (out / "sweep.csv").write_text("mine")
    sharefold.save(network(2), out, force=True)
    assert (out / "sweep.csv").read_text() == "mine" and names(out) == sorted([*NETWORK_FILES, "sweep.csv"])
    (out / "README.md").unlink()
    (out / "README.md").mkdir()
    (out / "README.md" / "mine.txt").write_text("x")
    before = names(out)
    with pytest.raises(SharefoldError, match=r"README.md is there and not of sharefold"):
        sharefold.save(network(1), out, force=True)
    assert names(out) == before


def test_networks_of_a_sweep_from_before_it_named_them(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def fill(folder: Path) -> None:
        write("a", "25", "2M-params")(folder)
        points = [{"budget": "dense"}, {"budget": "25%"}, {"budget": "2M params"}]
        (folder / "sweep.json").write_text(json.dumps({"points": points}))

    files.write_folder(out, fill)
    files.write_folder(out, write("b", "25"))
    assert names(out) == ["25", f"25/{CONFIG_NAME}", "sweep.json"]


def test_a_part_of_a_network_is_not_replaced_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, one = tmp_path / "net", tmp_path / "one.safetensors"
    for place in (net, one):
        sharefold.save(network(), place)
    (tmp_path / "link").symlink_to(net)
    (tmp_path / "link.safetensors").symlink_to(net / "model.safetensors")
    (tmp_path / "other.safetensors").symlink_to(one)
    before = {file: file.read_bytes() for file in (*net.iterdir(), one)}
    monkeypatch.chdir(net)
    dense = ("export", net, "--format", "dense", "--force", "-o")
    verbs = (("expand", net, "--force", "-o"), dense, ("convert", "timm:digits_resnet", "--budget", "50%", "--force", "-o"))
    for verb in verbs:
        for place in (net / "model.safetensors", Path("model.safetensors"), tmp_path / "link" / "model.safetensors",
                      tmp_path / "link.safetensors", Path("..") / "net" / "." / "model.safetensors"):  # fmt: skip
            refused(call(*verb, place), f"output {place} is a part of what sharefold wrote into the folder {net}: choose another")
    for verb in (("expand", one, "--force", "-o"), ("export", one, "--format", "dense", "--force", "-o")):
        for place in (one, Path("..") / "one.safetensors", tmp_path / "other.safetensors"):
            refused(call(*verb, place), f"output {place} is the network {one} itself: choose another name")
    for name in NETWORK_FILES:
        with pytest.raises(SharefoldError, match="is a part of what sharefold wrote"):
            files.check_output(net / name, force=True)
    assert before == {file: file.read_bytes() for file in (*net.iterdir(), one)}
    assert call("expand", net, "-o", net / "dense.safetensors").exit_code == 0 and sharefold.load(net) is not None


def test_figures_are_not_replaced_unasked(tmp_path: Path) -> None:
    sharefold.save(network(), tmp_path / "net")
    (tmp_path / "map.png").write_text("mine")
    words = ["report", tmp_path / "net", "-o", tmp_path / "page.html", "--png", tmp_path]
    refused(call(*words), "map.png exists: pass --force")
    assert (tmp_path / "map.png").read_text() == "mine" and not (tmp_path / "page.html").exists()
    assert call(*words, "--force").exit_code == 0 and (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    saved, long = sharefold.save(network(), tmp_path / "net"), str(tmp_path / ("n" * 300))
    for words in (
        ["expand", saved, "-o", long + ".safetensors"], ["expand", saved, "-o", tmp_path / "loop" / "x.pt"],
        ["inspect", long + ".pt"], ["inspect", long], ["verify", long], ["report", long, "-o", tmp_path / "a.html"],
        ["report", saved, "-o", long + ".html"], ["inspect", tmp_path / "loop"], ["verify", tmp_path / "loop"],
        ["eval", saved, "--data", f"npz:{long}"], ["eval", saved, "--data", f"imagefolder:{long}"],
        ["convert", "timm:digits_resnet", "--plan", long, "-o", tmp_path / "x"], ["inspect", "a\0b"],
    ):  # fmt: skip
        done = call(*words)
        assert done.exit_code == 2 and len(done.stderr.strip().splitlines()) == 1, (words, done.output)
        assert "internal" not in done.stderr
    for path in (tmp_path / "loop", Path(long)):
        for attempt in (lambda: sharefold.save(network(), path, force=True), lambda: sharefold.load(path),  # noqa: B023
                        lambda: sharefold.open_source(path), lambda: files.write_file(path, Path.touch)):  # noqa: B023
            with pytest.raises(SharefoldError) as error:
                attempt()
            assert "\n" not in str(error.value) and len(str(error.value)) < 500 + len(str(tmp_path))
    longest = tmp_path / ("n" * 243 + ".safetensors")  # as long as names may be
    assert sharefold.load(sharefold.save(network(), longest)) is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["loop", "net", longest.name])


@pytest.mark.parametrize("folder", [True, False])
def test_all_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool) -> None:
    """What a power cut would leave: every file and folder is written through, then named, then the folder around it."""
    seen: list[Path | str] = []
    sync, rename, swap = os.fsync, os.replace, files.exchange

    def noted(handle: int) -> None:
        seen.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
        sync(handle)

    def named(call: Any) -> Any:
        def run(*paths: Any) -> Any:
            seen.append("named")
            return call(*paths)

        return run

    out = tmp_path / ("net" if folder else "net.safetensors")
    sharefold.save(network(), out)
    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", named(rename))
    monkeypatch.setattr(os, "rename", named(os.rename))
    monkeypatch.setattr(files, "exchange", named(swap))
    sharefold.save(network(1), out, force=True)
    first, last = seen.index("named"), len(seen) - 1 - seen[::-1].index("named")
    early = [p for p in seen[:first] if isinstance(p, Path)]
    inside = [p.name for p in early if p.parent != tmp_path]
    assert seen[last + 1 :] == [tmp_path]
    assert any(p.parent == tmp_path and p.name.startswith(f".{out.name}.") for p in early)
    assert sorted(set(inside)) == (sorted(NETWORK_FILES) if folder else [])


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
        ["export", "net", "--format", "onnx", "-o", "out.onnx"],
        ["sweep", "timm:digits_resnet", "--budgets", "90%", "--data", "digits", "--limit", "9", "--calib-count", "24", "--method",
         "svd", "--no-repair", "-o", "out"],
        ["finetune", "net", "--data", "digits", "--limit", "8", "--val-limit", "8", "--epochs", "1",
         "--batch-size", "4", "-o", "out"],
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
    lines = [line for line in done.stderr.strip().splitlines() if ": 1 of 1, " not in line]  # progress
    assert len(lines) == 1 and lines[0].startswith("error: output out"), lines
    assert "could not be written" in lines[0] and ".tmp" not in lines[0]
    assert [name for name in names(tmp_path) if not name.startswith("out.run")] == before  # the log of a run goes on later


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
