from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharefold.architectures.arguments import close_matches, parse_options, parse_value
from sharefold.errors import SharefoldError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("14", 14),
        ("-3", -3),
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        (".25", 0.25),
        ("true", True),
        ("False", False),
        ("none", None),
        ("relu", "relu"),
        ("3x3", "3x3"),
        ("__import__('os')", "__import__('os')"),
    ],
)
def test_literals(text: str, value: object) -> None:
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


@given(st.dictionaries(st.from_regex(r"[a-z_]\w{0,8}", fullmatch=True), st.integers() | st.booleans(), max_size=5))
def test_round_trip(options: dict[str, int | bool]) -> None:
    text = ",".join(f"{key}={value}" for key, value in options.items())
    assert parse_options(text, "here") == options


@pytest.mark.parametrize("text", ["reuse", "=3", "reuse=", "a b=1", "1a=2", "a=1,a=2"])
def test_bad_options(text: str) -> None:
    with pytest.raises(SharefoldError, match=r"timm:lrunet"):
        parse_options(text, "timm:lrunet")


def test_close_matches() -> None:
    assert close_matches("ResNet5", ["resnet50", "vgg16"]) == "did you mean resnet50?"
    assert close_matches("zzz", ["resnet50"]) == ""
