"""Charts as files: what is drawn, and what is said where nothing can be."""

import itertools
import math
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.plot import Bars, Chart, Line, PlotError, check_path, cumulative, picture, write

CHARTS = (
    Chart(
        title="Waits",
        x_label="seconds",
        y_label="%",
        lines=(Line(label="A <1>", points=((0.0, 1.0), (2.0, 3.0))), Line(label="none", points=())),
    ),
    Bars(title="Sources", parts=("here", "there"), bars=(("P", (1.0, 3.0)), ("idle", (0.0, 0.0)))),
    Chart(title="Empty", x_label="x", y_label="y", lines=()),
)


def texts(svg: bytes) -> set[str]:
    found = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return {text.text for text in found if text.text}


def test_every_chart_is_drawn_with_its_words():
    words = texts(picture(CHARTS, kind="svg"))
    assert {"Waits", "seconds", "A <1>", "none", "Sources", "here", "there", "P", "idle", "Empty"} <= words


@pytest.mark.parametrize(("name", "magic"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")])
def test_a_file_has_the_format_of_its_name(tmp_path, name, magic):
    write(tmp_path / name, CHARTS)
    assert (tmp_path / name).read_bytes().startswith(magic)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("plot.gif", "ends with .png, .svg, .pdf"), ("plot", "ends with"), ("no/plot.png", "No such file")],
)
def test_a_path_at_which_nothing_can_be_drawn_is_refused_before_the_run(tmp_path, name, complaint):
    with pytest.raises(PlotError, match=complaint):
        check_path(tmp_path / name)


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(PlotError, match=r"taken.png: Is a directory"):
        write(tmp_path / "taken.png", CHARTS)


def test_without_matplotlib_it_is_said_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotError, match=r"jaxserve\[plot\]"):
        check_path(tmp_path / "a.png")


def test_what_is_no_number_is_not_drawn():
    line = Line(label="a", points=((0.0, 1.0), (math.nan, 2.0), (1.0, math.inf), (2.0, 3.0)))
    assert line.finite == ((0.0, 1.0), (2.0, 3.0))


@given(st.lists(st.floats(0, 100), min_size=1, max_size=500))
def test_a_cumulative_curve_rises_from_nothing_to_all(values):
    points = cumulative("a", values).points
    assert points[0] == (min(values), 0.0) and points[-1] == (max(values), 100.0)
    assert all(a[0] <= b[0] and a[1] < b[1] for a, b in itertools.pairwise(points))
    x, share = points[len(points) // 2]
    assert sum(value <= x for value in values) / len(values) * 100 >= share - 1e-9
    assert cumulative("a", []).points == ()
