"""Codes the arrays of an npz file by NNCodec (ISO/IEC 15938-17) and writes what comes back; run by ``bytes.py``.

    PYTHON benchmarks/nncodec_code.py IN.npz FOLDER QP [QP ...]

PYTHON is of an environment with ``nncodec`` (and numpy below 2), which needs nothing of sharefold. For every quantisation
parameter, with dependent quantisation and all else by default, ``FOLDER/QP.npz`` holds the decoded arrays; the last line of the
output is JSON: the version, and bytes and seconds by QP.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from nncodec.nn import decode, encode


def main() -> None:
    source, folder, *steps = sys.argv[1:]
    with np.load(source) as file:
        arrays = {name: file[name] for name in file.files}
    found = {}
    for step in steps:
        with tempfile.TemporaryDirectory() as scratch:
            settings = {"qp": int(step), "results": scratch, "verbose": False}
            start = time.process_time()
            stream = encode(dict(arrays), settings)
            seconds = time.process_time() - start
        stream = stream[0] if isinstance(stream, tuple) else stream
        decoded = decode(stream, settings)
        np.savez(Path(folder) / f"{step}.npz", **{name: np.asarray(decoded[name]).reshape(arrays[name].shape) for name in arrays})
        found[step] = {"bytes": len(stream), "seconds": round(seconds, 2)}
    print(json.dumps({"version": version("nncodec"), "found": found}))


if __name__ == "__main__":
    main()
