"""Run states and logs that are damaged or made up: one line before the first update, and never another run."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import signal
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_nets import digest, images_and_labels, shared_net

import sharefold
from sharefold.errors import SharefoldError
from sharefold.finetune import FinetuneReport
from sharefold.finetune.interrupt import Interrupted
from sharefold.finetune.log import draw_curve, read_log
from sharefold.finetune.run_state import read_state
from sharefold.untrusted import shown

State = dict[str, Any]
HUGE = 10**400


def tune(model: torch.nn.Module, folder: Path, **settings: Any) -> FinetuneReport:
    options = {"epochs": 2, "batch_size": 16, "lr": 1e-2, "log_steps": 1, "workers": 0, "device": "cpu", "keep": "best"}
    return sharefold.finetune(
        model, images_and_labels(), images_and_labels(32, seed=1), quiet=True, run_dir=folder, **{**options, **settings}
    )


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run that was stopped after 6 of its 8 updates, and the digest of what it would have come to."""
    folder, model = tmp_path_factory.mktemp("runs"), shared_net()
    passes = iter(range(1, 100))

    def stop(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if module.training and next(passes) == 6:
            os.kill(os.getpid(), signal.SIGINT)

    handle = model.head.register_forward_hook(stop)
    with pytest.raises(Interrupted):
        tune(model, folder / "run")
    handle.remove()
    whole = shared_net()
    tune(whole, folder / "whole")
    return folder / "run", digest(whole)


def first(state: State) -> State:
    """The optimizer's state of one parameter."""
    return next(iter(state["optimizer"]["state"].values()))


def group(state: State) -> State:
    return state["optimizer"]["param_groups"][0]


def other_kinds(tensors: State) -> State:
    return {name: tensor.to(torch.int32) for name, tensor in tensors.items()}


DAMAGE: dict[str, Callable[[State], Any]] = {
    "best of other names": lambda s: s.update(best={"top1": 0.5, "weights": {"a": torch.ones(1)}}),
    "best of other shapes": lambda s: s["best"].update(weights={k: v[None] for k, v in s["best"]["weights"].items()}),
    "best of NaN": lambda s: s["best"]["weights"].update({"head.bias": torch.full((4,), math.nan)}),
    "best score": lambda s: s["best"].update(top1=HUGE),
    "whole weights": lambda s: s.update(model=other_kinds(s["model"])),
    "whole average": lambda s: s.update(ema=other_kinds(s["ema"])),
    "no average": lambda s: s.update(ema=None),
    "moments of another shape": lambda s: first(s).update(exp_avg=torch.zeros(3)),
    "moments as text": lambda s: first(s).update(exp_avg="x"),
    "moments of NaN": lambda s: first(s).update(exp_avg=first(s)["exp_avg"] * math.nan),
    "no moments": lambda s: first(s).pop("exp_avg"),
    "a step as text": lambda s: first(s).update(step="x"),
    "no state of the optimizer": lambda s: s["optimizer"].update(state={}),
    "a state of no parameter": lambda s: s["optimizer"]["state"].update({99: {}}),
    "betas": lambda s: group(s).update(betas=5),
    "huge betas": lambda s: group(s).update(betas=(HUGE, 0.9)),
    "rate": lambda s: group(s).update(lr="x"),
    "other parameters": lambda s: group(s).update(params=[0]),
    "groups": lambda s: s["optimizer"].update(param_groups=[5]),
    "more epochs": lambda s: s.update(epochs_done=7),
    "fewer epochs": lambda s: s.update(epochs_done=0),
    "more updates": lambda s: s.update(updates=9),
    "a log of the future": lambda s: s.update(logged_at=7),
    "sums": lambda s: s.update(logged_at=5, sums={"x": 1.0}),
    "sums without limit": lambda s: s.update(logged_at=5, sums={"loss": HUGE}),
    "last": lambda s: s.update(last={}),
    "loss": lambda s: s.update(epoch_loss=HUGE),
    "before": lambda s: s.update(before={"model": HUGE, "teacher": None}),
    "seconds": lambda s: s.update(seconds=1e300),
    "an empty record": lambda s: s.update(history=[{}]),
    "a record of texts": lambda s: s["history"][0].update(top1="x"),
    "no record": lambda s: s.update(history=[]),
    "settings by number": lambda s: s["config"].update({5: 5}),
    "settings of tensors": lambda s: s["config"].update(lr=torch.ones(2)),
    "scaler": lambda s: s.update(scaler={"scale": "x"}),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_state_is_refused_before_training(stopped: tuple[Path, str], tmp_path: Path, kind: str) -> None:
    shutil.copytree(stopped[0], tmp_path / "run")
    file, model, trained = tmp_path / "run" / "state.pt", shared_net(), []
    state = torch.load(file, weights_only=True)
    DAMAGE[kind](state)
    torch.save(state, file)
    model.head.register_forward_hook(lambda module, inputs, output: trained.append(1) if module.training else None)
    with pytest.raises(SharefoldError, match=r"state\.pt: damaged run state|hold NaN") as error:
        tune(model, tmp_path / "run", resume=True)
    assert not trained and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_an_undamaged_one_goes_on_whatever_its_log_holds(stopped: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(stopped[0], tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    good = read_log(log)
    with log.open("a") as file:
        for line in ('{"step":1}', '{"event":"val","step":1}', '{"event":"train","step":1,"loss":"x"}', '{"event":[],"step":1}',
                     "[1]", '{"event":"train","step":1,"loss":1' + "0" * 400 + "}", "{"):  # fmt: skip
            file.write(line + "\n")
        file.write(json.dumps({**good[-1], "step": 6}) + "\n")
    assert read_log(log) == [*good, {**good[-1], "step": 6}]
    assert draw_curve(log, tmp_path / "curve.png")
    model = shared_net(seed=5)
    tune(model, tmp_path / "run", resume=True)
    assert digest(model) == stopped[1]
    assert all(record["event"] in ("train", "val") for record in read_log(log))


def archive(path: Path, body: bytes) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("m/data.pkl", b"\x80\x02" + body + b".")
        file.writestr("m/version", "3\n")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


@pytest.mark.parametrize("field", ["images", "version", "config"])
def test_shared_lists_take_no_time(stopped: tuple[Path, str], tmp_path: Path, field: str) -> None:
    deep: list[Any] = [1]
    for _ in range(26):
        deep = [deep, deep]
    start = time.process_time()
    state = torch.load(stopped[0] / "state.pt", weights_only=True)
    torch.save({**state, field: {"lr": deep} if field == "config" else deep}, tmp_path / "state.pt")
    with pytest.raises(SharefoldError) as error:
        read_state(tmp_path / "state.pt")
    assert len(str(error.value)) < 400 and len(shown({"a": deep})) < 100
    assert time.process_time() - start < 3


def test_a_number_of_thousands_of_digits_can_be_shown() -> None:
    assert shown(10**5000) == "a number of thousands of digits"
    assert shown({"a": [1, (2,)], "b": "x"}) == "{'a': [1, (2,)], 'b': 'x'}"


def test_an_old_pickle_with_an_archive_behind_it_is_no_state(tmp_path: Path) -> None:
    archive(tmp_path / "good.pt", b"}" + text("version") + b"K\x01s")
    body = b"}" + text("version") + b"cbuiltins\nbytearray\n\x8a\x04" + (1 << 30).to_bytes(4, "little") + b"\x85Rs"
    old = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    parts = [*old, b"\x80\x02" + body + b".", pickle.dumps([], 2), (tmp_path / "good.pt").read_bytes()]
    (tmp_path / "state.pt").write_bytes(b"".join(parts))
    with pytest.raises(SharefoldError, match=r"state\.pt: not a readable run state \(ValueError\)"):
        read_state(tmp_path / "state.pt")


def test_a_run_goes_on_where_the_optimizer_computes_with_other_kernels(stopped: tuple[Path, str], tmp_path: Path) -> None:
    """As one that was begun on a GPU, by an older version, and with its graphs turned off."""
    shutil.copytree(stopped[0], tmp_path / "run")
    file, model = tmp_path / "run" / "state.pt", shared_net(seed=5)
    state = torch.load(file, weights_only=True)
    for saved in state["optimizer"]["param_groups"]:
        saved.update(fused=True, foreach=False, capturable=True)
    del state["config"]["cuda_graphs"]
    torch.save(state, file)
    tune(model, tmp_path / "run", resume=True)
    assert digest(model) == stopped[1]
