"""Options are records: unknown ones are named, defaults are theirs, and the command line says the same."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import click
import pytest
import torch
from command_line import call, refused, runner
from networks import images, net

import sharefold
from sharefold.demo.results import DemoOptions
from sharefold.errors import SharefoldError
from sharefold.options import CalibrationOptions, ConvertOptions, PlanOptions, RefineOptions, chosen
from sharefold.repair.refine import refine
from sharefold.sweep import SweepOptions, sweep
from sharefold_cli.main import cli
from sharefold_cli.record_options import record_of, record_options

RECORDS = (CalibrationOptions, PlanOptions, ConvertOptions, RefineOptions, SweepOptions, DemoOptions)
ASKED = (PlanOptions, ConvertOptions)


def offered(record: type) -> list[dataclasses.Field]:
    return [spec for spec in dataclasses.fields(record) if "help" in spec.metadata]


@pytest.mark.parametrize("record", RECORDS)
def test_records_are_frozen_and_need_nothing(record: type) -> None:
    made = record()
    for spec in dataclasses.fields(record):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, spec.name, None)


def test_options_of_another_verb_are_refused() -> None:
    with pytest.raises(TypeError, match="options must be PlanOptions, not ConvertOptions"):
        sharefold.plan(net(), "50%", images(8), ConvertOptions())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="options must be PlanOptions, not dict"):
        chosen({"seed": 1}, {}, PlanOptions)  # type: ignore[type-var]
    with pytest.raises(SharefoldError, match="round_channels=0: must be 1 or more"):
        sharefold.plan(net(), "50%", images(8), round_channels=0)


def test_overrides_replace_single_fields() -> None:
    given = PlanOptions(method="svd", exclude="fc")
    found = chosen(given, {"exclude": "stem"}, PlanOptions)
    assert found == PlanOptions(method="svd", exclude="stem") and given.exclude == "fc"
    assert chosen(None, {"pivots": False}, PlanOptions) == PlanOptions(pivots=False)
    assert chosen(None, {}, PlanOptions) == PlanOptions() and chosen(given, {}, PlanOptions) == given


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("metod", "unexpected keyword 'metod': did you mean method?"),
        ("pivot", "unexpected keyword 'pivot': did you mean pivots?"),
        ("zzz", "unexpected keyword 'zzz': known are method, exclude, objective, pivots, round_channels, seed, outputs"),
    ],
)
def test_unknown_keywords_name_the_nearest(name: str, words: str) -> None:
    with pytest.raises(TypeError, match=re.escape(words)):
        chosen(None, {name: 1}, PlanOptions)


def test_every_verb_refuses_unknown_keywords_before_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = net(), images(8)
    cal = sharefold.calibrate(model, given)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("work has begun")

    for place in ("sharefold.calibration.calibrate.analyze", "sharefold.planner.decide.Planner", "sharefold.convert.carry_out"):
        monkeypatch.setattr(place, never)
    verbs: list[tuple[str, Any]] = [
        ("sed", lambda **extra: sharefold.calibrate(model, given, **extra)),
        ("objectiv", lambda **extra: sharefold.plan(model, "50%", given, **extra)),
        ("repairs", lambda **extra: sharefold.convert_(model, sharefold.Plan([], 0, 0), given, **extra)),
        ("epoch", lambda **extra: refine(model, cal, **extra)),
        ("kept", lambda **extra: sweep(cal, ["50%"], lambda network: {}, **extra)),
    ]
    for name, verb in verbs:
        with pytest.raises(TypeError, match=f"unexpected keyword '{name}': did you mean"):
            verb(**{name: 1})


def test_a_record_and_its_keywords_give_the_same_plan() -> None:
    model = net()
    cal = sharefold.calibrate(model, images(8))
    by_record = sharefold.plan(model, "60%", cal, PlanOptions(method="svd", exclude="^stem"))
    assert by_record == sharefold.plan(model, "60%", cal, method="svd", exclude="^stem")
    assert by_record == sharefold.plan(model, "60%", cal, PlanOptions(method="svd"), exclude="^stem")
    assert by_record != sharefold.plan(model, "60%", cal, method="svd") and {g.method for g in by_record.groups} == {"svd"}


# The command line ------------------------------------------------------------------------------------------------------


# Options of the command line that several records share, written once by hand.
BY_HAND = ("seed", "outputs")


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("verb", ["convert", "sweep"])
@pytest.mark.parametrize("record", ASKED)
def test_every_field_with_a_text_is_an_option_of_the_verb(verb: str, record: type) -> None:
    text = flat(runner().invoke(cli, [verb, "--help"], terminal_width=200).output)
    parameters = {p.name: p for p in cli.get_command(click.Context(cli), verb).params}  # type: ignore[union-attr]
    specs = offered(record)
    assert specs
    for spec in specs:
        flag = f"--{spec.name.replace('_', '-')}"
        assert flag in text and flat(spec.metadata["help"]) in text, spec.name
        assert parameters[spec.name].default is None, "the default is the record's"
        if isinstance(spec.default, bool):
            assert f"{flag} / --no-{flag[2:]}" in text and f"[default: {'on' if spec.default else 'off'}]" in text
        elif spec.default is not None:
            assert f"[default: {spec.default}]" in text
        if spec.metadata["metavar"]:
            assert f"{flag} {spec.metadata['metavar']}" in text.replace("[", "").replace("]", "")
    hidden = [spec.name for spec in dataclasses.fields(record) if spec not in specs and spec.name not in BY_HAND]
    assert not [name for name in hidden if f"--{name} " in text]


def asked(*arguments: str) -> tuple[PlanOptions, ConvertOptions, dict[str, Any]]:
    """The records that a command with the options of both is given."""
    seen: list[dict[str, Any]] = []

    @click.command()
    @record_options(PlanOptions)
    @record_options(ConvertOptions)
    @click.option("--more")
    def command(**given: Any) -> None:
        seen.append(given)

    result = runner().invoke(command, list(arguments))
    assert result.exit_code == 0, result.output
    (given,) = seen
    return record_of(PlanOptions, given), record_of(ConvertOptions, given), given


def test_what_is_not_given_is_the_records_default() -> None:
    assert asked() == (PlanOptions(), ConvertOptions(), {"more": None})


@pytest.mark.parametrize(
    ("arguments", "plan", "convert"),
    [
        (["--method", "basis"], PlanOptions(method="basis"), ConvertOptions()),
        (["--method", "basis, svd"], PlanOptions(method=("basis", "svd")), ConvertOptions()),
        (["--no-pivots", "--exclude", "^fc"], PlanOptions(pivots=False, exclude="^fc"), ConvertOptions()),
        (["--pivots", "--objective", "joint"], PlanOptions(objective="joint"), ConvertOptions()),
        (["--no-repair", "--refine", "4m"], PlanOptions(), ConvertOptions(repair=False, refine="4m")),
        (["--refine", "--more", "x"], PlanOptions(), ConvertOptions(refine="auto")),
    ],
)
def test_options_become_records(arguments: list[str], plan: PlanOptions, convert: ConvertOptions) -> None:
    found_plan, found_convert, rest = asked(*arguments)
    assert (found_plan, found_convert) == (plan, convert) and rest.keys() == {"more"}


@pytest.mark.parametrize("name", ["reuse", "filter-bases", "grouped"])
def test_steps_of_recipes_are_not_offered_as_methods(name: str, tmp_path: Any) -> None:
    from sharefold.methods import RECIPE_STEPS

    assert name in RECIPE_STEPS
    result = call("convert", "timm:digits_resnet", "--method", name, "-o", tmp_path / "out")
    refused(result, f"method {name!r} is a step of a published system, not one to choose: take its recipe (--recipe)")
    assert not (tmp_path / "out").exists()
    with pytest.raises(sharefold.SharefoldError, match="--recipe"):
        sharefold.plan(net(), "50%", torch.randn(4, 3, 12, 12), method=name)
