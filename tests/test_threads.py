"""Threads change sums in their last digits: the same plan, logits within 1e-4; and threads that wait do not spin."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

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
    dense, found = net(blocks=2), {}
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        model = copy.deepcopy(dense)
        cal = sharefold.calibrate(model, images())
        plan = sharefold.plan(model, "60%", cal, method="basis")
        sharefold.convert_(model, plan, cal)
        groups = [{k: v for k, v in group.items() if k != "error"} for group in plan.to_dict()["groups"]]
        found[count] = json.dumps(groups), [group.error for group in plan.groups], logits(model)
    for count in (2, 4):
        assert found[count][0] == found[1][0]
        assert found[count][1] == pytest.approx(found[1][1], rel=1e-3, abs=1e-6)
        torch.testing.assert_close(found[count][2], found[1][2], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("told", "expected"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(told: dict[str, str], expected: str) -> None:
    """Set before torch is imported: OpenMP reads it once."""
    code = (
        "import sys, os, sharefold_cli.common; assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", code], env={**environment, **told}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
