"""The plots of a report: lines, gaps, dots and ticks."""

import re

import pytest

from trainer.report.charts import ticks
from trainer.report.curves import columns_of, draw
from trainer.report.figures import REWARDS
from trainer.report.plots import MAX_POINTS, Line, plot


def test_a_spike_does_not_flatten_the_rest(tmp_path):
    points = [(step, 1e6 if step == 700 else 1 + step % 2) for step in range(1000)]
    svg = plot([Line("a", points, "c1")], "unit")
    labels = re.findall(r'text-anchor="end">([\d.,]+)</text>', svg)
    assert float(labels[-1].replace(",", "")) < 1e5
    assert "not shown: single steps up to 1e+06" in svg


def test_dots_are_as_many_as_can_be_told_apart():
    def dots(number):
        svg = plot([Line("a", [(i, i % 3) for i in range(number)], "c1", markers=True)], "unit")
        return re.findall(r' r="([\d.]+)"', svg)

    assert dots(20) == ["3.5"] * 20
    assert dots(100) == ["1.8"] * 100
    assert dots(MAX_POINTS + 1) == []


@pytest.mark.parametrize(
    "points",
    [
        [(i, 1.0) for i in range(10)] + [(i, 2.0) for i in range(40, 50)],
        [(1, 1.0), (2, 2.0), (3, None), (4, 3.0), (5, 1.0)],
    ],
    ids=["a long stretch", "a value that is missing"],
)
def test_a_line_does_not_cross_a_stretch_without_values(points):
    line = re.search(r'class="line c1" d="([^"]*)"', plot([Line("a", points, "c1")], "unit"))
    assert line is not None
    assert line[1].count("M") == 2


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0, 0), (5, 5), (-2, -2), (0, 0.0031), (-0.4, 0.9), (17, 12345), (0, 1e-9)],
)
def test_ticks_enclose_the_range(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 9
    assert found[0] <= low + 1e-12
    assert found[-1] >= high - 1e-12


def test_a_plot_without_values_is_refused():
    with pytest.raises(ValueError, match="nothing to plot"):
        plot([Line("a", [(1, None)], "c1")], "unit")


def test_shares_are_drawn_in_percent():
    svg, _ = draw(REWARDS[0], columns_of([{"step": 1, "eval/accuracy": 0.25}]))
    assert "sampled 25 at last" in svg
