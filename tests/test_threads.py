"""The number of threads changes sums in their last digits, which repairs pass on: the same plan, logits within 1e-3."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from networks import images, logits, net

import sharefold


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_plan_and_logits_are_those_of_one_thread() -> None:
    dense, found = net(), {}
    for count in (1, 2):
        torch.set_num_threads(count)
        model = copy.deepcopy(dense)
        cal = sharefold.calibrate(model, images())
        plan = sharefold.plan(model, "60%", cal, method="basis")
        sharefold.convert_(model, plan, cal)
        groups = [{k: v for k, v in group.items() if k != "error"} for group in plan.to_dict()["groups"]]
        found[count] = json.dumps(groups), [group.error for group in plan.groups], logits(model)
    for count in (2,):
        assert found[count][0] == found[1][0]
        assert found[count][1] == pytest.approx(found[1][1], rel=1e-3, abs=1e-6)
        torch.testing.assert_close(found[count][2], found[1][2], rtol=0, atol=1e-3)
