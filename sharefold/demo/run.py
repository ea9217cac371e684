"""Converts the embedded network by several methods at one size, then far smaller; tunes, saves, reloads, compares."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sharefold.errors import SharefoldError
from sharefold.plans import Progress

SOURCE, DATA, SAVED, PICTURE, RECORD = "timm:digits_resnet", "digits", "digits-shared", "demo.png", "demo.json"
METHODS = ("average", "basis", "auto")
TUNED = "auto"
CALIBRATION = 300
# Further sizes of the curves in the picture, as shares of the parameters; averaging does not reach the small one.
SIZES = (0.12, 0.45)


@dataclass(frozen=True)
class Row:
    """One network of the table; ``top1`` is a fraction of 1 on the 359 test images, ``step`` says what was done."""

    method: str
    step: str
    params: int
    size: float
    top1: float
    agreement: float | None
    seconds: float


@dataclass
class Demo:
    """What the demonstration found.

    Attributes:
        rows: original, every method at one size, and the small network before and after tuning.
        curve: method -> [(share of the parameters, top-1), ...] for the picture.
        identical: whether the reloaded network's logits equal the saved one's bit for bit.
        expanded_difference: largest difference of the logits of ``expand``'s dense network.
        file_bytes: of the saved weights; ``dense_bytes`` of the original's.
    """

    rows: list[Row] = field(default_factory=list)
    curve: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    identical: bool = False
    expanded_difference: float = 0.0
    file_bytes: int = 0
    dense_bytes: int = 0
    seconds: float = 0.0
    output: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def run_demo(
    output: str | Path = "sharefold-demo", *, budget: str = "20%", small: str = "8%", epochs: int = 4, seed: int = 0,
    force: bool = False, sizes: Sequence[float] = SIZES, progress: Progress | None = None,
) -> Demo:  # fmt: skip
    """Runs the whole job on the embedded network; writes ``digits-shared/``, ``demo.png`` and ``demo.json``.

    Args:
        output: the folder to write. An earlier demonstration in it is replaced, anything else is not.
        budget: where the methods are compared. Averaging comes first; the others get just the size that it reaches.
        small: size of the network that is tuned and saved.
        epochs: of tuning, with the original as teacher.
        seed: of everything random.
        force: replace a folder that no demonstration wrote.
        sizes: further sizes for the picture's curves.
        progress: called with (what, done, total).

    Raises:
        SharefoldError: scikit-learn or matplotlib is missing, or the folder cannot be written.
    """
    _check_extras()
    target = _check_folder(Path(output), force)
    import sharefold
    from sharefold.data import calibration_images, open_data
    from sharefold.files import write_folder
    from sharefold.finetune.loop import finetune
    from sharefold.measure import agreement, count_parameters, model_bytes

    start = time.perf_counter()
    say = progress or (lambda what, done, total: None)
    torch.manual_seed(seed)
    source = sharefold.open_source(SOURCE)
    dense, cfg = source.model, source.pretrained_cfg
    train, test = (open_data(DATA, split, transform_cfg=cfg) for split in ("train", "test"))
    images = calibration_images(DATA, cfg, CALIBRATION, seed)  # no label is read
    before = count_parameters(dense)
    demo = Demo(
        rows=[Row("none", "original", before, 1.0, top1(dense, test), None, 0.0)], dense_bytes=model_bytes(dense)
    )
    total = len(METHODS) * (1 + len(sizes)) + 1
    done_count = 0

    def converted(method: str, wanted: str | float | int) -> tuple[nn.Module, Row]:
        begin = time.perf_counter()
        model = copy.deepcopy(dense)
        plan = sharefold.plan(model, budget=wanted, calibration=images, method=method, seed=seed)
        done = sharefold.convert_(model, plan, calibration=images, seed=seed)
        params = count_parameters(model)
        seconds = time.perf_counter() - begin
        row = Row(method, "converted", params, params / before, top1(model, test), done.agreement, seconds)
        demo.curve.setdefault(method, []).append((row.size, row.top1))
        return model, row

    def step() -> None:
        nonlocal done_count
        done_count += 1
        say("converting", done_count, total)

    models: dict[str, nn.Module] = {}
    size: str | int = budget
    for method in METHODS:
        models[method], row = converted(method, size)
        demo.rows.append(row)
        size = demo.rows[1].params
        step()
    tiny, row = converted(TUNED, small)
    demo.rows.append(row)
    step()
    for method in METHODS:
        for share in sizes:
            with suppress(SharefoldError):  # below what the method reaches
                converted(method, share)
            step()
        demo.curve[method].sort()
    begin = time.perf_counter()
    finetune(tiny, train, teacher=dense, epochs=epochs, seed=seed, augment="crop1", batch_size=64, lr=3e-3, quiet=True)
    say("tuning", epochs, epochs)
    probe = calibration_images(DATA, cfg, 100, seed, "test")
    now = agreement(dense, tiny, probe).top1
    demo.rows.append(Row(TUNED, f"tuned {epochs} epochs", row.params, row.size, top1(tiny, test), now,
                         time.perf_counter() - begin))  # fmt: skip
    demo.output = str(target)

    def fill(folder: Path) -> None:
        from sharefold.demo.picture import draw

        saved = sharefold.save(tiny, folder / SAVED, metrics={"top1": demo.rows[-1].top1})
        demo.file_bytes = (saved / "model.safetensors").stat().st_size
        again = sharefold.load(saved)
        logits = logits_of(tiny, probe)
        demo.identical = torch.equal(logits, logits_of(again, probe))
        demo.expanded_difference = float((logits_of(sharefold.expand(again), probe) - logits).abs().max())
        draw(demo, models["basis"], folder / PICTURE)
        demo.seconds = time.perf_counter() - start
        (folder / RECORD).write_text(json.dumps(demo.to_dict(), indent=1) + "\n")

    write_folder(target, fill)
    if not demo.identical:
        raise SharefoldError(f"{target}: the reloaded network differs from the saved one: please report this")
    return demo


def top1(model: nn.Module, data: Any) -> float:
    """Share of ``data`` that ``model`` classifies rightly."""
    from sharefold.data import loader
    from sharefold.measure import evaluate

    return float(evaluate(model, loader(data, 359), torch.device("cpu"))["top1"])


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """(n, classes) in eval mode."""
    return model.eval()(images)


def _check_extras() -> None:
    from importlib.util import find_spec

    for module, package in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")):
        if find_spec(module) is None:
            raise SharefoldError(f"demo: {package} is missing: pip install 'sharefold[demo]'")


def _check_folder(path: Path, force: bool) -> Path:
    from sharefold.files import check_output

    if path.is_dir() and (not any(path.iterdir()) or (path / RECORD).is_file() or force):
        check_output(path.resolve().parent / f"{path.resolve().name}.probe")  # the place must be writable all the same
        return path
    return check_output(path)
