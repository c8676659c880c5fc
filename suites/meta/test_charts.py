"""Charts: texts that stay texts, colours that are the page's, ids of their own, and numbers that no axis has a place for."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from reports.charts import Series, lines, matrix, placed, shares
from suites.meta.test_reports import HOSTILE


def texts(svg):
    return ["".join(element.itertext()).strip() for element in ElementTree.fromstring(svg).findall(".//{*}text")]


def ids(svg):
    return [element.get("id") for element in ElementTree.fromstring(svg).iter() if element.get("id")]


@pytest.fixture(scope="module")
def curve():
    series = [Series("optimized", ((0, 5.0), (1, 4.0), (2, 3.0))), Series("reference", ((0, 5.0), (2, 3.1)))]
    return lines(series, "step", "nats", limit=3.0)


def test_a_curve_is_drawn_in_the_colours_of_the_page(curve):
    assert "var(--series-1)" in curve
    assert "var(--series-2)" in curve
    assert "var(--bad)" in curve
    assert "currentColor" in curve
    # A colour of its own would be dark on dark in one of the two schemes.
    assert re.findall(r"#[0-9a-f]{6}\b", curve) == []
    assert "<style" not in curve


def test_texts_can_be_read_and_searched_for(curve):
    assert {"optimized", "reference", "step", "nats"} <= set(texts(curve))
    assert "font-family" not in curve
    sizes = {float(size) for size in re.findall(r"font-size: ([\d.]+)px", curve)}
    # In points: twelve pixels.
    assert min(sizes) >= 9


def test_a_chart_fits_a_telephone(curve):
    width = float(re.search(r'width="([\d.]+)pt"', curve)[1])
    assert width * 4 / 3 <= 390 - 32


def test_two_charts_of_a_page_share_no_id_and_every_reference_is_met(curve):
    first, second = placed(curve, "c1", "one"), placed(curve, "c2", "two")
    assert ids(first)
    assert not set(ids(first)) & set(ids(second))
    for svg in (first, second):
        used = re.findall(r"url\(#([^)]+)\)", svg) + re.findall(r'href="#([^"]+)"', svg)
        assert used
        assert set(used) <= set(ids(svg))
        assert len(ids(svg)) == len(set(ids(svg)))


def test_a_chart_is_a_picture_with_a_description(curve):
    root = ElementTree.fromstring(placed(curve, "c1", f"falls {HOSTILE}"))
    assert root.get("role") == "img"
    assert root.get("aria-label").startswith("falls ")
    assert "\x1b" not in root.get("aria-label")


def test_the_same_numbers_give_the_same_bytes():
    series = [Series("a", ((1, 2.0), (2, 4.0), (4, 9.0)))]
    assert lines(series, "tokens", "s", log=True) == lines(series, "tokens", "s", log=True)


@pytest.mark.parametrize("log", [False, True])
def test_what_is_not_finite_leaves_a_gap(log):
    series = [Series("a", ((1, 1.0), (2, math.nan), (4, math.inf), (8, 2.0))), Series("empty", ())]
    assert "nan" not in lines(series, "x", "y", log=log).lower().replace("nance", "")


def test_hostile_names_are_inert():
    for svg in (
        lines([Series(HOSTILE, ((0, 1.0), (1, 2.0)))], HOSTILE, HOSTILE),
        shares([HOSTILE, "$x^2$ $"], [(HOSTILE, [0.5, None])], "share"),
        matrix([HOSTILE], [HOSTILE], [(0, 0)]),
    ):
        assert "<script" not in svg
        assert "\x1b" not in svg
        assert "\u202e" not in svg
        svg.encode("utf-8")
        ElementTree.fromstring(svg)
    # A dollar sign starts no formula.
    assert "$x^2$ $" in texts(shares(["$x^2$ $"], [("a", [0.5])], "share"))


def test_shares_without_a_place_on_a_log_scale_stand_at_its_ends():
    svg = shares(
        ["zero", "all of it", "beyond", "nan", "not measured"], [("fp32", [0.0, 1.0, math.inf, math.nan, None])], "x"
    )
    assert texts(svg).count("zero") == 1
    assert "≤0.1%" in texts(svg)
    assert "1000%" in texts(svg)
    # Four markers in the picture and one in the legend.
    series = re.findall(r'<use [^>]*style="fill: var\(--series-1\)[^>]*>', svg)
    assert len(series) == 5


def test_a_large_matrix_is_small_and_quick_to_draw():
    rows, columns = [f"mutant-{row}" for row in range(200)], [f"{column} check" for column in range(80)]
    marks = [(row, (row * step) % 80) for row in range(200) for step in range(20)]
    svg = matrix(rows, columns, marks)
    assert len(svg) < 350_000
    assert {"mutant-0", "mutant-199", "79 check"} <= set(texts(svg))
    assert svg.count("<path") < 20


def test_a_matrix_without_marks_can_be_drawn():
    assert "mutant" in texts(matrix(["mutant"], ["check"], []))
