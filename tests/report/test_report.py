"""The page says what the plan says, is one safe document, and looks like something in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sharefold
from sharefold.errors import SharefoldError
from sharefold.graph import analyze, find_groups
from sharefold.plans import GroupPlan, Plan
from sharefold.repair.step_record import StepRecord
from sharefold.report import Facts, facts_of, page, spectrum
from sharefold.report.facts import COLOURS, POINTS
from sharefold.report.plots import write_curve, write_plots
from sharefold.report.svg import curve_chart

METRICS = {
    "params": {"before": 269_722, "after": 120_000}, "bytes": {"before": 1_100_000, "after": 500_000},
    "macs": {"before": 41_000_000, "after": 41_000_000}, "agreement": 0.9312,
    "top1_before": 0.9234, "top1_after": 0.9123, "note": "<script>alert(1)</script>",
}  # fmt: skip


class Dom(HTMLParser):
    """Tags with attributes in order, the text of the page, and whether every element is closed."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.stack: list[str] = []
        self.texts: list[str] = []
        self.feed(document)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.stack or self.stack[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        pairs = {key.rstrip("_").replace("_", "-"): value for key, value in wanted.items()}
        return [attrs for name, attrs in self.tags if name == tag and pairs.items() <= attrs.items()]


@pytest.fixture(scope="module")
def facts() -> Facts:
    torch.manual_seed(0)
    model = sharefold.open_source("timm:resnet20_cifar", pretrained=False).model
    images = torch.zeros(1, 3, 32, 32)
    groups = []
    for rank, group in enumerate(find_groups(analyze(model, images)), 20):
        outputs, inputs, height, width = group.weight_shape
        before = len(group.members) * outputs * inputs * height * width
        after = rank * (inputs * height * width + len(group.members) * outputs)
        groups.append(
            GroupPlan(group.name, "basis", group.members, {"rank": rank}, before, after, rank / 1000, group.stage, "")
        )
    saved = sum(group.params_before - group.params_after for group in groups)
    plan = Plan(groups, 269_722, 269_722 - saved, "a test")
    return facts_of("resnet20 <shared>", plan, METRICS, model, images)


def test_the_map_has_every_layer_once_in_its_groups_colour(facts: Facts) -> None:
    dom = Dom(page(facts))
    cells = dom.all("g", class_="cell")
    assert [cell["data-layer"] for cell in cells] == [layer.name for layer in facts.layers] and len(cells) == 20
    owner = {member: group.name for group in facts.plan.groups for member in group.members}
    assert {cell["data-layer"]: cell["data-group"] for cell in cells if "data-group" in cell} == owner
    for group, colour in zip(facts.plan.groups, COLOURS, strict=False):
        assert facts.colour(group.name) == colour
    solid = Counter(
        attrs["fill"] for name, attrs in dom.tags if name == "rect" and attrs.get("rx") == "2" and "y" in attrs
        and "fill" in attrs and "fill-opacity" not in attrs
    )  # fmt: skip
    assert solid == Counter(facts.colour(group) for group in owner.values())


def test_the_map_stays_inside_its_frame_without_overlaps(facts: Facts) -> None:
    document = page(facts)
    svg = re.search(r'<svg class="map" viewBox="0 0 (\d+) (\d+)".*?</svg>', document, re.S)
    assert svg is not None
    box = r'<rect(?: class="plain")? x="([\d.]+)" width="([\d.]+)" rx="2" y="([\d.]+)" height="([\d.]+)"'
    rows: dict[float, list[tuple[float, float]]] = {}
    for left, width, top, height in (map(float, found) for found in re.findall(box, svg[0])):
        assert left + width <= float(svg[1]) and top + height <= float(svg[2])
        if height == 30:  # the whole cell; the solid part of it lies inside
            rows.setdefault(top, []).append((left, width))
    assert sum(len(row) for row in rows.values()) == 20 and len(rows) == 3
    for row in rows.values():
        row.sort()
        for (left, width), (following, _) in pairwise(row):
            assert left + width <= following


def test_the_table_says_what_the_plan_says(facts: Facts) -> None:
    dom = Dom(page(facts))
    rows = [attrs["data-group"] for attrs in dom.all("tr") if "data-group" in attrs]
    by_saving = sorted(facts.plan.groups, key=lambda group: group.params_after - group.params_before)
    assert rows == [group.name for group in by_saving]
    for group in facts.plan.groups:
        assert f"{group.params_before:,} \u2192 {group.params_after:,}" in dom.text
        assert f"{group.params_before - group.params_after:,}" in dom.text and f"{group.error:.4f}" in dom.text
        assert f"rank {group.options['rank']}" in dom.text
        assert all(member in dom.text for member in group.members)
    for words in ("91.23%", "from 92.34%", "93.12%", f"{facts.plan.params_after:,}", "from 269,722", "0.50", "41.0"):
        assert words in dom.text


def test_the_page_is_one_document_that_asks_nobody_for_anything(facts: Facts) -> None:
    document = page(facts)
    dom = Dom(document)
    assert document.startswith("<!DOCTYPE html>") and not dom.stack, "every element is closed"
    assert not [tag for tag, _ in dom.tags if tag in ("script", "link", "img", "iframe", "object", "image", "use")]
    assert not re.search(r"https?://|//cdn|url\(|@import|src=", document)
    policy = dom.all("meta", http_equiv="Content-Security-Policy")[0]["content"]
    assert "default-src 'none'" in policy
    assert "prefers-color-scheme: dark" in document and dom.all("html", lang="en")
    assert all(attrs.get("aria-label") for attrs in dom.all("svg"))


def test_everything_foreign_is_escaped(facts: Facts) -> None:
    evil = '"><script>alert(1)</script><b x=\'y'
    group = GroupPlan(evil, evil, (evil,), {evil: evil}, 10, 5, 0.1, 0, evil)
    bare = Dom(page(Facts(evil, Plan([group], 10, 5, evil), {evil: evil, "n": {evil: 1}})))
    assert not bare.all("script") and not bare.all("b") and evil in " ".join(bare.texts)
    assert bare.all("tr", data_group=evil) and not bare.all("svg", class_="map")
    dom = Dom(page(facts))
    assert "<script>alert(1)</script>" in dom.text and not dom.all("script")


def test_steps_are_a_table_with_the_images_behind_it() -> None:
    evil = "<script>alert(1)</script>"
    steps = (StepRecord("refit", True, "", 0.5, 0.25, images=300), StepRecord(evil, False, evil))
    dom = Dom(page(Facts("net", Plan([], 10, 5), steps=steps)))
    assert dom.all("section", id="steps") and not dom.all("script")
    told = " ".join(dom.texts)
    assert "refit kept 0.5 0.25" in told and f"{evil} not run {evil}" in told
    assert "on 300 decide images, their views included where they have any" in told
    assert not Dom(page(Facts("net", Plan([], 10, 5)))).all("section", id="steps")


def test_a_spectrum_by_hand() -> None:
    matrices = [torch.diag(torch.tensor([3.0, 0, 0, 0])), torch.diag(torch.tensor([0, 1.0, 0, 0]))]
    shares = spectrum(matrices)  # energies 9 and 1 over 4 columns
    assert len(shares) == POINTS and shares[0] == 0 and shares[-1] == pytest.approx(1)
    assert shares[16] == pytest.approx(0.9) and shares[32] == pytest.approx(1) and shares[8] == pytest.approx(0.45)
    assert all(a <= b + 1e-6 for a, b in pairwise(shares))


def test_spectra_match_a_singular_value_decomposition(facts: Facts) -> None:
    model_groups = {group.name: group for group in facts.plan.groups}
    assert set(facts.spectra) == set(model_groups)
    assert all(facts.ranks[name][0] == group.options["rank"] for name, group in model_groups.items())
    dom = Dom(page(facts))
    figures = [attrs["data-group"] for attrs in dom.all("figure")]
    assert figures == [group.name for group in facts.plan.groups]
    assert any(f"rank {facts.ranks[figures[0]][0]}" in text for text in dom.texts)
    matrices = [torch.randn(6, 8), torch.randn(6, 8)]
    values = torch.linalg.svdvals(torch.cat(matrices)).square()
    wanted = torch.cat([torch.zeros(1), values.cumsum(0) / values.sum()])
    assert spectrum(matrices)[:: (POINTS - 1) // 8] == pytest.approx(wanted.tolist(), abs=1e-5)


def test_column_and_row_filters_have_their_own_matrix() -> None:
    model = sharefold.open_source("timm:resnet20_cifar", pretrained=False).model
    layer = model.layer3[1].conv1
    with torch.no_grad():  # rank 2 between (out, column) and (in, row)
        layer.weight.copy_(torch.einsum("orb,ria->oiab", torch.randn(64, 2, 3), torch.randn(2, 64, 3)))
    plan = Plan([GroupPlan("g", "spatial", ("layer3.1.conv1",), {"rank": 2}, 36_864, 768)], 269_722, 233_626)
    facts = facts_of("net", plan, None, model, torch.zeros(1, 3, 32, 32))
    assert facts.ranks["g"] == (2, 192) and facts.spectra["g"][1] == pytest.approx(1, abs=1e-3)


def test_figures_are_drawn(facts: Facts, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = write_plots(facts, tmp_path / "figures")
    assert [file.name for file in files] == ["map.png", "groups.png", "spectra.png"]
    for file in files:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        for group in facts.plan.groups:
            assert near(pixels, facts.colour(group.name)) > 20, f"{file.name} does not show {group.name}"
    write_curve([(1e5, 0.6, "30%"), (2e5, 0.8, "60%")], 0.9, "top-1", tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as image:
        assert near(np.asarray(image.convert("RGB")).reshape(-1, 3), "#4269d0") > 200
    (tmp_path / "file").write_text("")
    with pytest.raises(SharefoldError, match="cannot be made"):
        write_plots(facts, tmp_path / "file" / "folder")


def test_the_curve_rises_with_accuracy() -> None:
    svg = curve_chart([(100_000, 0.5, "25%"), (200_000, 0.8, "50%")], 0.9, "parameters", "top-1")
    (ax, ay), (bx, by) = ((float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg))
    assert ax < bx and ay > by and bx - 70 == pytest.approx(2 * (ax - 70), rel=1e-2)
    assert "25%" in svg and "dense" in svg and svg.startswith("<svg") and "200k" not in svg.split("circle")[0][:10]


def near(pixels: np.ndarray, colour: str, distance: int = 24) -> int:
    """How many pixels are about this colour."""
    target = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(pixels.astype(int) - target).max(axis=1) <= distance).sum())


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.sweep
@pytest.mark.parametrize(("scheme", "background"), [(1, "#ffffff"), (0, "#14171c")])
def test_a_screenshot_shows_the_groups(facts: Facts, tmp_path: Path, scheme: int, background: str) -> None:
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome is installed")
    (tmp_path / "page.html").write_text(page(facts), encoding="utf-8")
    shot = tmp_path / "shot.png"
    subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,1500",
         f"--blink-settings=preferredColorScheme={scheme}", f"--user-data-dir={tmp_path / 'profile'}",
         f"--screenshot={shot}", (tmp_path / "page.html").as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    with Image.open(shot) as image:
        assert image.size == (1100, 1500)
        picture = np.asarray(image.convert("RGB"))
    pixels = picture.reshape(-1, 3)
    assert near(pixels, background, 4) > 0.5 * len(pixels), "the page has the scheme's background"
    for group in facts.plan.groups:
        assert near(pixels, facts.colour(group.name)) > 500, f"{group.name} is not to be seen"
    ink = "#1b1f24" if scheme else "#e7eaee"
    assert near(picture[40:110].reshape(-1, 3), ink, 40) > 300, "the title is readable"
    assert near(picture[:, -20:].reshape(-1, 3), background, 4) == picture[:, -20:].shape[0] * 20, "nothing runs out"
