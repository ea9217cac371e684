"""Records of steps as files hold them: what is written comes back, and what anybody may have written is checked."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from sharefold.errors import SharefoldError
from sharefold.repair.step_record import NOT_FINITE, StepRecord, measured_on, steps_from


def test_what_is_written_comes_back_without_details() -> None:
    record = StepRecord("refit", True, "", 0.123456789, 2.5e-7, 3.0, {"layers": 4}, 300)
    assert record.compact() == {"name": "refit", "kept": True, "kl_before": 0.123457, "kl_after": 2.5e-7, "images": 300}
    (again,) = steps_from(json.loads(json.dumps([record.compact()])), "file")
    assert again == StepRecord("refit", True, "", 0.123457, 2.5e-7, images=300)
    idle = StepRecord("norms", False, "there are none")
    assert steps_from([idle.compact()], "file") == (idle,) and idle.outcome == "not run" and idle.numbers == ("", "")
    assert steps_from(None, "file") == ()


@pytest.mark.parametrize("after", [math.nan, math.inf])
def test_what_is_not_finite_is_told_in_words(after: float) -> None:
    compact = StepRecord("refine", False, "", 0.5, after, images=8).compact()
    assert compact == {"name": "refine", "kept": False, "reason": NOT_FINITE, "kl_before": 0.5, "images": 8}
    assert steps_from([compact], "file")[0].outcome == "undone"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "steps in its configuration must be a list of objects, not 3"),
        ([1], "steps in its configuration must be a list of objects, not 1"),
        ([{"kept": True}], "name of a step in its configuration must be a text, not None"),
        ([{"name": "a", "kept": 1}], "kept of step a in its configuration must be true or false, not 1"),
        ([{"name": "a\x1b", "kept": 1}], r"kept of step a.x1b in"),
        ([{"name": "a", "kept": True, "reason": []}], "reason of step a in its configuration must be a text"),
        ([{"name": "a", "kept": True, "images": -1}], "images of step a in its configuration must be a whole number from 0 on"),
        ([{"name": "a", "kept": True, "images": True}], "images of step a in its configuration must be a whole number"),
        ([{"name": "a", "kept": True, "kl_after": math.nan}], "kl_after of step a in its configuration must be a finite number"),
        ([{"name": "a", "kept": True, "kl_before": "0"}], "kl_before of step a in its configuration must be a finite number"),
    ],
)
def test_other_types_are_refused(data: Any, message: str) -> None:
    with pytest.raises(SharefoldError, match=rf"^net: {message}") as caught:
        steps_from(data, "net")
    assert "\n" not in str(caught.value)


def test_the_sentence_says_on_which_images() -> None:
    assert measured_on([StepRecord("a", False, "none")]) == ""
    told = measured_on([StepRecord("a", True, "", 1.0, 0.5, images=1300), StepRecord("b", False)])
    assert told.startswith("Divergence from the original on 1,300 decide images, their views included where they have any.")
