"""Axes, plots and pages: everything is drawn where it belongs, and nothing is lost."""

import math
import re
from xml.etree import ElementTree

import pytest

from megalm.page.axis import Axis
from megalm.page.document import Caution, Dot, Facts, Fold, Heading, Table, render_page
from megalm.page.plots import FEW_POINTS, Band, Bars, Line, Lines, Mark, thin


def parsed(plot):
    return ElementTree.fromstring(plot.svg())


def texts(root):
    return [element.text for element in root.iter("text")]


@pytest.mark.parametrize(
    "low, high, logarithmic, expected",
    [
        (0.0, 10.0, False, [0, 2, 4, 6, 8, 10]),
        (-0.003, 0.0041, False, [-0.003, -0.002, -0.001, 0, 0.001, 0.002, 0.003, 0.004]),
        (1.0, 1000.0, True, [1, 3, 10, 30, 100, 300, 1000]),
        (1e6, 1e12, True, [1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12]),
        (0.9, 5.5, True, [1, 2, 5]),
        (2.1, 2.4, True, [2.1, 2.15, 2.2, 2.25, 2.3, 2.35, 2.4]),
    ],
)
def test_ticks_are_round_and_inside(low, high, logarithmic, expected):
    axis = Axis([low, high], logarithmic, 0.0, 100.0)
    assert axis.ticks() == pytest.approx(expected)
    assert all(0.0 <= axis(tick) <= 100.0 for tick in axis.ticks())


def test_many_decades_have_few_ticks():
    assert len(Axis([1e-30, 1e30], True, 0, 1).ticks(6)) <= 6


def test_one_value_has_a_place_in_the_middle():
    for value, logarithmic in ((0.0, False), (7.0, False), (7.0, True)):
        assert Axis([value], logarithmic, 0.0, 100.0)(value) == pytest.approx(50.0)


def test_a_line_is_drawn_through_its_points():
    root = parsed(Lines("loss", "step", "nats", [Line("a", [(0, 1.0), (10, 3.0)])], height=200))
    (line,) = root.iter("polyline")
    (x1, y1), (x2, y2) = (map(float, pair.split(",")) for pair in line.get("points").split())
    assert 64 < x1 < x2 < 708 and y1 > y2, "later is to the right, more is higher"
    names = texts(root)
    assert "step" in names and "nats" in names and "a" not in names, "one line needs no legend"


def test_what_has_no_place_is_left_out():
    points = [(1, 2.0), (2, math.nan), (3, 0.0), (4, math.inf), (5, -1.0), (6, 4.0)]
    root = parsed(Lines("t", "x", "y", [Line("a", points), Line("b", [])], log="y"))
    drawn = [len(line.get("points").split()) for line in root.iter("polyline")]
    assert drawn == [2, 0]
    assert "nothing was measured" in Lines("t", "x", "y", [Line("a", [(1, math.nan)])]).svg()


def test_marks_and_bands_stand_at_their_steps_and_in_the_legend_once():
    marks = [Mark(x, "spike", f"spike {x}", "#111111") for x in (5, 6, 99)]
    bands = [Band(2, 4, "taken back", "back to 2", "#222222"), Band(8, 50, "taken back", "on", "#222222")]
    root = parsed(Lines("t", "step", "y", [Line("a", [(0, 1.0), (10, 1.5)])], marks=marks, bands=bands))
    assert [name for name in texts(root) if name in ("spike", "taken back")] == ["spike", "taken back"]
    lines = [element for element in root.iter("line") if element.find("title") is not None]
    assert [line.find("title").text for line in lines] == ["spike 5", "spike 6"], "99 is outside"
    first, second = [element for element in root.iter("rect") if element.find("title") is not None]
    at = {line.find("title").text: float(line.get("x1")) for line in lines}
    step = at["spike 6"] - at["spike 5"]
    assert float(first.get("x")) == pytest.approx(at["spike 5"] - 3 * step, abs=0.2)
    assert float(first.get("width")) == pytest.approx(2 * step, abs=0.2)
    assert float(second.get("x")) + float(second.get("width")) == pytest.approx(708, abs=0.2), "cut at the edge"


def test_a_long_legend_takes_rows_and_lowers_the_plot():
    def plot(count):
        return parsed(
            Lines("t", "x", "y", [Line(f"a source of some length {i}", [(0, i), (1, i)]) for i in range(count)])
        )

    assert float(plot(12).get("viewBox").split()[3]) > float(plot(2).get("viewBox").split()[3])
    assert all(float(text.get("x")) < 708 for text in plot(12).iter("text"))


def test_thinning_keeps_every_spike():
    values = [(float(x), 1.0) for x in range(50_000)]
    values[31_234] = (31_234.0, 100.0)
    values[777] = (777.0, -5.0)
    kept = thin(values)
    assert len(kept) <= FEW_POINTS + 2 and (31_234.0, 100.0) in kept and (777.0, -5.0) in kept
    assert list(kept) == sorted(kept)


def test_bars_are_stacked_in_proportion():
    root = parsed(
        Bars("memory", "GiB", [("a", [("weights", 1.0), ("moments", 3.0)]), ("b", [("weights", 2.0)])], ("limit", 4.0))
    )
    bars = {rect.find("title").text: rect for rect in root.iter("rect")}
    widths = {name: float(rect.get("width")) for name, rect in bars.items()}
    assert widths["moments: 3 GiB"] == pytest.approx(3 * widths["weights: 1 GiB"], rel=0.01)
    assert widths["weights: 2 GiB"] == pytest.approx(2 * widths["weights: 1 GiB"], rel=0.01)
    begin = float(bars["moments: 3 GiB"].get("x"))
    assert begin == pytest.approx(190 + widths["weights: 1 GiB"], abs=0.2)
    assert (
        bars["weights: 1 GiB"].get("fill") == bars["weights: 2 GiB"].get("fill") != bars["moments: 3 GiB"].get("fill")
    )
    assert "limit 4" in texts(root)


def test_a_page_escapes_all_it_is_given_and_loads_nothing():
    bad = "<script>alert(1)</script>&\"'"
    blocks = [
        Facts({bad: bad}),
        Heading(bad),
        Lines(bad, bad, bad, [Line(bad, [(0, 1), (1, 2)]), Line("b", [(0, 1)])], marks=[Mark(0.5, bad, bad, "#000")]),
        Bars(bad, bad, [(bad, [(bad, 1.0)])]),
        Table(bad, (bad,), [(bad,), (Dot(bad, "#123456"),), (Fold(bad, bad),)], bad),
        Fold(bad, bad),
        Caution(bad),
        bad,
    ]
    text = render_page(bad, blocks)
    assert "<script" not in text and not re.search(r"https?://", text)
    assert text.count("alert(1)") > 15
    assert text.count("<div class=plots>") == 1, "plots in a row share a grid"


def test_numbers_stand_to_the_right():
    text = render_page("t", [Table("t", ("a", "b"), [("-1.5", "word"), ("$3", "7 steps"), ("", "-")])])
    assert text.count("<td class=n>") == 3 and "<td>word</td>" in text and "<td>7 steps</td>" in text


@pytest.mark.parametrize("log", ["", "y"])
@pytest.mark.parametrize(
    "values",
    [
        (1.7e308, -1.7e308, 3.0),
        (1e299, -1e299),
        (5e-324, 1e-323),
        (1e-310, 3e-310),
        (1.0, 1.0 + 2e-16),
        (1e18, 1e18 + 256),
    ],
)
def test_no_value_is_too_large_or_too_small_for_an_axis(values, log):
    picture = Lines("loss", "step", "nats", [Line("", list(enumerate(values)))], log).svg()
    assert "inf" not in picture and "nan" not in picture


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_left_out_of_a_line(value):
    points = [(1, 2.0), (2, value), (3, 4.0)]
    assert (
        Lines("loss", "step", "nats", [Line("", points)]).svg()
        == Lines("loss", "step", "nats", [Line("", [points[0], points[2]])]).svg()
    )
    assert "nothing was measured" in Lines("loss", "step", "nats", [Line("", points[1:2])]).svg()
