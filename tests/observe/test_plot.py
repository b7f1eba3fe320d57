"""The terminal's picture: its axis is steps, and of a step made twice the last time counts."""

import math

import pytest

from megalm.observe.plot import draw_text_plot

NAN = math.nan


def picture(points, **options):
    """(rows of characters, the labels on the left, the line of marks if there is one, the line of steps)."""
    lines = draw_text_plot(points, **{"width": 50, "height": 4, **options}).splitlines()
    rows = [line for line in lines if "│" in line]
    below = lines[lines.index(next(line for line in lines if "└" in line)) + 1 :]
    return [row.partition("│")[2] for row in rows], [row.partition("│")[0].strip() for row in rows], below


def filled(rows):
    """Columns of characters in which something is drawn."""
    return {column for row in rows for column, cell in enumerate(row) if cell != chr(0x2800)}


def level(rows, column):
    """Rows in which something is drawn in this column, from above."""
    return [number for number, row in enumerate(rows) if row[column] != chr(0x2800)]


def test_the_axis_is_steps_and_not_lines():
    rows, _, below = picture([(0, 0.0), (10, 0.0), (20, 0.0), (1000, 8.0)])
    assert below[-1].split() == ["0", "1000"]
    assert level(rows, 1) == [3] and level(rows, 49)[0] == 0
    assert level(rows, 25) in ([1], [2], [1, 2]), "half of the way between 20 and 1000"


def test_marks_point_at_their_steps_from_below():
    points = [(10 * i, 9.0 if i == 51 else 1.0) for i in range(1, 101)]
    rows, _, below = picture(points, marks=[510])
    assert below[0].index("▲") == 10 + 25 and below[1].split() == ["10", "1000"]
    assert level(rows, 25)[0] == 0


def test_what_was_gone_back_on_is_dotted():
    line = [(step, 1.0) for step in range(1, 101)]
    left = [(step, 5.0) for step in range(40, 80)]
    rows, labels, _ = picture(line, abandoned=[left])
    assert labels[0] == "5.000" and labels[-1] == "1.000"
    above = [column for column in range(50) if rows[0][column] != chr(0x2800)]
    assert 19 <= above[0] <= 21 and above[-1] <= 39 and 3 <= len(above) <= 12
    assert all(rows[-1][column] != chr(0x2800) for column in range(50))
    assert "dotted" in draw_text_plot(line, abandoned=[left], title="loss") and "dotted" not in draw_text_plot(
        line, title="loss"
    )


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_what_is_not_finite_has_no_place_but_its_step_has(value):
    rows, labels, below = picture([(1, 3.0), (2, 2.0), (3, 1.0), (4, value)])
    assert labels[0] == "3.000" and labels[-1] == "1.000" and below[-1].split() == ["1", "4"]
    assert max(filled(rows)) == 33, "two thirds of the way"


def test_nothing_finite_and_nothing_at_all_are_said():
    assert "no finite" in draw_text_plot([(1, NAN), (2, math.inf)])
    assert draw_text_plot([]) == "(nothing to plot)"
    assert filled(picture([(7, 3.0)])[0]) == {0}


@pytest.mark.parametrize(
    "values", [(1e300, -1e300, 0.0), (1.7e308, -1.7e308, 1.7e308), (1e-9, 2e-9, 3e-9), (1e20, 4.0, 5.0)]
)
def test_the_picture_keeps_its_width_whatever_the_values_are(values):
    lines = draw_text_plot([(step, value) for step, value in enumerate(values)], width=50, height=4).splitlines()
    assert {line.index("│") for line in lines if "│" in line} == {9}
    assert all(len(line) <= 60 for line in lines)


def test_many_steps_share_a_column():
    rows, labels, below = picture([(step, math.sin(step / 2000)) for step in range(1, 20001)])
    assert filled(rows) == set(range(50)) and below[-1].split() == ["1", "20000"]
