"""Budgets as users write them."""

from __future__ import annotations

import pytest

from sharefold.budget import parse_budget
from sharefold.errors import SharefoldError


@pytest.mark.parametrize(
    "text, value, unit, share",
    [
        ("50%", 0.5, "parameters", True),
        (0.5, 0.5, "parameters", True),
        (94400, 94400, "parameters", False),
        ("2.1M", 2.1e6, "parameters", False),
        ("2.1M parameters", 2.1e6, "parameters", False),
        ("400k params", 4e5, "parameters", False),
        ("8MB", 8e6, "bytes", False),
        ("8 MiB", 8 * 2**20, "bytes", False),
        ("50% MACs", 0.5, "macs", True),
        ("40M MACs", 4e7, "macs", False),
        ("4.1GMACs", 4.1e9, "macs", False),
        ("4ms", 0.004, "seconds", False),
        ("250 us", 0.00025, "seconds", False),
        ("1.5s latency", 1.5, "seconds", False),
        ("60% latency", 0.6, "seconds", True),
    ],
)
def test_what_is_read(text, value, unit, share):
    budget = parse_budget(text)
    assert (budget.value, budget.unit, budget.share) == (pytest.approx(value), unit, share)
    assert budget.text == str(text) and parse_budget(budget) is budget


@pytest.mark.parametrize(
    "text",
    [
        "lots", "-3", "0", "150%", "5 lightyears", "8MB MACs", "4ms MACs", "5 latency", "4M latency", "50% bytes", "", "1e400",
        "1e300GB",
    ],
)
def test_what_is_not(text):
    with pytest.raises(SharefoldError, match="budget .*write a share"):
        parse_budget(text)


def test_limits():
    assert parse_budget("50%").limit(101) == 50 and parse_budget("2k").limit(101) == 2000
    assert parse_budget("50% latency").limit(0.003) == pytest.approx(0.0015)
