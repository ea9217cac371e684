"""Converts the embedded network by several methods at one size, then far smaller; tunes, saves, reloads, compares."""

from __future__ import annotations

import copy
import json
import math
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sharefold.calibration.calibrate import calibrate
from sharefold.checkpoint import expand, load, save
from sharefold.convert import convert_
from sharefold.data import calibration_images, loader, open_data
from sharefold.demo.picture import draw
from sharefold.demo.results import Demo, DemoOptions, Row
from sharefold.errors import SharefoldError
from sharefold.files import check_output, write_folder
from sharefold.finetune.loop import finetune
from sharefold.measure import agreement, count_parameters, evaluate, model_bytes
from sharefold.options import PlanOptions, chosen
from sharefold.ownership import DEMO_NAME, DEMO_NETWORK, WEIGHTS_NAME, check_names
from sharefold.planner import Planner
from sharefold.plans import Progress
from sharefold.sources import open_source

SOURCE, DATA, SAVED, PICTURE, RECORD = "timm:digits_resnet", "digits", DEMO_NETWORK, "demo.png", DEMO_NAME
METHODS = ("average", "basis", "auto")
TUNED = "auto"
CALIBRATION = 300


def run_demo(
    output: str | Path = "sharefold-demo", options: DemoOptions | None = None, *, force: bool = False,
    progress: Progress | None = None, **overrides: Any,
) -> Demo:  # fmt: skip
    """Runs the whole job on the embedded network; writes ``digits-shared/``, ``demo.png`` and ``demo.json``.

    Args:
        output: the folder to write. An earlier demonstration in it is replaced, anything else is not.
        options: see :class:`DemoOptions`; its fields may be given by keyword.
        force: replace a folder that no demonstration wrote.
        progress: called with (what, done, total).

    Raises:
        SharefoldError: scikit-learn or matplotlib is missing, or the folder cannot be written.
    """
    wanted = chosen(options, overrides, DemoOptions)
    seed = wanted.seed
    _check_extras()
    target = _check_folder(Path(output), force)

    start = time.perf_counter()
    say = progress or (lambda what, done, total: None)
    torch.manual_seed(seed)
    source = open_source(SOURCE)
    dense, cfg = source.model, source.pretrained_cfg
    train, test = (open_data(DATA, split, transform_cfg=cfg) for split in ("train", "test"))
    images = calibration_images(DATA, cfg, CALIBRATION, seed)  # no label is read
    cal = calibrate(dense, images, seed=seed)
    before = count_parameters(dense)
    demo = Demo(
        rows=[Row("none", "original", before, 1.0, top1(dense, test), None, 0.0)], dense_bytes=model_bytes(dense)
    )
    total = len(METHODS) * (1 + len(wanted.sizes)) + 1
    done_count = 0

    planners = {method: Planner(cal, PlanOptions(method)) for method in METHODS}

    def converted(method: str, size: str | float | int) -> tuple[nn.Module, Row]:
        begin = time.perf_counter()
        model = copy.deepcopy(dense)
        done = convert_(model, planners[method].plan(size), cal)
        params = count_parameters(model)
        seconds = time.perf_counter() - begin
        agreed = None if math.isnan(done.agreement) else done.agreement
        row = Row(method, "converted", params, params / before, top1(model, test), agreed, seconds)
        demo.curve.setdefault(method, []).append((row.size, row.top1))
        return model, row

    def step() -> None:
        nonlocal done_count
        done_count += 1
        say("converting", done_count, total)

    models: dict[str, nn.Module] = {}
    size: str | int = wanted.budget
    for method in METHODS:
        models[method], row = converted(method, size)
        demo.rows.append(row)
        size = demo.rows[1].params
        step()
    tiny, row = converted(TUNED, wanted.small)
    demo.rows.append(row)
    step()
    for method in METHODS:
        for share in wanted.sizes:
            with suppress(SharefoldError):  # below what the method reaches
                converted(method, share)
            step()
        demo.curve[method].sort()
    begin = time.perf_counter()
    finetune(tiny, train, teacher=dense, epochs=wanted.epochs, seed=seed, augment="crop1", batch_size=64, lr=3e-3, quiet=True)
    say("tuning", wanted.epochs, wanted.epochs)
    probe = calibration_images(DATA, cfg, 100, seed, "test")
    now = agreement(dense, tiny, probe).top1
    demo.rows.append(Row(TUNED, f"tuned {wanted.epochs} epochs", row.params, row.size, top1(tiny, test), now,
                         time.perf_counter() - begin))  # fmt: skip
    demo.output = str(target)

    def fill(folder: Path) -> None:
        saved = save(tiny, folder / SAVED, metrics={"top1": demo.rows[-1].top1})
        demo.file_bytes = (saved / WEIGHTS_NAME).stat().st_size
        again = load(saved)
        logits = logits_of(tiny, probe)
        demo.identical = torch.equal(logits, logits_of(again, probe))
        demo.expanded_difference = float((logits_of(expand(again), probe) - logits).abs().max())
        draw(demo, models["basis"], folder / PICTURE)
        demo.seconds = time.perf_counter() - start
        (folder / RECORD).write_text(json.dumps(demo.to_dict(), indent=1) + "\n")

    write_folder(target, fill)
    if not demo.identical:
        raise SharefoldError(f"{target}: the reloaded network differs from the saved one: please report this")
    return demo


def top1(model: nn.Module, data: Any) -> float:
    """Share of ``data`` that ``model`` classifies rightly."""
    return float(evaluate(model, loader(data, 359), torch.device("cpu"))["top1"])


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """(n, classes) in eval mode."""
    return model.eval()(images)


def _check_extras() -> None:
    for module, package in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")):
        if find_spec(module) is None:
            raise SharefoldError(f"demo: {package} is missing: pip install 'sharefold[demo]'")


def _check_folder(path: Path, force: bool) -> Path:
    if path.is_dir() and (not any(path.iterdir()) or (path / RECORD).is_file() or force):
        check_output(path.resolve().parent / f"{path.resolve().name}.probe")  # the place must be writable all the same
        check_names(path, (RECORD, PICTURE), (SAVED,))
        return path
    return check_output(path)
