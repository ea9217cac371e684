"""Numbers of parameters are counted, whatever a plan says of itself."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import call, reported
from networks import images, net

import sharefold
from sharefold.errors import SharefoldError
from sharefold.measure import count_parameters
from sharefold.methods.sizes import EDITED, checked_and_counted
from sharefold.plans import GroupPlan, Plan

IMAGES = images(24)
METHODS = ("auto", "basis", "hybrid", "svd", "spatial", "tucker", "cluster", "average", "fold", ("fold", "svd"))


def edited(plan: Plan, rank: int) -> Plan:
    first, *rest = plan.groups
    return replace(plan, groups=[replace(first, options={"rank": rank}), *rest])


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_plan_as_the_planner_made_it_is_found_to_be_true(method: str | Sequence[str]) -> None:
    model = net()
    plan = sharefold.plan(model, "60%", IMAGES, method=method)
    assert plan.groups and checked_and_counted(model, sharefold.analyze(model, IMAGES[:1]), plan) == plan


@pytest.mark.parametrize("pivots", [True, False])
def test_an_edited_plan_is_counted_before_and_after(pivots: bool) -> None:
    model = net()
    graph = sharefold.analyze(model, IMAGES[:1])
    plan = sharefold.plan(model, "50%", IMAGES, method="basis", pivots=pivots)
    changed = edited(plan, 3)
    counted = checked_and_counted(model, graph, changed)
    assert counted.source == f"{plan.source}, {EDITED}" == checked_and_counted(model, graph, counted).source
    done = sharefold.convert_(copy.deepcopy(model), changed, IMAGES, repair=False).plan
    sizes = [[(group.params_before, group.params_after) for group in one.groups] for one in (counted, done, plan)]
    assert sizes[0] == sizes[1] != sizes[2]
    assert counted.params_after == done.params_after != plan.params_after


def test_a_plan_by_hand_has_sizes_once_it_is_carried_out() -> None:
    model = net()
    before = count_parameters(model)
    members = tuple(f"stage2.{i}.conv{j}" for i in range(3) for j in (1, 2))
    plan = Plan([GroupPlan("mine", "basis", members, {"rank": 9})], 0, 0)
    assert checked_and_counted(model, sharefold.analyze(model, IMAGES[:1]), plan).source == EDITED
    done = sharefold.convert_(model, plan, IMAGES, repair=False).plan
    group = done.groups[0]
    assert done.params_before == before and done.params_after == count_parameters(model) < before
    assert before - done.params_after == group.params_before - group.params_after > 0


def test_what_exclude_protects_is_in_no_group() -> None:
    model = net()
    plan = sharefold.plan(model, "60%", IMAGES, method="basis")
    with pytest.raises(SharefoldError, match="which exclude 'stage' protects: take it out of one of them"):
        sharefold.convert_(model, replace(plan, exclude="stage"), IMAGES)


def test_a_method_that_writes_into_norms_refuses_those_that_exclude_protects() -> None:
    model = net()
    members = ("stage1.0.conv1", "stage1.0.conv2")
    plan = Plan([GroupPlan("g", "tied-kernels", members)], 0, 0, exclude="bn1")
    with pytest.raises(SharefoldError, match="tied-kernels writes into 'stage1.0.bn1', the norm behind 'stage1.0.conv1'"):
        sharefold.convert_(model, plan, IMAGES)
    sharefold.convert_(model, replace(plan, exclude="^fc"), IMAGES)


def test_the_command_line_counts_a_plan_that_was_edited(tmp_path: Path) -> None:
    start = ("convert", "timm:digits_resnet:blocks=2,width=16", "--no-pretrained", "--calib", "digits", "--calib-count", 30)
    told = reported(*start, "--method", "basis", "--budget", "50%", "--dry-run")
    assert list(told).index("plan") < list(told).index("groups")  # what counts is met first
    told["plan"]["groups"][0]["options"]["rank"] = 2
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(told))
    before = told["plan"]["groups"][0]["params_after"]
    seen = reported(*start, "--plan", file, "--dry-run")
    done = reported(*start, "--plan", file, "--no-repair", "-o", tmp_path / "out")
    assert seen["groups"][0]["params_after"] == done["groups"][0]["params_after"] < before
    assert seen["params"] == done["params"] and seen["plan"]["source"].endswith(EDITED)
    assert EDITED in (tmp_path / "out" / "README.md").read_text()
    told["plan"]["groups"][0]["members"][0] = "lost"
    file.write_text(json.dumps(told))
    wrong = call(*start, "--plan", file, "--dry-run")
    assert wrong.exit_code == 2 and "which this model does not have" in wrong.stderr
