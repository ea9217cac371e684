"""Our entropy coder beside constriction's: bytes, and codes a second by one thread.

    pip install constriction
    python benchmarks/coder.py

Codes are drawn from discretised logistic distributions of the coder's own classes, as those of rounded networks are spread: of a
ResNet-20, a ResNet-56 and an EfficientNet-Lite0. constriction codes the codes of each class by a model of its own, of the same
probabilities. Every figure is the median of five; rows in ``benchmarks/results/coder.json``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar import hardware

from sharefold.store import rans

RESULTS = Path(__file__).parent / "results" / "coder.json"
SIZES = {"ResNet-20": 270_000, "ResNet-56": 850_000, "EfficientNet-Lite0": 4_600_000}
LARGEST = 31
REPEATS = 5


def drawn(count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Codes and classes (count,), by the probabilities that the coder gives them."""
    classes, codes = generator.integers(5, 11, count), np.empty(count, dtype=np.int64)
    table = rans.frequencies(LARGEST)
    for k in np.unique(classes):
        mine = classes == k
        codes[mine] = generator.choice(table.shape[1], mine.sum(), p=table[k] / table[k].sum()) - LARGEST
    return codes, classes


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and the median of its seconds after a run that does not count."""
    result, seconds = run(), []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds)


def ours(codes: np.ndarray, classes: np.ndarray) -> dict[str, Any]:
    data, encoding = timed(lambda: rans.encode(codes, classes, LARGEST))
    back, decoding = timed(lambda: rans.decode(data, classes, LARGEST))
    assert np.array_equal(back, codes)
    return {"coder": "sharefold", "bytes": len(data), "encode_seconds": encoding, "decode_seconds": decoding}


def theirs(codes: np.ndarray, classes: np.ndarray) -> dict[str, Any]:
    import constriction

    categorical, coder_of = constriction.stream.model.Categorical, constriction.stream.stack.AnsCoder
    table = rans.frequencies(LARGEST).astype(np.float64)
    present = [int(k) for k in np.unique(classes)]
    models = {k: categorical(table[k] / table[k].sum(), perfect=False) for k in present}
    symbols = {k: (codes[classes == k] + LARGEST).astype(np.int32) for k in present}

    def encode() -> np.ndarray:
        coder = coder_of()
        for k in reversed(present):
            coder.encode_reverse(symbols[k], models[k])
        return coder.get_compressed()

    def decode() -> np.ndarray:
        coder, result = coder_of(data), np.empty(len(codes), dtype=np.int64)
        for k in present:
            result[classes == k] = coder.decode(models[k], len(symbols[k])) - LARGEST
        return result

    data, encoding = timed(encode)
    back, decoding = timed(decode)
    assert np.array_equal(back, codes)
    name = f"constriction {importlib.metadata.version('constriction')}"
    return {"coder": name, "bytes": data.nbytes, "encode_seconds": encoding, "decode_seconds": decoding}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    coders = [ours]
    try:
        import constriction  # noqa: F401
    except ImportError:
        print("constriction is not installed: measuring ours alone")
    else:
        coders.append(theirs)
    rows = []
    for network, count in SIZES.items():
        codes, classes = drawn(count, np.random.default_rng(0))
        for coder in coders:
            row = {"network": network, "codes": count, **coder(codes, classes), "hardware": hardware()}
            rows.append({**row, "date": time.strftime("%Y-%m-%d")})
            speeds = [f"{count / row[f'{k}_seconds'] / 1e6:.1f} M/s" for k in ("encode", "decode")]
            print(row["coder"], network, row["bytes"], *speeds)
    options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
