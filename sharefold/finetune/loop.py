"""The verb ``finetune``: the loop over epochs, with validation, checkpoints, resuming and stopping."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sharefold.checkpoint import check_saves, save
from sharefold.data.class_names import check_same_numbers, warn_about_count
from sharefold.data.preprocess import Size
from sharefold.errors import SharefoldError
from sharefold.files import check_path
from sharefold.finetune import seeds
from sharefold.finetune.batches import Data, EvalBatches, MemoryImages, TrainBatches
from sharefold.finetune.config import FinetuneConfig
from sharefold.finetune.distributed import World, world
from sharefold.finetune.evaluate import evaluate
from sharefold.finetune.interrupt import Interrupted, StopRequest
from sharefold.finetune.loaders import (
    in_memory,
    preprocess_of,
    ready,
    training_batches,
    validation_batches,
    warn_about_teacher,
)
from sharefold.finetune.log import RunLog, draw_curve
from sharefold.finetune.optimizer_state import check_optimizer, with_own_kernels
from sharefold.finetune.run_state import check_progress, check_same_run, check_tensors, read_state, write_state
from sharefold.finetune.schedule import Schedule, build_optimizer
from sharefold.finetune.step import Updater, freeze_norms
from sharefold.finetune.whole import whole_factors
from sharefold.format import carried_config, carry_config, config_of, without_figures
from sharefold.options import RunOptions, chosen
from sharefold.running import check_values, dtype_of
from sharefold.state_dicts import load_tensors, tensor_state
from sharefold.store.held_codes import check_holds_none

STATE_FILE = "state.pt"


@dataclass
class FinetuneReport:
    """What a run did. Accuracies are fractions of 1, None without validation images.

    Attributes:
        top1_before, top1_after: on ``val``, of the weights handed in and of those returned.
        teacher_top1: the teacher's, where there is one.
        epochs, updates: how many were made, over all sessions of the run.
        seconds: training time over all sessions, validation included.
        images_per_second: of the training updates of this session, all processes together.
        history: one record an epoch, {epoch, step, loss, top1, ...}.
        output: the sharefold directory that was saved, or None: also where a run was resumed that had ended before, whose result
            lies there already.
        run_dir: the folder with state, log and curve, or None.
    """

    top1_before: float | None
    top1_after: float | None
    teacher_top1: float | None
    epochs: int
    updates: int
    seconds: float
    images_per_second: float
    history: list[dict[str, Any]] = field(default_factory=list)
    output: str | None = None
    run_dir: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def finetune(
    model: nn.Module, train: Data, val: Data | None = None, *, teacher: nn.Module | None = None,
    config: FinetuneConfig | None = None, run: RunOptions | None = None, **settings: Any,
) -> FinetuneReport:  # fmt: skip
    """Trains ``model`` in place, by labels, by a teacher, or by both.

    Args:
        model: any classifier, converted or not; returns logits (B, classes). What else it returns while it trains, as that of
            auxiliary heads, does not count, and those heads stay as they are.
        train: a DATA string, (images, labels), images alone, a map-style Dataset or a DataLoader. Images are uint8 or
            normalised float, (N, C, H, W) or (N, H, W, C); where the model takes both and its ``pretrained_cfg`` does not tell,
            (N, C, H, W). Those in memory keep their size, in training and in validation; DATA strings beside them are opened at
            it, and a converted model remembers it. Several inputs come as ((a, b), labels), or as a Dataset or DataLoader of
            ((a, b), label), and are not augmented.
        val: the same, or None.
        teacher: a network of the same classes; it is put in eval mode and moved to the device.
        config: how it trains.
        run: where the run is kept. ``settings`` are single fields of both (``epochs=4, lr=1e-3, out="tuned"``).

    Under torchrun or ``accelerate launch`` every process calls this with the same arguments.

    Raises:
        SharefoldError: unusable data or settings; ``out`` or ``metrics`` that :func:`sharefold.save` refuses, before any work; a
            loss that is not finite (the run's last good state stays on disk); memory exhausted.
        Interrupted: a KeyboardInterrupt, after SIGINT or SIGTERM: the step is finished and the run saved.
    """
    kept = {name: settings.pop(name) for name in [spec.name for spec in fields(RunOptions)] if name in settings}
    config, run = FinetuneConfig.build(config, **settings), chosen(run, kept, RunOptions)
    check_holds_none(model, "finetune")
    if teacher is model:
        raise SharefoldError("finetune: teacher is the model itself: pass the original network")
    if teacher is None and not config.labels:
        raise SharefoldError("finetune: without labels there must be a teacher: pass one")
    if teacher is None and config.block_match:
        raise SharefoldError(f"finetune: block_match={config.block_match:g}: there is no teacher whose blocks to match: pass one")
    if val is None and config.keep == "best":
        raise SharefoldError("finetune: keep=best: there are no validation images to tell by: pass val, or keep=last")
    for name, network in (("model", model), ("teacher", teacher)):
        if network is not None:
            check_values(network, f"finetune: {name}")
        if network is not None and dtype_of(network) != torch.float32:
            kind = str(dtype_of(network)).removeprefix("torch.")
            raise SharefoldError(f"finetune: the {name} computes in {kind}: pass it in float32 ({name}.float())")
    out = None if run.out is None else Path(run.out)
    run_dir = out.with_name(out.name + ".run") if run.run_dir is None and out is not None else run.run_dir
    folder = None if run_dir is None else Path(run_dir)
    with world(config.device) as where, seeds.restored(), _memory_hint(config, where):
        if where.first:
            _check_places(model, out, folder, run)
        train, val = in_memory(train, model), None if val is None else in_memory(val, model)
        sizes = [data.size for data in (val, train) if isinstance(data, MemoryImages)]
        size = sizes[0] if sizes else None
        if teacher is not None and where.first:
            warn_about_teacher(model, teacher, config, size)
        train = ready(train, "train", model, config, size)[0]
        val = None if val is None else ready(val, "val", model, config, size)[0]
        if config.labels:
            check_same_numbers(train, val)
        batches = training_batches(train, model, config, where, size)
        checks = None if val is None else validation_batches(val, model, config, where, size)
        with _modes_after_errors(model), whole_factors(model):
            loop = _Run(model, teacher, batches, checks, config, where, folder, run.quiet)
            for data in (train if config.labels else None, val) if where.first else ():
                warn_about_count(data, loop.updater.classes, "finetune")
            report = loop.go(run.resume)
        if size is not None:
            _carry_size(model, config, size)
        if out is not None and where.first and (run.force or not loop.is_saved(out)):
            top1 = {} if report.top1_after is None else {"top1": report.top1_after}
            told = {**(run.metrics or {}), **top1, "finetune": _card(report, config, batches)}
            carry_config(model, without_figures(config_of(model)))
            save(model, out, metrics=told, force=run.force or run.resume)
            report.output = str(out)
        loop.tell(report)
        where.wait()
        del loop  # and with it what holds the process group, whose threads may not outlive it
    return report


def _check_places(model: nn.Module, out: Path | None, folder: Path | None, run: RunOptions) -> None:
    """Refuses before the training what could not be saved after it."""
    replaces = run.force or run.resume
    if out is not None:
        check_saves(model, out, run.metrics, replaces)
    if folder is None:
        return
    check_path(folder)
    if folder.exists() and not folder.is_dir():
        raise SharefoldError(f"{folder}: is a file: choose another folder for the run")
    if not replaces and (folder / STATE_FILE).exists():
        raise SharefoldError(f"{folder}: holds a run: go on with --resume, or overwrite it with --force")


def _carry_size(model: nn.Module, config: FinetuneConfig, size: Size) -> None:
    """Has a converted model say what images it was measured on, so that ``eval`` and ``verify`` of its file find the same."""
    carried = carried_config(model)
    if carried is not None:
        told = {**carried.pretrained_cfg, **preprocess_of(model, config, size).cfg}
        carry_config(model, replace(carried, pretrained_cfg=told))


def _card(report: FinetuneReport, config: FinetuneConfig, batches: TrainBatches) -> dict[str, Any]:
    """What the saved model says about its fine-tuning."""
    short = {k: v for k, v in report.to_dict().items() if k not in {"history", "output", "run_dir"} and v is not None}
    changed = {k: v for k, v in config.to_dict().items() if v != FinetuneConfig().to_dict()[k]}
    return {**short, "train_images": batches.images, "batch_size": batches.batch_size, "config": changed}


@contextmanager
def _modes_after_errors(model: nn.Module) -> Iterator[None]:
    """An exception leaves every module in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, mode in modes:
            module.training = mode
        raise


@contextmanager
def _memory_hint(config: FinetuneConfig, where: World) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        at_once = max(1, config.batch_size // config.accumulate // where.size)
        raise SharefoldError(
            f"finetune: {where.device} is out of memory with {at_once} images at a time: try --batch-size "
            f"{max(1, config.batch_size // 2)}, or --accumulate {config.accumulate * 2} for the same batch in slices"
        ) from None


class _Run:
    """A run and its state; ``go`` does it."""

    def __init__(
        self, model: nn.Module, teacher: nn.Module | None, batches: TrainBatches, checks: EvalBatches | None,
        config: FinetuneConfig, where: World, folder: Path | None, quiet: bool,
    ) -> None:  # fmt: skip
        from timm.utils import ModelEmaV3

        self.batches, self.checks, self.config, self.world = batches, checks, config, where
        self.folder = folder if where.first else None
        self.state_path = folder / STATE_FILE if folder is not None else None
        # Of volumes there is no such order.
        known = [*model.parameters(), *model.buffers(), *(() if teacher is None else (*teacher.parameters(), *teacher.buffers()))]
        flat = all(tensor.dim() < 5 for tensor in known)
        layout = torch.channels_last if config.channels_last and flat else torch.contiguous_format
        self.model = model.to(where.device).to(memory_format=layout)
        self.teacher = None if teacher is None else teacher.to(where.device).to(memory_format=layout).eval()
        self.optimizer = build_optimizer(model, config)
        self.schedule = Schedule(self.optimizer, config, batches.steps)
        example, _ = next(batches.epoch(0))
        self.updater = Updater(model, self.teacher, self.optimizer, config, where, example)
        for labelled in ([batches] if config.labels else []) + ([] if checks is None else [checks]):
            labelled.expect(self.updater.classes)
        self.ema = ModelEmaV3(model, decay=config.ema, use_warmup=True, warmup_power=0.75) if config.ema else None
        self.log = RunLog(self.folder, show=where.first and not quiet, tensorboard=config.tensorboard)
        # A GPU is asked for numbers only now and then: each question makes it wait.
        self.check_every = 1 if where.device.type == "cpu" else 10
        self.updates = self.epochs_done = self.logged_at = self.saved_at = 0
        self.had_ended = False
        self.seconds = self.train_seconds = self.clock = self.saved = self.epoch_loss = 0.0
        self.last: dict[str, float] = {}  # the latest line of the log
        self.history: list[dict[str, Any]] = []
        self.before: dict[str, float | None] = {"model": None, "teacher": None}
        self.best: tuple[float, dict[str, Tensor]] | None = None
        self.sums: dict[str, Tensor] = {}
        self.bad_step = torch.full((), -1, device=where.device)

    # The loop ----------------------------------------------------------------------------------------------------

    def go(self, resume: bool) -> FinetuneReport:
        config, total = self.config, self.config.epochs * self.batches.steps
        if not (resume and self._load()):
            self._begin()
        self.saved = self.clock = time.perf_counter()
        self.saved_at = updates_before = self.updates
        self.had_ended = self.updates == total
        with StopRequest() as stop, self.updater.watching(), self.log.progress(total, self.updates):
            for epoch in range(self.epochs_done, config.epochs):
                self._train_mode()
                first = self.updates - epoch * self.batches.steps
                stream = self.batches.epoch(epoch, first)
                for step in range(first, self.batches.steps):
                    seeds.seed_everything(seeds.mixed("step", config.seed, epoch, step, self.world.rank))
                    self._note(self.updater.update(stream, small=self.updates < config.small_images * total))
                    self.updates += 1
                    self.schedule.step(self.updates)
                    if self.ema is not None:
                        self.ema.update(self.model, self.updates)
                    if self.updates % self.check_every == 0 or step + 1 == self.batches.steps:
                        self._attend(epoch, stop)
                stream.close()  # type: ignore[attr-defined]
                self.epochs_done = epoch + 1
                self._validate(epoch, last=epoch + 1 == config.epochs)
                self._save()
        trained = (self.updates - updates_before) * self.batches.batch_size
        rate = trained / self.train_seconds if trained else 0.0
        self._finish()
        last = self.history[-1].get("top1") if self.history else None
        after = self.best[0] if self.best is not None and config.keep == "best" else last
        return FinetuneReport(
            self.before["model"], after, self.before["teacher"], self.epochs_done, self.updates, round(self.seconds, 3),
            round(rate, 1), self.history, run_dir=str(self.folder) if self.folder else None,
        )  # fmt: skip

    def _begin(self) -> None:
        """What a new run does before its first update."""
        if self.folder is not None and self.folder.exists():
            for name in (STATE_FILE, "log.jsonl", "curve.png"):
                (self.folder / name).unlink(missing_ok=True)
            shutil.rmtree(self.folder / "tensorboard", ignore_errors=True)
        self.log.open(0)
        if self.checks is not None:
            for name, network in (("model", self.model), ("teacher", self.teacher)):
                if network is not None:
                    self.before[name] = evaluate(network, self.checks, self.world, self.updater.autocast)["top1"]
            self.log.write("val", 0, epoch=0, top1=self.before["model"])
        self._save()

    def _train_mode(self) -> None:
        self.model.train()
        if self.config.freeze_norm:
            freeze_norms(self.model)

    def _note(self, parts: dict[str, Tensor]) -> None:
        """Adds a step's numbers up on the device and remembers the first step whose loss is not finite."""
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value
        bad = ~torch.isfinite(parts["loss"]) & (self.bad_step < 0)
        self.bad_step = torch.where(bad, self.updates + 1, self.bad_step)

    def _attend(self, epoch: int, stop: StopRequest) -> None:
        """Between two updates: diverged? asked to stop? time to log or save?"""
        bad, wish = self.world.largest([float(self.bad_step), float(stop.signal)])
        if bad >= 0:
            self._diverged(int(bad), epoch)
        config, now = self.config, time.perf_counter()
        if self.updates - self.logged_at >= config.log_steps or self.updates == (epoch + 1) * self.batches.steps:
            self._write_log(epoch, now)
        else:
            self.log.advance(self.updates, epoch)
        by_steps = 0 < config.checkpoint_steps <= self.updates - self.saved_at
        by_time = 0 < 60 * config.checkpoint_minutes < now - self.saved
        if by_steps or by_time or wish:
            self._save()
        if wish:
            kept = f"saved in {self.state_path}: go on with --resume" if self.state_path else "no run folder: not saved"
            raise Interrupted(f"finetune: stopped after update {self.updates}; {kept}", 128 + int(wish))

    def _write_log(self, epoch: int, now: float) -> None:
        names = list(self.sums)
        count = self.updates - self.logged_at
        means = (self.world.sum(torch.stack([self.sums[n] for n in names])) / self.world.size / count).tolist()
        values = dict(zip(names, means, strict=True))
        self.epoch_loss += values["loss"] * count
        values["images_per_second"] = round(count * self.batches.batch_size / max(now - self.clock, 1e-9), 1)
        self.seconds += now - self.clock
        self.train_seconds += now - self.clock
        rate = max(g["lr"] for g in self.optimizer.param_groups)
        self.log.write("train", self.updates, epoch=epoch + 1, lr=rate, **values, seconds=round(self.seconds, 3))
        self.log.advance(self.updates, epoch, values)
        self.sums, self.logged_at, self.clock = {}, self.updates, now
        self.last = values

    def _diverged(self, step: int, epoch: int) -> None:
        good = f"the last good state is in {self.state_path}" if self.state_path else "no run folder, no saved state"
        raise SharefoldError(
            f"finetune: the loss is not finite at update {step} (epoch {epoch + 1}); {good}: try a lower --lr (now "
            f"{self.config.lr:g}), --clip 1, or --amp off"
        )

    # Validation and the end --------------------------------------------------------------------------------------

    def _result(self) -> nn.Module:
        return self.model if self.ema is None else self.ema.module

    def _validate(self, epoch: int, last: bool) -> None:
        train_loss, self.epoch_loss = self.epoch_loss / self.batches.steps, 0.0
        record: dict[str, Any] = {"epoch": epoch + 1, "step": self.updates, "train_loss": train_loss}
        if self.checks is not None and (last or (epoch + 1) % self.config.eval_epochs == 0):
            _same_everywhere(self._result(), self.world)
            found = evaluate(self._result(), self.checks, self.world, self.updater.autocast)
            record |= found
            self.log.write("val", self.updates, epoch=epoch + 1, **found)
            if self.config.keep == "best" and (self.best is None or found["top1"] > self.best[0]):
                weights = {k: v.detach().cpu().clone() for k, v in tensor_state(self._result()).items()}
                self.best = (found["top1"], weights)
        now = time.perf_counter()
        self.seconds += now - self.clock
        self.clock = now
        self.history.append(record)
        top1 = f", top-1 {record['top1']:.2%}" if "top1" in record else ""
        self.log.say(f"epoch {epoch + 1}/{self.config.epochs}: loss {record['train_loss']:.4f}{top1}, "
                     f"{self.last['images_per_second']:,.0f} images/s")  # fmt: skip

    def _finish(self) -> None:
        """Puts the weights to return into the model."""
        if self.best is not None:
            load_tensors(self.model, self.best[1])
        elif self.ema is not None:
            load_tensors(self.model, self.ema.module.state_dict())
        _same_everywhere(self.model, self.world)
        self.model.eval()
        if self.log.path is not None and not draw_curve(self.log.path, self.log.path.with_name("curve.png")):
            self.log.say("curve.png: not drawn: pip install 'sharefold[plots]'")
        self.log.close()

    def tell(self, report: FinetuneReport) -> None:
        """The before/after table."""
        parameters = f"{sum(p.numel() for p in self.model.parameters()):,}"

        def share(value: float | None) -> str:
            return "-" if value is None else f"{value:.2%}"

        rows = [["before", parameters, share(report.top1_before)], ["after", parameters, share(report.top1_after)]]
        if self.teacher is not None:
            count = f"{sum(p.numel() for p in self.teacher.parameters()):,}"
            rows.append(["teacher", count, share(report.teacher_top1)])
        title = f"{report.epochs} epochs, {report.seconds:,.0f} s, {report.images_per_second:,.0f} images/s"
        self.log.table(title, ["", "parameters", "top-1"], rows)

    # State -------------------------------------------------------------------------------------------------------

    def is_saved(self, out: Path) -> bool:
        """Whether the run had ended before this session, and what lies at ``out`` was written since."""
        if not (self.had_ended and self.state_path is not None and out.exists()):
            return False
        return out.stat().st_mtime_ns >= self.state_path.stat().st_mtime_ns

    def _shapes(self) -> dict[str, list[int]]:
        return {name: list(value.shape) for name, value in tensor_state(self.model).items()}

    def _save(self) -> None:
        """Writes the run's state, unless a weight is not finite: then the last good one stays and the run stops."""
        if self.folder is None or self.state_path is None:
            return
        weights = tensor_state(self.model)
        if not all(bool(torch.isfinite(w).all()) for w in weights.values() if w.is_floating_point()):
            self._diverged(self.updates, self.updates // max(1, self.batches.steps))
        now = time.perf_counter()
        write_state(self.state_path, {
            "config": self.config.to_dict(), "images": self.batches.images, "shapes": self._shapes(),
            "updates": self.updates, "epochs_done": self.epochs_done, "logged_at": self.logged_at,
            "seconds": self.seconds + (now - self.clock if self.updates else 0.0),
            "history": self.history, "before": self.before, "last": self.last, "epoch_loss": self.epoch_loss,
            "sums": {k: float(v) for k, v in self.sums.items()},
            "model": weights, "optimizer": self.optimizer.state_dict(), "scaler": self.updater.scaler.state_dict(),
            "ema": None if self.ema is None else tensor_state(self.ema.module),
            "best": None if self.best is None else {"top1": self.best[0], "weights": self.best[1]},
        })  # fmt: skip
        self.saved, self.saved_at = now, self.updates

    def _load(self) -> bool:
        """Takes the saved state up; False when there is none."""
        if self.state_path is None:
            raise SharefoldError("finetune: resume: there is no run folder: give out or run_dir")
        found = self.world.first and self.state_path.exists()
        state = self.world.from_first(read_state(self.state_path) if found else None)
        if state is None:
            return False
        check_same_run(self.state_path, state, self.config, self.batches.images, self._shapes())
        check_progress(self.state_path, state, self.config, self.batches.steps)
        self.updates, self.epochs_done, self.logged_at = state["updates"], state["epochs_done"], state["logged_at"]
        self.seconds, self.history, self.before = state["seconds"], state["history"], state["before"]
        self.last, self.epoch_loss = state["last"], state["epoch_loss"]
        self.sums = {k: torch.tensor(v, device=self.world.device) for k, v in state["sums"].items()}
        try:
            own = tensor_state(self.model)
            best = (state["best"] or {"weights": own})["weights"]
            for tensors in (state["model"], own if self.ema is None else state["ema"] or {}, best):
                check_tensors(tensors, own)
            # A gradient scaler leaves out the steps in which it looks for its factor.
            stepped = self.updates > 0 and not state["scaler"]
            check_optimizer(self.optimizer, state["optimizer"], self.config, stepped=stepped)
            load_tensors(self.model, state["model"])
            self.optimizer.load_state_dict(with_own_kernels(self.optimizer, state["optimizer"]))
            self.updater.scaler.load_state_dict(state["scaler"])
            if self.ema is not None:
                load_tensors(self.ema.module, state["ema"])
        except (RuntimeError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise SharefoldError(f"{self.state_path}: damaged run state ({reason}): remove it to start anew") from None
        if state["best"] is not None:
            self.best = (state["best"]["top1"], state["best"]["weights"])
        self.schedule.step(self.updates)
        self.log.open(self.updates)
        self.log.say(f"resumed at update {self.updates} of {self.config.epochs * self.batches.steps}")
        return True


def _same_everywhere(model: nn.Module, where: World) -> None:
    """Gives every process the first one's buffers: BatchNorm statistics are gathered by each on its own images."""
    if where.size > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)
