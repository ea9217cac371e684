"""Names, numbers and images from strangers: shown without their escapes, refused in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from command_line import call
from file_tools import CONFIG, edit_config
from markdown_it import MarkdownIt
from PIL import EpsImagePlugin, Image
from rich.console import Console

import sharefold
from sharefold.card import model_card
from sharefold.data import Preprocess, open_data
from sharefold.data.datasets import ForeignStream
from sharefold.data.image_files import opened_image
from sharefold.errors import SharefoldError
from sharefold.finetune.log import RunLog
from sharefold.finetune.run_state import read_state, write_state
from sharefold.format import FileConfig, carry_config, checked_pretrained_cfg
from sharefold.plans import GroupPlan, Plan
from sharefold.report import Facts
from sharefold.report.plots import write_plots
from sharefold.sources import build_base
from sharefold.untrusted import printable, read_text, shown

BASE = {"library": "timm", "name": "digits_resnet", "kwargs": {}}
ESCAPE = "\x1b]0;owned\x07\x1b[31m\n\r\x9b"


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = build_base(BASE)
    carry_config(model, FileConfig(Plan([], 0, 0), BASE))
    return sharefold.save(model, tmp_path / "net")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(aliases=[1]), lambda c: c.update(aliases={"a": 1}), lambda c: c.update(aliases={"a": "b"}),
        lambda c: c.update(aliases={"fc.bias": "fc.bias"}), lambda c: c.update(pretrained_cfg=[1]),
        lambda c: c.update(pretrained_cfg={"input_size": "big"}), lambda c: c.update(pretrained_cfg={"input_size": [1, 8]}),
        lambda c: c.update(pretrained_cfg={"input_size": [1, 8, 1 << 40]}),
        lambda c: c.update(pretrained_cfg={"input_size": [3, 8, 8], "mean": [0.1, 0.2]}),
        lambda c: c.update(pretrained_cfg={"mean": [float("nan")]}), lambda c: c.update(pretrained_cfg={"std": [0.0]}),
        lambda c: c.update(pretrained_cfg={"crop_pct": "x"}), lambda c: c.update(pretrained_cfg={"interpolation": 3}),
        lambda c: c.update(metrics=[1]), lambda c: c.update(store=3), lambda c: c.update(store={"format": -1}),
        lambda c: c.update(base=3), lambda c: c.update(base={"library": "timm"}), lambda c: c["base"].update(kwargs=[1]),
        lambda c: c.update(format_version=True), lambda c: c.update(sharefold_version=1), lambda c: c.update(checksum=5),
        lambda c: c["plan"].update(params_before="many"), lambda c: c["plan"].update(groups=[{"name": [], "method": 1}]),
        lambda c: c["plan"].update(groups=[{"name": "a", "method": "basis", "members": ["x"], "error": float("nan")}]),
        lambda c: c.update(pretrained_cfg={"input_size": [1, 65536, 65536]}),
        lambda c: c.update(pretrained_cfg={"input_size": [65536, 4, 4]}), lambda c: c.update(pretrained_cfg={"crop_pct": 1e-9}),
        lambda c: c.update(pretrained_cfg={"interpolation": "bogus"}), lambda c: c.update(pretrained_cfg={"crop_mode": "bogus"}),
        lambda c: c.update(pretrained_cfg={"mean": [1e308]}), lambda c: c.update(pretrained_cfg={"std": [1e-300]}),
        lambda c: c.update(pretrained_cfg={"mean": [10**290]}), lambda c: c.update(pretrained_cfg={"std": [10**400]}),
        lambda c: c.update(metrics={"params": 10**400}), lambda c: c.update(metrics={"a": {"b": "\ud800"}}),
        lambda c: c["base"].update(kwargs={"num_classes": nested(400)}), lambda c: c.update(metrics={"x": nested(65)}),
        lambda c: c["plan"].update(source="\udfff"), lambda c: c["plan"].update(source=5),
        lambda c: c["plan"].update(exclude="(" * 3_000_000), lambda c: c["plan"].update(store=["x" * 10_000]),
        *[lambda c, name=name: c["plan"].update(groups=[{"name": name, "method": "basis", "members": ["layer1.0.conv1"]}])
          for name in ("", "forward", "_parameters", "training", "__class__", "add.module", "\ud800")],
        lambda c: c["plan"].update(params_after=-1), lambda c: c["plan"].update(plan_version=-3),
        lambda c: c["plan"].update(groups=[{"name": "a", "method": "basis", "members": ["x"], "stage": -1}]),
    ],
)  # fmt: skip
def test_fields_of_wrong_types_are_bad_input(saved: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    edit_config(saved, change)
    done = call("expand", saved, "-o", saved.parent / "out.safetensors")
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) == 1 and len(done.stderr) < 600
    assert not (saved.parent / "out.safetensors").exists()


@pytest.mark.parametrize(
    "data", [b"\xff\xfe{}", b'{"plan": ' + b"[" * 200_000, b'{"plan": ' + b"9" * 5000 + b"}", b"", b"null", b"[]"]
)
def test_texts_that_are_none(saved: Path, data: bytes) -> None:
    (saved / CONFIG).write_bytes(data)
    with pytest.raises(SharefoldError) as error:
        sharefold.load(saved)
    assert "\n" not in str(error.value)
    plan = saved.parent / "plan.json"
    plan.write_bytes(data)
    done = call("convert", "timm:digits_resnet", "--plan", plan, "-o", saved.parent / "o")
    assert done.exit_code == 2 and len(done.stderr.strip().splitlines()) == 1


def test_files_that_are_too_large(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b" " * ((1 << 22) + 1))
    with pytest.raises(SharefoldError, match="has more than 4 MB"):
        read_text(tmp_path / "a", "the text")


def test_escapes_are_shown_and_not_obeyed(tmp_path: Path, saved: Path) -> None:
    assert printable("größer\u00a0☃") == "größer\\xa0☃" and printable("a\x1b[1m\n") == "a\\x1b[1m\\n"
    assert len(shown("x" * 500)) == 83
    names = (f"timm:{ESCAPE}", str(tmp_path / ESCAPE.replace("\n", "")), f"hf-hub:{ESCAPE}/x")
    for name in names[:2]:
        done = call("inspect", name)
        assert done.exit_code == 2 and not set("\x1b\x07\x9b\r") & set(done.stderr), repr(done.stderr)
        assert len(done.stderr.strip().splitlines()) == 1
    edit_config(saved, lambda config: config.update({ESCAPE: 1}))
    done = call("expand", saved, "-o", tmp_path / "out.safetensors")
    assert done.exit_code == 0 and "unknown keys" in done.stderr and "\x1b" not in done.stderr


def test_what_is_printed_holds_no_escapes(tmp_path: Path, saved: Path) -> None:
    """On stdout too, where names of groups and files go into tables."""
    name = ESCAPE.replace("\x1b]0;owned", "x")
    plan = sharefold.plan(sharefold.open_source("timm:digits_resnet").model, "60%", torch.randn(32, 1, 8, 8), method="svd")
    groups = tuple(dataclasses.replace(group, name=f"{name}{index}") for index, group in enumerate(plan.groups))
    (tmp_path / "plan.json").write_text(dataclasses.replace(plan, groups=list(groups), source=name).to_json())
    folder = tmp_path / name
    folder.mkdir()
    shared, images = folder / "n.safetensors", f"imagefolder:{folder}"
    shared.write_bytes((saved / "model.safetensors").read_bytes())
    for words in (
        ["convert", "timm:digits_resnet", "--plan", tmp_path / "plan.json", "--dry-run", "--calib", "digits",
         "--calib-count", "9"
         ], ["inspect", shared], ["eval", shared, "--data", "digits", "--limit", "9"], ["eval", shared, "--data", images],
        ["expand", shared, "-o", folder / "o.safetensors"], ["report", shared, "-o", folder / "o.html", "--png", folder],
        ["bench", shared, "--repeats", "1"], ["export", shared, "-o", folder / "o.pt2"], ["report", tmp_path / "plan.json", "-o",
         folder / "p.html", "--png", folder / "p"],
    ):  # fmt: skip
        done = call(*words)
        assert not set("\x1b\x07\x9b\r") & set(done.output), (words, done.output)
        assert done.exit_code == (2 if words[-1] == images else 0), done.output
    log = RunLog(None, show=True)
    log.console = Console(file=io.StringIO(), force_terminal=True, color_system=None)
    log.say(name)
    log.table("a", ["b"], [[name], ["[red]x"]])
    shown = cast(io.StringIO, log.console.file).getvalue()
    assert not set("\x1b\x07\x9b\r") & set(shown) and "[red]x" in shown


def test_dollars_are_no_mathematics(tmp_path: Path) -> None:
    """A name such as ``$x^$`` ended the drawing with matplotlib's ValueError."""
    plan = Plan([GroupPlan("$x^$", "basis", ("a",), params_before=2, params_after=1)], 2, 1)
    assert [path.name for path in write_plots(Facts("$y_$", plan), tmp_path)] == ["groups.png"]


EVIL = (
    "<script>alert(1)</script>|`x`\n# big", "![a](http://evil.example/x.png)", "[a](javascript:alert(1))", "[a]: http://evil.example",
    "**bold** _slanted_ __bold__ ~~gone~~ `code` $x^$", "https://evil.example www.evil.example a@evil.example", "<http://evil.example>",
    "a\\|b\\[c](d)", "&lt;b&gt; &#60;", "stage1.conv_a_b",
)  # fmt: skip


@pytest.mark.parametrize("evil", EVIL)
def test_cards_hold_no_markup_of_others(evil: str) -> None:
    plan = Plan([GroupPlan(evil, evil, (evil,))], 1, 1, evil)
    text = model_card(FileConfig(plan, {"library": "timm", "name": evil, "kwargs": {}}, metrics={evil: evil, "top1": 0.5}))
    assert "<script" not in text and "\n# big" not in text and "| top1 | 0.5000 |" in text
    embedded = json.loads(text.split("```json\n")[1].split("\n```")[0])
    assert embedded["plan"] == json.loads(json.dumps(plan.to_dict()))
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text.split("---\n")[2])
    inline = [token for token in tokens if token.type == "inline"]
    kinds = {child.type for token in inline for child in token.children or ()}
    assert kinds <= {"text", "text_special", "html_inline", "softbreak"}
    assert {c.content for token in inline for c in token.children or () if c.type == "html_inline"} <= {"<!-- -->"}
    cells = ["".join(c.content for c in token.children or () if c.type != "html_inline") for token in inline]
    told = printable(evil).replace("`", "'")
    assert cells[0] == f"{told}, shared by sharefold" and cells.count(told) == 4  # metric and its value, group and method
    assert sum(token.type == "tr_open" for token in tokens) == 2 + 2 + 1
    # What GitHub and the Hub make links of in plain text.
    plain = [c.content for token in inline for c in token.children or () if c.type != "html_inline"]
    assert not any(re.search(r"(?i)https?://|www\.|\w@\w", part) for part in plain)


def test_damaged_images_print_no_line_of_a_library(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.tif"
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    for compression in ("tiff_deflate", "tiff_lzw", "jpeg", "packbits"):
        Image.fromarray(pixels).save(path, compression=compression)
        with opened_image(path) as image:
            assert np.asarray(image).shape == pixels.shape
        data = bytearray(path.read_bytes())
        data[20:2000] = bytes(1980)
        path.write_bytes(data)
        with contextlib.suppress(SharefoldError), opened_image(path) as image:
            image.convert("RGB")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "cfg", [{"mean": (0.1, 0.2)}, {"mean": (float("nan"),)}, {"std": (float("inf"),)}, {"std": "abc"}, {"mean": {}},
            {"input_size": (3, 0, 3)}, {"input_size": ("a",)}, {"std": (-1.0,)}, {"input_size": (3, 10**9, 3)}]
)  # fmt: skip
def test_means_that_fit_no_image(cfg: dict[str, Any]) -> None:
    if cfg != {"mean": {}}:
        with pytest.raises(SharefoldError):
            Preprocess.from_cfg(cfg)
    with pytest.raises(SharefoldError):
        checked_pretrained_cfg({"input_size": [3, 8, 8], **cfg}, "x")


def test_images_of_other_formats_start_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    (folder / "z.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) (w) file\nshowpage\n"
    )
    started: list[Any] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: started.append(a))
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: started.append(a))
    with pytest.raises(SharefoldError, match="not a readable image") as error:
        open_data(f"imagefolder:{tmp_path}", "train", input_size="3,8,8")[0]
    assert "\n" not in str(error.value) and started == []
    for name, kind in (("a.jpg", "JPEG"), ("b.bmp", "BMP"), ("c.webp", "WEBP"), ("d.ppm", "PPM"), ("e.tif", "TIFF")):
        Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / name, kind)
        with opened_image(tmp_path / name) as image:
            assert image.size == (8, 8)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(SharefoldError), opened_image(tmp_path / name) as image:
            image.load()


def npz(path: Path, **arrays: bytes | np.ndarray) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            if isinstance(array, np.ndarray):
                memory = io.BytesIO()
                np.save(memory, array)
                array = memory.getvalue()
            archive.writestr(f"{name}.npy", array)
    return path


def claimed(shape: tuple[int, ...], kind: str = "|u1", data: bytes = b"") -> bytes:
    head = str({"descr": kind, "fortran_order": False, "shape": shape}).encode()
    head += b" " * (63 - (len(head) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + data


@pytest.mark.parametrize(
    "arrays",
    [
        {"train_x": claimed((1 << 20, 1024, 1024, 1))}, {"train_x": claimed((10, 0, 5, 1))}, {"train_x": claimed((0, 4, 4, 1))},
        {"train_x": claimed((1 << 40,), data=bytes(100))}, {"train_x": claimed((2, 2, 2, 1), "|O", bytes(64))},
        {"train_x": bytes(1 << 28)}, {"train_x": b"\x93NUMPY\x09\x00"}, {"train_x": b""}, {"other": np.zeros(3)},
        {"train_x": claimed((-1, 4, 4, 1), data=bytes(16))}, {"train_x": claimed((1, 4, 4, 1), data=bytes(15))},
    ],
)  # fmt: skip
def test_npz_files_that_claim_what_they_have_not(tmp_path: Path, arrays: dict[str, Any]) -> None:
    start = time.process_time()
    with pytest.raises(SharefoldError) as error:
        open_data(f"npz:{npz(tmp_path / 'a.npz', **arrays)}", "train", input_size="1,4,4")
    assert "\n" not in str(error.value) and time.process_time() - start < 2


def test_npz_files_are_read_as_numpy_does(tmp_path: Path) -> None:
    images, labels = np.random.default_rng(0).integers(0, 255, (5, 4, 4, 1), np.uint8), np.arange(5)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", train_x=images, train_y=labels)
        found = open_data(f"npz:{tmp_path / 'a.npz'}", "train", input_size="1,4,4", mean=0.0, std=1.0)
        assert torch.equal(found.images, torch.from_numpy(images)) and found.labels.tolist() == labels.tolist()


@pytest.mark.parametrize("header", [b"(" * 900, b"{" * 900, b"'descr", b"\xff" * 50, b"9" * 6000, b"1+", b"{'a': 1}"])
def test_npz_headers_that_are_none(tmp_path: Path, header: bytes) -> None:
    npz(tmp_path / "a.npz", train_x=b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(SharefoldError, match="not a readable npz file") as error:
        open_data(f"npz:{tmp_path / 'a.npz'}", "train", input_size="1,4,4")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(True, 4, 4, 1), (-1, 4, 4, 1), (1.0, 4, 4, 1)])
def test_npz_shapes_that_are_none(tmp_path: Path, shape: Any) -> None:
    npz(tmp_path / "a.npz", train_x=claimed(shape, data=bytes(16)))
    with pytest.raises(SharefoldError, match="not a readable npz file"):
        open_data(f"npz:{tmp_path / 'a.npz'}", "train", input_size="1,4,4")


HEADS = b"\x00\x00\x08\x03" + b"\xff" * 12, b"\x00\x00\x0d\x01\x00\x00\x00\x02" + bytes(8)


@pytest.mark.parametrize("data", [b"", b"abcdefgh" * 10, *HEADS])
def test_raw_files_of_fashionmnist_that_are_none(tmp_path: Path, data: bytes) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for name in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            (raw / f"{part}-{name}").write_bytes(data)
    with pytest.raises(SharefoldError, match="data fashionmnist:") as error:
        open_data(f"fashionmnist:{tmp_path}", input_size="1,28,28")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", [b"nope", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"])
def test_damaged_images_that_timm_reads(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "val" / "a").mkdir(parents=True)
    (tmp_path / "val" / "a" / "x.png").write_bytes(data)
    images = open_data(f"timm:folder:root={tmp_path}", "val", input_size="1,8,8")
    assert len(images) == 1  # type: ignore[arg-type]
    with pytest.raises(SharefoldError, match="its images cannot be read") as error:
        images[0]
    assert "\n" not in str(error.value)


def test_streams_of_others_end_in_one_line_too() -> None:
    class Stream(torch.utils.data.IterableDataset):
        transform = None

        def __iter__(self) -> Any:
            yield torch.ones(1), 5
            raise ZeroDivisionError("two\nlines")

    read = iter(ForeignStream(Stream(), "data timm:x"))
    assert next(read)[1] == 5
    with pytest.raises(SharefoldError, match=r"data timm:x: its images cannot be read \(two lines\)"):
        next(read)


def good_state() -> dict[str, Any]:
    weights = {"a": torch.ones(2)}
    return {
        "config": {}, "images": 3, "shapes": {"a": [2]}, "updates": 5, "epochs_done": 1, "logged_at": 4, "seconds": 1.5,
        "history": [], "before": {"model": 0.5, "teacher": None}, "last": {"loss": 1.0}, "epoch_loss": 0.0, "sums": {"loss": 1.0},
        "model": weights, "optimizer": {"state": {}, "param_groups": []}, "scaler": {}, "ema": None, "best": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("updates", -5), ("updates", 1.5), ("updates", "5"), ("updates", True), ("epochs_done", None), ("logged_at", -1),
        ("seconds", float("nan")), ("seconds", "long"), ("history", {}), ("history", [1]), ("before", 3), ("before", {}),
        ("last", [1]), ("epoch_loss", None), ("sums", [1]), ("sums", {"a": "b"}), ("model", {"a": 1}), ("model", None),
        ("model", {"a": torch.tensor([float("nan")])}), ("optimizer", {}), ("scaler", 1), ("ema", 1), ("best", {"top1": 1}),
        ("config", []), ("images", -1), ("shapes", {"a": 3}), ("version", "new"), ("version", 99),
    ],
)  # fmt: skip
def test_damaged_run_states(tmp_path: Path, name: str, value: Any) -> None:
    path = tmp_path / "state.pt"
    write_state(path, good_state())
    assert read_state(path)["updates"] == 5
    write_state(path, {**good_state(), name: value})
    with pytest.raises(SharefoldError) as error:
        read_state(path)
    assert "\n" not in str(error.value)


def test_missing_fields_and_flipped_bytes_of_run_states(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    for name in good_state():
        write_state(path, {key: value for key, value in good_state().items() if key != name})
        with pytest.raises(SharefoldError, match="missing"):
            read_state(path)
    write_state(path, good_state())
    data = bytearray(path.read_bytes())
    data[data.index(torch.ones(2).numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(SharefoldError):
        read_state(path)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("module", ["click", "torch", "numpy", "torch._C", "torch.fx", "timm"])
def test_an_interrupt_within_an_import(module: str) -> None:
    """Libraries make ImportErrors and RecursionErrors of it, or end the process: here it is one line and exit code 130."""
    code = (
        "import os, signal, sys\nfrom sharefold_cli.entry import main\nwanted = sys.argv.pop(1)\n"
        "sys.addaudithook(lambda event, told: event == 'import' and told[0] == wanted and os.kill(os.getpid(), signal.SIGINT))\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, module, "inspect", "timm:digits_resnet"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr.lstrip("\n")) == (130, "", "interrupted\n")


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("delay", [0.0, 0.1, 0.5, 1.2])
def test_an_interrupt_at_any_time(delay: float) -> None:
    code = "from sharefold_cli.entry import main; print('ready', flush=True); main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "inspect", "timm:digits_resnet"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    # A fast machine may be done by then; what is interrupted while Python ends is ended by the system.
    assert (process.returncode, errors.lstrip("\n")) in ((130, "interrupted\n"), (0, ""), (-signal.SIGINT, ""))
