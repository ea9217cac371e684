"""Budgets as users write them."""

from __future__ import annotations

import pytest

from sharefold.budget import parse_budget, parse_combined
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


@pytest.mark.parametrize(
    ("text", "units", "values", "said"),
    [
        ("50%, 70% MACs", ["parameters", "macs"], [0.5, 0.7], "50%, 70% MACs"),
        ("50%,5ms", ["parameters", "seconds"], [0.5, 0.005], "50%, 5ms"),
        (" 2MB , 70% MACs ", ["bytes", "macs"], [2e6, 0.7], "2MB, 70% MACs"),
        ("80% latency, 40k params", ["seconds", "parameters"], [0.8, 4e4], "80% latency, 40k params"),
        ("2,100,000, 40M MACs, 4ms", ["parameters", "macs", "seconds"], [2.1e6, 4e7, 0.004], "2,100,000, 40M MACs, 4ms"),
        ("50%,250k MACs", ["parameters", "macs"], [0.5, 2.5e5], "50%, 250k MACs"),
        ("1,234,567", ["parameters"], [1234567], "1,234,567"),
        (0.5, ["parameters"], [0.5], "0.5"),
    ],
)
def test_budgets_that_hold_together(text, units, values, said):
    budgets = parse_combined(text)
    assert list(budgets.units) == units and budgets.text == said
    assert [part.value for part in budgets.parts] == pytest.approx(values)
    assert parse_combined(budgets) is budgets and parse_combined(budgets.parts[0]).parts == budgets.parts[:1]
    assert parse_combined(budgets.text) == budgets


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("50%, 2M", "bounds the parameters twice, by 50% and by 2M"),
        ("4ms, 50%, 80% latency", "bounds the time twice, by 4ms and by 80% latency"),
        ("1,5M", "bounds the parameters twice"),
        ("50%,", "has an empty part"),
        (", 50%", "has an empty part"),
        ("50%,, 4ms", "has an empty part"),
        ("50%, lots", "budget 'lots' is not understood"),
        ("50%, 120% MACs", "more than the whole model"),
    ],
)
def test_budgets_that_do_not(text, words):
    with pytest.raises(SharefoldError, match=words) as caught:
        parse_combined(text)
    assert "\n" not in str(caught.value)
