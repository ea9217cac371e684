"""Plans as JSON and as a table."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sharefold
from sharefold.errors import SharefoldError
from sharefold.plans import PLAN_VERSION, GroupPlan, Plan

names = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
counts = st.integers(0, 10**12)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    titles = draw(st.lists(names, max_size=4, unique=True))
    members = iter(draw(st.lists(names, min_size=3 * len(titles), max_size=3 * len(titles), unique=True)))
    groups = [
        GroupPlan(
            title, draw(names), tuple(next(members) for _ in range(draw(st.integers(1, 3)))),
            draw(st.dictionaries(names, values, max_size=3)), draw(counts), draw(counts),
            draw(st.none() | st.floats(0, 10)), draw(st.integers(0, 9)), draw(st.text(max_size=8)),
        )
        for title in titles
    ]  # fmt: skip
    stores = st.sampled_from(["", "int8", "mixed:0.2MB"])
    return Plan(groups, draw(counts), draw(counts), draw(st.text(max_size=20)), draw(stores))


@given(plans())
def test_json_round_trip(plan: Plan) -> None:
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.to_json() == plan.to_json()
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert Plan.from_dict({"plan": plan.to_dict(), "groups": []}) == plan


@given(plans())
def test_table_says_every_group_the_totals_and_the_store(plan: Plan) -> None:
    text = str(plan)
    assert f"{plan.params_before:,} -> {plan.params_after:,} parameters" in text
    assert not plan.store or text.endswith(f"stored as {plan.store}")
    for group in plan.groups:
        assert group.name in text and f"{group.params_before:,} -> {group.params_after:,}" in text


def test_a_plan_from_the_planner_survives_json_and_is_carried_out_the_same() -> None:
    from networks import images, logits, net

    model, twin = net(blocks=2), net(blocks=2)
    plan = sharefold.plan(model, budget="50%", calibration=images())
    done = sharefold.convert_(model, plan, calibration=images())
    sharefold.convert_(twin, Plan.from_json(plan.to_json()), calibration=images())
    assert logits(model).equal(logits(twin))
    assert Plan.from_json(done.plan.to_json()) == done.plan


def test_size_is_the_share_kept() -> None:
    assert Plan([], 200, 50).size == 0.25 and Plan([], 0, 0).size == 0


def group(**changes: Any) -> dict[str, Any]:
    return {"name": "g", "method": "basis", "members": ["a", "b"], "options": {"rank": 2}, **changes}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "no list of groups"),
        ('{"groups": {}}', "no list of groups"),
        (json.dumps({"groups": [], "plan_version": PLAN_VERSION + 1}), "upgrade sharefold"),
        (json.dumps({"groups": [{"name": "g"}]}), "lacks name, method or members"),
        (json.dumps({"groups": [3]}), "lacks name, method or members"),
        (json.dumps({"groups": [group(extra=1)]}), r"unknown keys \['extra'\]"),
        (json.dumps({"groups": [group(members=[])]}), "needs a list of layer names"),
        (json.dumps({"groups": [group(members="ab")]}), "needs a list of layer names"),
        (json.dumps({"groups": [group(members=[1])]}), "needs a list of layer names"),
        (json.dumps({"groups": [group(options=[])]}), "must be an object"),
        (json.dumps({"groups": [group(), group(members=["c"])]}), "two groups are named 'g'"),
        (json.dumps({"groups": [group(), group(name="h", members=["b", "c"])]}), "layer 'b' is in groups 'g' and 'h'"),
    ],
)
def test_what_is_no_plan_is_refused_in_one_line(text: str, words: str) -> None:
    with pytest.raises(SharefoldError, match=words) as caught:
        Plan.from_json(text, where="plan.json")
    assert str(caught.value).startswith("plan.json") and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["plan_version", "params_before", "params_after"])
@pytest.mark.parametrize("value", ["many", None, [1], {}])
def test_totals_of_a_wrong_kind_are_refused(key: str, value: Any) -> None:
    with pytest.raises(SharefoldError):
        Plan.from_dict({"groups": [], key: value})


def test_a_store_of_a_wrong_kind_is_refused() -> None:
    with pytest.raises(SharefoldError, match="store must be a text"):
        Plan.from_dict({"groups": [], "store": 8})


@pytest.mark.parametrize("changes", [{"name": 3}, {"method": None}, {"params_after": "few"}, {"stage": []}])
def test_group_entries_of_a_wrong_kind_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SharefoldError):
        Plan.from_dict({"groups": [group(**changes)]})
