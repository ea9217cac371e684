"""Damages files of every kind at random and counts what happens: nothing but a refusal in one line, or the same network.

    python scripts/fuzz_files.py --count 2000 [--kind fp32,stored,packed,directory,plan,pt] [--seed 0] [--json out.json]

Kinds: ``fp32`` and ``stored`` files, ``packed`` ones (all in one tensor), ``directory``, a ``plan`` as JSON, and a checkpoint of
``torch.save`` (``pt``). Exit code 1 when a network came back with other logits and without a word, when something else than one
line was raised, or when memory or time ran away.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import sharefold
from sharefold.blank import install
from sharefold.errors import SharefoldError
from sharefold.plans import Plan
from sharefold.untrusted import read_text

KINDS = ("fp32", "stored", "packed", "directory", "plan", "pt")
SECONDS, MEGABYTES = 30, 400
X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Mutation = Callable[[bytearray, random.Random], None]


def flip(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 1, 1, 4, 64))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def overwrite(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    length = draw.choice((1, 4, 8, 64, 4096))
    data[start : start + length] = draw.choice((bytes(length), b"\xff" * length, draw.randbytes(length)))


def cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def drop(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    del data[start : start + draw.choice((1, 4, 100))]


def insert(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    data[start:start] = draw.randbytes(draw.choice((1, 4, 100)))


def repeat(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    piece = data[start : start + draw.choice((1, 16, 4096))]
    place = draw.randrange(len(data))
    data[place : place + len(piece)] = piece


def text(data: bytearray, draw: random.Random) -> None:
    """A number, or a sign of JSON, in the head of the file, where the texts are."""
    head = bytes(data[: min(len(data), 20_000)])
    places = [i for i, byte in enumerate(head) if byte in b'0123456789{}[]",:truefalsn']
    if places:
        at = draw.choice(places)
        data[at : at + 1] = draw.choice((b"9", b"-", b"0", b"e", b"{", b"]", b'"', b"null", b"NaN", b"9" * 30, b"\x00", b"\xff"))


MUTATIONS: tuple[Mutation, ...] = (flip, flip, overwrite, cut, drop, insert, repeat, text, text)


def network() -> torch.nn.Module:
    model = sharefold.open_source("timm:digits_resnet").model
    images = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    cal = sharefold.calibrate(model, images)
    plan = sharefold.plan(model, "60%", cal)
    sharefold.convert_(model, plan, cal)
    return model.eval()


def make(kind: str, folder: Path) -> tuple[Path, list[Path]]:
    """What is opened, and the files that are damaged."""
    model = network()
    if kind == "packed":  # a network that shares nothing, whose file would be larger than the original's
        model = sharefold.open_source("timm:digits_resnet").model
        sharefold.convert_(model, Plan([], 0, 0), X)
    if kind == "pt":
        path = folder / "digits_resnet.pt"
        torch.save(sharefold.open_source("timm:digits_resnet").model.state_dict(), path)
        return path, [path]
    if kind == "plan":
        path = folder / "plan.json"
        path.write_text(model.sharefold_config.plan.to_json())  # type: ignore[union-attr]
        return path, [path]
    if kind == "stored":
        sharefold.store.quantize_(model, "int6", calibration=X.repeat(8, 1, 1, 1))
    path = sharefold.save(model, folder / ("net" if kind == "directory" else "net.safetensors"))
    return path, [path] if path.is_file() else [path / "model.safetensors", path / "sharefold_config.json"]


@torch.no_grad()
def outcome(kind: str, path: Path) -> Any:
    """What came of opening ``path``: logits, or a plan as text."""
    if kind == "plan":
        plan = Plan.from_json(read_text(path, "plan"), "plan")
        install(sharefold.open_source("timm:digits_resnet", pretrained=False).model, plan)
        return plan.to_json()
    model = sharefold.open_source(path).model if kind == "pt" else sharefold.load(path)
    return model(X)


def run(kind: str, count: int, seed: int) -> dict[str, Any]:
    found: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    start, memory = time.process_time(), 0
    with tempfile.TemporaryDirectory(prefix="sharefold-fuzz-") as place:
        path, files = make(kind, Path(place))
        good = {file: file.read_bytes() for file in files}
        wanted = outcome(kind, path)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(count):
            draw = random.Random(f"{kind} {seed} {number}")
            for file, data in good.items():
                file.write_bytes(data)
            file = draw.choice(files)
            data = bytearray(good[file])
            change = draw.choice(MUTATIONS)
            change(data, draw)
            file.write_bytes(data)
            what, told = judged(kind, path, wanted)
            found[what] += 1
            if what in ("silently other", "traceback", "hung"):
                examples.setdefault(what, []).append(f"{kind} seed {seed} number {number} ({change.__name__}): {told}")
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        shutil.rmtree(path, ignore_errors=True)
    if memory > MEGABYTES:
        examples["memory"] = [f"{kind}: {memory} MB more than before"]
    return {"kind": kind, "count": count, **dict(sorted(found.items())), "memory_mb": memory,
            "cpu_seconds": round(time.process_time() - start, 1), "examples": examples}  # fmt: skip


def judged(kind: str, path: Path, wanted: Any) -> tuple[str, str]:
    def stop(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = outcome(kind, path)
        warned = [str(w.message) for w in caught if issubclass(w.category, sharefold.SharefoldWarning)]
        if (got == wanted) if isinstance(wanted, str) else torch.equal(got, wanted):
            return "same", ""
        if kind == "plan":
            return "another plan, as its text says", ""
        return ("other, with a note" if warned else "silently other"), "; ".join(warned)
    except SharefoldError as error:
        message = str(error)
        return ("refused", message) if "\n" not in message else ("traceback", f"two lines: {message!r}")
    except TimeoutError:
        return "hung", f"more than {SECONDS} s"
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.alarm(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--kind", default=",".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for kind in given.kind.split(","):
        result = run(kind, given.count, given.seed)
        results.append(result)
        print({key: value for key, value in result.items() if key != "examples"}, flush=True)
        for lines in result["examples"].values():
            print("\n".join(f"  {line}" for line in lines[:10]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")
    return 1 if any(result["examples"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
