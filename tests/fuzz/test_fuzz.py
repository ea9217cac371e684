"""Random and damaged inputs: a refusal in one line, or a result.

``SHAREFOLD_FUZZ_SECONDS`` sets how long each target runs; where it is set, the inputs are new ones every time.
"""

from __future__ import annotations

import os
import random
import sys
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from targets import TARGETS, check

CORPUS = Path(__file__).parent / "corpus"
NEW = "SHAREFOLD_FUZZ_SECONDS" in os.environ
SECONDS = float(os.environ.get("SHAREFOLD_FUZZ_SECONDS", "0.6"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4), max_leaves=20,
)  # fmt: skip
KEYS = st.sampled_from(
    ["plan", "groups", "name", "method", "members", "options", "base", "library", "kwargs", "aliases", "store", "format",
     "metrics", "pretrained_cfg", "input_size", "mean", "std", "format_version", "plan_version", "params_after", "error", "stage"]
)  # fmt: skip
LIKELY = st.recursive(
    st.none() | st.integers(-2, 5) | st.sampled_from(["timm", "basis", "digits_resnet", "x"]) | st.floats(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=25,
)  # fmt: skip


def corpus(name: str) -> list[bytes]:
    return [file.read_bytes() for file in sorted((CORPUS / name).iterdir())]


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_and_its_mutations(name: str) -> None:
    seeds = corpus(name)
    assert seeds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data in seeds:
            check(name, data)
        end, number = time.process_time() + SECONDS, 0
        while time.process_time() < end:
            draw = random.Random(None if NEW else f"{name} {number}")
            number += 1
            data = bytearray(draw.choice(seeds))
            for _ in range(draw.choice((1, 1, 2, 8))):
                at = draw.randrange(len(data) + 1)
                if draw.random() < 0.5 and at < len(data):
                    data[at] = draw.choice((0, 255, data[at] ^ (1 << draw.randrange(8)), draw.randrange(256)))
                elif draw.random() < 0.5:
                    data[at:at] = draw.choice((b"9" * 20, b'"', b"{", b"[", b"\x00" * 8, b"\xff" * 8, bytes(data[:16])))
                else:
                    del data[at : at + draw.choice((1, 4, 64))]
            try:
                check(name, bytes(data))
            except Exception as error:
                raise AssertionError(f"{name}, number {number - 1}: {bytes(data)[:2000]!r}") from error


@pytest.mark.parametrize("name", ["config", "plan", "state_dict"])
@given(data=JSON | LIKELY | LIKELY.map(lambda value: {"plan": {"groups": []}, "store": value, "base": value}))
@settings(max_examples=100, deadline=None, derandomize=not NEW, suppress_health_check=list(HealthCheck))
def test_any_json(name: str, data: object) -> None:
    import json

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(name, json.dumps(data).encode())


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.binary(max_size=200))
@settings(max_examples=30, deadline=None, derandomize=not NEW, suppress_health_check=list(HealthCheck))
def test_any_bytes(name: str, data: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(name, data)
