"""Coverage-guided fuzzing of one target with atheris (Linux): ``python scripts/fuzz_guided.py plan -max_total_time=600``.

Targets are those of ``tests/fuzz/targets.py``; findings are written to the working folder, and belong into
``tests/fuzz/corpus/TARGET/`` once they are mended. Further options go to libFuzzer.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.exit("atheris is missing: pip install atheris (Linux, CPython)")

FUZZ = Path(__file__).resolve().parents[1] / "tests" / "fuzz"
sys.path.insert(0, str(FUZZ))
with atheris.instrument_imports(include=["sharefold"]):
    import targets


def main() -> None:
    name = sys.argv.pop(1)
    if name not in targets.TARGETS:
        sys.exit(f"{name!r} is none of {', '.join(targets.TARGETS)}")
    warnings.simplefilter("ignore")
    atheris.Setup([*sys.argv, str(FUZZ / "corpus" / name)], lambda data: targets.check(name, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
