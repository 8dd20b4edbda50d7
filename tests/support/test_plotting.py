"""Pictures: what is drawn where, as matplotlib holds it, and the error without matplotlib."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.patches  # noqa: F401 - imported before a test hides matplotlib
import pytest

from dsconv_surgery.support.plotting import DENSE, Bars, Curve, draw_bars, draw_curves

BARS = [Bars("MACs", [10.0, 20.0, 30.0], [4.0, 20.0, 15.0]), Bars("time", [1e-3, 2e-3, 3e-3], [2e-3, 2e-3, 1e-3], "s")]


def draw(path: Path | None = None) -> Any:
    return draw_bars("title", ["a", "b", "c"], ["cp", None, "cp"], {"tucker": "C4", "cp": "C2"}, BARS, path)


def test_bars_have_the_widths_colours_and_hatches_of_their_rows() -> None:
    figure = draw()
    first, second = figure.axes
    bars = [(round(p.get_y() + p.get_height() / 2), p.get_width(), p.get_hatch()) for p in first.patches]
    assert bars == [(0, 10, None), (1, 20, None), (2, 30, None), (0, 4, None), (2, 15, None), (1, 20, "/////")]
    assert [p.get_width() for p in second.patches[:3]] == [1e-3, 2e-3, 3e-3]
    assert [text.get_text() for text in first.get_yticklabels()] == ["a", "b", "c"]
    assert first.get_ylim()[0] > first.get_ylim()[1]  # the first row is at the top
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["before", "cp", "stays dense"]
    assert first.patches[-1].get_edgecolor() == pytest.approx([int(DENSE[i : i + 2], 16) / 255 for i in (1, 3, 5)] + [1.0])
    assert second.xaxis.get_major_formatter()(2e-3, 0) == "2 ms"


def test_pictures_grow_with_their_rows() -> None:
    """Fifty names do not overlap."""
    names = [f"layer{index}.conv" for index in range(50)]
    figure = draw_bars("", names, [None] * 50, {}, [Bars("MACs", [1.0] * 50, [1.0] * 50)], None)
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert all(lower.y1 <= upper.y0 for upper, lower in pairwise(boxes))


def test_curves_have_points_notes_and_the_line_of_the_dense_network() -> None:
    curve = Curve("title", "epoch", "score", [0, 1, 2], [0.2, 0.5, 0.4], ["a", "b", "c"], 0.9, "dense", "before", integers=True)
    (axes,) = draw_curves("", [curve]).axes
    level, line, points, first = axes.lines
    assert set(level.get_ydata()) == {0.9}
    assert list(line.get_ydata()) == [0.2, 0.5, 0.4]
    assert list(points.get_xdata()) == [1, 2]
    assert (list(first.get_xdata()), first.get_markerfacecolor()) == ([0], "white")
    assert [text.get_text() for text in axes.texts] == ["a", "b", "c"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["dense", "before"]


@pytest.mark.parametrize("epochs", [1, 2, 7, 40])
def test_counts_have_whole_numbers_at_their_axis(epochs: int) -> None:
    x = list(range(1, epochs + 1))
    (axes,) = draw_curves("", [Curve("", "epoch", "loss", x, x, integers=True)]).axes
    ticks = [tick for tick in axes.get_xticks() if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    assert ticks
    assert all(tick == int(tick) for tick in ticks)


def test_pictures_are_written_and_shown_by_notebooks(tmp_path: Path) -> None:
    figure = draw(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert figure._repr_png_().startswith(b"\x89PNG")
    draw(tmp_path / "picture.svg")
    assert b"<svg" in (tmp_path / "picture.svg").read_bytes()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'dsconv_surgery\[plot\]'"):
        draw()
    with pytest.raises(ValueError, match=r"pip install 'dsconv_surgery\[plot\]'"):
        draw_curves("", [Curve("", "", "", [1], [1])])
