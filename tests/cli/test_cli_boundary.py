"""Exit codes, one-line errors, output streams: what every verb gets from the group it hangs on."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import warnings

import click
import pytest
from command_line import call, runner

from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold_cli.boundary import BoundedGroup
from sharefold_cli.common import Run, jsonable, shared_options
from sharefold_cli.main import available, cli

HINT = " (set SHAREFOLD_DEBUG=1 for the traceback)"


def run(body, *args: str):
    """The outcome of a group with one verb whose body is ``body``."""

    @click.group(cls=BoundedGroup)
    def group() -> None:
        pass

    @group.command("verb")
    @shared_options
    def verb(run: Run) -> None:
        body(run)

    return runner().invoke(group, ["verb", *args])


def fail(error: BaseException):
    def body(run: Run) -> None:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code", "stderr"),
    [
        (SharefoldError("thing: where: what to do"), 2, "error: thing: where: what to do\n"),
        (click.UsageError("no"), 2, "error: no (see group verb --help)\n"),
        (click.ClickException("bad\n  file."), 2, "error: bad file\n"),
        (ValueError("first\nsecond"), 1, f"error: internal: ValueError: first{HINT}\n"),
        (KeyError(), 1, f"error: internal: KeyError{HINT}\n"),
        (click.Abort(), 130, "interrupted\n"),
    ],
)
def test_errors_become_one_line_and_a_code(error: Exception, code: int, stderr: str) -> None:
    result = run(fail(error))
    assert (result.exit_code, result.stderr, result.stdout) == (code, stderr, "")


def test_interrupt_exits_130() -> None:
    result = run(fail(KeyboardInterrupt()))
    assert result.exit_code == 130 and result.stderr.strip() == "interrupted"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHAREFOLD_DEBUG", "1")
    result = run(fail(ValueError("why")))
    assert result.exit_code == 1 and "Traceback" in result.stderr and result.stderr.endswith("ValueError: why\n")


def test_closed_pipe_is_quiet() -> None:
    code = (
        "from sharefold_cli.main import cli\nfrom sharefold_cli import env\n"
        "env.command.callback = lambda **_: [print('x' * 80) for _ in range(5000)]\ncli(['env'])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 1


def test_other_os_errors_are_internal() -> None:
    assert run(fail(OSError(errno.EIO, "disk"))).exit_code == 1


def test_json_stands_alone_on_stdout() -> None:
    def body(run: Run) -> None:
        print("a library talks")
        run.say("for people")
        run.table(["name", "value"], [["a", 1]])
        with run.progress() as progress:
            progress("working", 1, 2)
            progress("working", 2, 2)
        run.result({"value": float("nan"), "shape": (1, 2), "none": None})

    result = run(body, "--json")
    assert json.loads(result.stdout) == {"value": None, "shape": [1, 2], "none": None}
    for words in ("a library talks", "for people", "name", "working: 2 of 2"):
        assert words in result.stderr
    plain = run(body)
    assert "for people" in plain.stdout and "{" not in plain.stdout and "working: 2 of 2" in plain.stderr
    assert "\x1b" not in plain.output and "\x1b" not in result.output
    quiet = run(body, "--quiet", "--json")
    assert json.loads(quiet.stdout) and quiet.stderr == "a library talks\n"


def test_long_names_survive_a_pipe() -> None:
    name = "features." + "block." * 20 + "conv"
    result = run(lambda run: run.table(["layer", "n"], [[name, 12345]]))
    assert name in result.stdout and "12,345" in result.stdout


def test_markup_in_names_is_text() -> None:
    result = run(lambda run: run.table(["[bold]head[/bold]"], [["[red]cell[/red]"]]))
    assert "[bold]head[/bold]" in result.stdout and "[red]cell[/red]" in result.stdout


def test_only_our_own_warnings_are_shown() -> None:
    def body(run: Run) -> None:
        warnings.warn("timm will change", FutureWarning, stacklevel=1)
        warnings.warn("a key was ignored", SharefoldWarning, stacklevel=1)

    assert run(body).stderr == "warning: a key was ignored\n"
    assert run(body, "-q").stderr == ""


def test_failing_json_run_prints_no_json() -> None:
    result = run(fail(SharefoldError("no")), "--json")
    assert result.stdout == "" and result.exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "nonsense"], "device 'nonsense' is not known"),
        (["--threads", "0"], "0 is not in the range x>=1"),
        (["--seed", "-1"], "-1 is not in the range 0<=x"),
    ],
)
def test_bad_common_options(arguments: list[str], words: str) -> None:
    result = run(lambda run: run.setup(), *arguments)
    assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1


def test_setup_applies_seed_and_threads() -> None:
    import torch

    before = torch.get_num_threads()
    values: list[float] = []

    def body(run: Run) -> None:
        assert run.setup().type in ("cpu", "cuda") and torch.get_num_threads() == 1
        values.append(float(torch.rand(())))

    try:
        for seed in ("5", "5", "6"):
            assert run(body, "--seed", seed, "--threads", "1").exit_code == 0
    finally:
        torch.set_num_threads(before)
    assert values[0] == values[1] != values[2]


def test_jsonable() -> None:
    assert jsonable({1: {2.5}, "a": float("inf"), "b": [True, ("x",)], "c": os}) == {
        "1": [2.5], "a": None, "b": [True, ["x"]], "c": str(os),
    }  # fmt: skip


def test_help_and_version_in_process() -> None:
    assert {"inspect", "convert", "eval", "expand", "env"} <= available().keys()
    for arguments in ([], ["--help"], ["-h"]):
        result = runner().invoke(cli, arguments)
        assert result.exit_code == 0 and all(f"  {verb} " in result.stdout for verb in available())
    assert runner().invoke(cli, ["--version"]).stdout.startswith("sharefold ")


def test_unknown_verb_and_missing_option() -> None:
    result = runner().invoke(cli, ["convrt"])
    assert result.exit_code == 2 and "convrt" in result.stderr and result.stderr.count("\n") == 1
    result = runner().invoke(cli, ["eval", "timm:resnet18"])
    assert result.exit_code == 2 and "--data" in result.stderr and "eval --help" in result.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["eval", "--help"], ["convert", "-h"], ["inspect", "--help"],
                                       ["expand", "--help"], ["env", "-h"]])  # fmt: skip
def test_help_never_imports_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom sharefold_cli.main import cli\n"
        f"cli({arguments!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'timm', 'numpy', 'rich', 'scipy'} & sys.modules.keys()\nsys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and "Usage:" in done.stdout


def test_module_form_works() -> None:
    command = [sys.executable, "-m", "sharefold_cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("sharefold ")


def test_env_reports_what_is_installed() -> None:
    result = call("env", "--json")
    report = json.loads(result.stdout)
    import torch

    assert report["packages"]["torch"] == torch.__version__.split("+")[0] or report["packages"]["torch"]
    assert report["threads"] == torch.get_num_threads()
    assert set(report["extras"]) == {"onnx", "train", "plots", "demo", "smp", "yolo"}
    assert report["python"] == sys.version.split()[0]
