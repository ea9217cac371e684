"""Dense against shared in one run: paired timings, memory, file size, load time, and the best run-time form.

Networks that are compared run in turns, round by round: a machine that slows down for a while slows all of them. With
one CPU thread the ratios are those of processor time, which other programs on the machine do not touch; otherwise
those of the lower quartiles, which throttled rounds do not reach.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sharefold.architectures.build import build_base
from sharefold.checkpoint import load, save
from sharefold.errors import SharefoldError
from sharefold.format import config_of
from sharefold.graph.preserved import preserved
from sharefold.inputs import Input, Tensors, call, each_of, taken
from sharefold.layers import SharedConv, shared_layers
from sharefold.layers.shared_conv import FACTORED_SHARE
from sharefold.plans import Progress
from sharefold.running import as_input, device_of, evaluating, random_kept, run_on
from sharefold.state_dicts import load_tensors, tensor_state

FORMS = ("composed", "factored", "auto")
WARMUP = 3


@dataclass(frozen=True)
class Timing:
    """Wall-clock times of one contestant: ``median`` and ``low``/``high`` quartile in seconds; ``ratio`` is its time
    over the first contestant's (see the module's text)."""

    median: float
    low: float
    high: float
    ratio: float


def race(
    runs: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device, warmup: int = WARMUP,
    progress: Progress | None = None, before: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, Timing]:  # fmt: skip
    """Runs every contestant once a round, each round starting with another one.

    Args:
        runs: name -> what to time; the first is the reference of the ratios.
        before: name -> what to do before each of its runs, untimed.
        repeats: rounds that count.
        device: synchronised before and after each run when it is a GPU.
        warmup: rounds before.
    """
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    busy: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in range(warmup + repeats):
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                if before is not None and name in before:
                    before[name]()
                _wait(device)
                start, worked = time.perf_counter(), time.process_time()
                runs[name]()
                _wait(device)
                if index >= warmup:
                    busy[name].append(time.process_time() - worked)
                    times[name].append(time.perf_counter() - start)
            if progress:
                progress("timing", index + 1, warmup + repeats)
    finally:
        if collecting:
            gc.enable()
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    result = {}
    for name, own in times.items():
        low, median, high = _quartiles(own)
        if alone:
            ratio = statistics.median(a / max(b, 1e-9) for a, b in zip(busy[name], busy[names[0]], strict=True))
        else:
            ratio = low / _quartiles(times[names[0]])[0]
        result[name] = Timing(median, low, high, ratio)
    return result


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def runtime_form(model: nn.Module, form: str | dict[str, str]) -> Iterator[None]:
    """All shared layers in one form, or each in the one that a mapping name -> form gives it; restored at the end."""
    layers = shared_layers(model)
    before = {name: layer.runtime for name, layer in layers.items()}
    _set_forms(layers, form)
    try:
        yield
    finally:
        _set_forms(layers, before)


def _set_forms(layers: dict[str, SharedConv], form: str | dict[str, str]) -> None:
    for name, layer in layers.items():
        layer.runtime = form if isinstance(form, str) else form.get(name, "auto")


# Rounds of :func:`latencies`.
FEWEST_ROUNDS, MOST_ROUNDS = 3, 15


def latencies(dense: nn.Module, model: nn.Module, image: Tensors, seconds: float = 0.5) -> tuple[Timing, Timing]:
    """Latency of both networks on ``image`` (1, C, H, W), or a tuple of tensors, in turns, as they run by themselves; both
    are left as they were.

    Args:
        seconds: for rounds beyond the third.
    """
    device = device_of(model)
    given = taken(image).to(device)
    with preserved(dense), preserved(model), evaluating(dense, model):
        # Every run gets a copy: some networks write into their input.
        networks = {"dense": dense, "model": model}
        runs: dict[str, Callable[[], Any]] = {name: partial(run_on, net, given) for name, net in networks.items()}
        start = time.perf_counter()
        for run in runs.values():
            run()
        rounds = int(seconds / max(time.perf_counter() - start, 1e-6))
        found = race(runs, max(FEWEST_ROUNDS, min(rounds, MOST_ROUNDS)), device, warmup=0)
    return found["dense"], found["model"]


def race_forms(
    model: nn.Module, dense: nn.Module | None, images: Tensors, repeats: int, progress: Progress | None = None
) -> dict[str, Timing]:
    """Latency of ``dense`` (the reference, when given) and of ``model`` in the forms it can take.

    A network without shared layers runs as ``"model"``; one whose layers can only be composed runs as ``"composed"``.
    """
    layers = shared_layers(model)
    given = taken(images)
    ours = as_input(model, given)
    forms = FORMS if any(layer.can_run_factored() for layer in layers.values()) else ("composed",)

    ourselves = partial(call, model, ours)
    runs: dict[str, Callable[[], Any]] = {}
    if dense is not None:
        rival, theirs = dense, as_input(dense, given)
        runs["dense"] = lambda: call(rival, theirs)
    runs.update(dict.fromkeys(forms if layers else ("model",), ourselves))
    before = {form: partial(_first_run, layers, form, ourselves) for form in forms} if layers else {}
    networks = [model] if dense is None else [model, dense]
    kept = {name: layer.runtime for name, layer in layers.items()}
    with evaluating(*networks), random_kept(*networks), runtime_form(model, kept):
        return race(runs, repeats, ours.device, progress=progress, before=before)


def _first_run(layers: dict[str, SharedConv], form: str, run: Callable[[], Any]) -> None:
    """Changes the form and runs once: the first run in a form, which may put weights together, is not one that users wait for."""
    _set_forms(layers, form)
    run()


def race_layers(
    model: nn.Module, images: Tensors, repeats: int, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """For every layer that can run in both forms: which is faster on its real input, and what ``auto`` takes.

    Returns:
        Rows ``name, share`` (multiplications of the factored form over those of the composed), ``composed, factored``
        (median seconds), ``ratio`` (factored over composed), ``faster, auto`` (form names).
    """
    layers = {name: layer for name, layer in shared_layers(model).items() if layer.can_run_factored()}
    rows: list[dict[str, Any]] = []
    given = as_input(model, taken(images))
    kept = {name: layer.runtime for name, layer in shared_layers(model).items()}
    with evaluating(model), random_kept(model), runtime_form(model, kept):
        inputs = _inputs(model, layers, given)
        for done, (name, layer) in enumerate(layers.items()):

            run, alone = partial(layer, inputs[name]), {name: layer}
            before = {form: partial(_first_run, alone, form, run) for form in ("composed", "factored")}
            times = race(dict.fromkeys(before, run), repeats, given.device, before=before)
            ratio = times["factored"].ratio
            rows.append(
                {
                    "name": name,
                    "share": layer.factored_share(),
                    "composed": times["composed"].median,
                    "factored": times["factored"].median,
                    "ratio": ratio,
                    "faster": "factored" if ratio < 1 else "composed",
                    "auto": _form_of_auto(layer),
                }
            )
            if progress:
                progress("layers", done + 1, len(layers))
    return rows


def forms_of_auto(model: nn.Module) -> set[str]:
    """The forms that ``auto`` takes for the layers that can run in both; with one alone, ``auto`` is that form."""
    return {_form_of_auto(layer) for layer in shared_layers(model).values() if layer.can_run_factored()}


def _form_of_auto(layer: SharedConv) -> str:
    return "factored" if layer.factored_share() <= FACTORED_SHARE else "composed"


def _inputs(model: nn.Module, layers: dict[str, SharedConv], images: Input) -> dict[str, Tensor]:
    """What every layer reads in a forward pass of ``images``; of the first call where there are several."""
    found: dict[str, Tensor] = {}
    handles = []
    for name, layer in layers.items():

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            found.setdefault(name, inputs[0].detach().clone())  # an activation behind may write in place

        handles.append(layer.register_forward_pre_hook(hook))
    try:
        call(model, images)
    finally:
        for handle in handles:
            handle.remove()
    return found


class _Live(TorchDispatchMode):
    """Bytes of the storages that exist at once among what passes through; views count once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return result


def peak_tensor_bytes(model: nn.Module, images: Tensors) -> int:
    """Most bytes of tensors alive during inference: parameters, buffers, composed weights, activations, images.

    On a GPU what the allocator says; on the CPU counted tensor by tensor (a library's scratch space is not seen).
    """
    for layer in shared_layers(model).values():
        layer.train(layer.training)  # drops the composed weight, which belongs to what is measured
    given = as_input(model, taken(images))
    device = given.device
    with evaluating(model), random_kept(model):
        if device.type == "cuda":
            call(model, given)
            torch.cuda.reset_peak_memory_stats(device)
            call(model, given)
            return torch.cuda.max_memory_allocated(device)
        live = _Live()
        for tensor in (*each_of(given), *model.parameters(), *model.buffers()):
            live.see(tensor)
        with live:
            call(model, given)
            call(model, given)
    return live.peak


def race_loading(
    shared: nn.Module, dense: nn.Module, repeats: int = 5, progress: Progress | None = None
) -> tuple[dict[str, int], dict[str, Timing]]:
    """File sizes in bytes, and the time from a file to a network that can run, of ``shared`` and of ``dense``.

    Both are written as safetensors to a temporary folder and read from there; both times include building the
    architecture.

    Raises:
        SharefoldError: neither timm nor torchvision has the architecture.
    """
    base = config_of(shared).base
    if not base:
        raise SharefoldError("bench: load times need a network of a known architecture, and this one is of your own")
    with tempfile.TemporaryDirectory(prefix="sharefold-bench-") as folder:
        ours, theirs = Path(folder) / "shared.safetensors", Path(folder) / "dense.safetensors"
        save(shared, ours)
        state = {name: t.detach().cpu().contiguous().clone() for name, t in tensor_state(dense).items()}
        save_file(state, theirs)
        del state

        def read_dense() -> None:
            load_tensors(build_base(base), load_file(theirs), assign=True)

        sizes = {"dense": theirs.stat().st_size, "shared": ours.stat().st_size}
        runs: dict[str, Callable[[], Any]] = {"dense": read_dense, "shared": lambda: load(ours)}
        return sizes, race(runs, repeats, torch.device("cpu"), warmup=1, progress=progress)


def explain(rows: Sequence[dict[str, Any]], forms: dict[str, Timing], auto: Collection[str] = ()) -> list[str]:
    """What was found about the run-time form, in sentences.

    Args:
        rows: of :func:`race_layers`, or none where layers were not timed alone.
        forms: of :func:`race_forms`.
        auto: of :func:`forms_of_auto`: a form that ``auto`` takes everywhere is not advised in its place.
    """
    if not forms.keys() & set(FORMS):
        return ["No layer shares: there is one way to run."]
    if "factored" not in forms:
        return ["Every shared layer runs composed: none has a cheaper factored form, and the composed weight is kept "
                "between calls, so the speed is that of the dense network."]  # fmt: skip
    fast, slow = sorted(("composed", "factored"), key=lambda form: forms[form].ratio)
    gain = forms[slow].ratio / forms[fast].ratio
    lines = [f"{fast} is the faster form of the whole network here, by {gain:.2f} times."]
    wrong = [row["name"] for row in rows if row["auto"] != row["faster"]]
    if rows:
        lines.append(
            f"auto runs a layer factored when that takes at most {FACTORED_SHARE:.0%} of the multiplications: "
            f"{sum(row['auto'] == 'factored' for row in rows)} of {len(rows)} layers; "
            f"measured alone, {sum(row['faster'] == 'factored' for row in rows)} are faster factored"
            + (f", and auto is wrong on {len(wrong)}." if wrong else ", the same ones.")
        )
    best = min(("composed", "factored", "auto"), key=lambda form: forms[form].ratio)
    if best != "auto" and set(auto) != {best} and forms["auto"].ratio / forms[best].ratio > 1.05:
        gain = forms["auto"].ratio / forms[best].ratio
        lines.append(f"Set runtime = {best!r} on the shared layers to be {gain:.2f} times as fast as auto.")
    return lines
