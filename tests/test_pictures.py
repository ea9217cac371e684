"""The pictures of README and CONTRIBUTING are those that the script draws now."""

from __future__ import annotations

import pytest
from doc_blocks import ROOT
from script_loader import load_script
from test_floors import FLOORS

pictures = load_script("scripts/draw_pictures.py")


@pytest.mark.parametrize("name", sorted(pictures.PICTURES))
def test_committed_pictures_are_up_to_date(name: str) -> None:
    committed = (ROOT / "docs" / "pictures" / name).read_text()
    assert committed == pictures.PICTURES[name](), "run python scripts/draw_pictures.py"


def test_every_name_of_every_floor_is_drawn() -> None:
    assert pictures.floors() == FLOORS
    drawn = pictures.house()
    assert [name for names in FLOORS for name in names if f">{name}</text>" not in drawn] == []


def test_the_picture_counts_as_the_method_does() -> None:
    from torch import nn

    from sharefold.layers import ConvForm, form_of
    from sharefold.methods import METHODS

    form: ConvForm | None = form_of(nn.Conv2d(pictures.CHANNELS, pictures.CHANNELS, pictures.SIDE, bias=False))
    assert form is not None
    forms = [form] * pictures.LAYERS
    dense, bank, own = pictures.sizes()
    assert dense == pictures.LAYERS * pictures.CHANNELS * form.features
    assert METHODS["hybrid"].cost(forms, {"rank": pictures.SHARED, "own": pictures.OWN}) == bank + pictures.LAYERS * own
