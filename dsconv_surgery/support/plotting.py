"""Pictures of results: curves, and bars before and after, for notebooks and files (they need matplotlib)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEFORE, DENSE = "#dcdcdc", "#9a9a9a"  # greys of the bars before, and of layers that stay dense
ROW, MARGIN, WIDTH = 0.21, 1.5, 3.4  # inches: the height of a bar's row, of titles and legend, and the width of a panel
DPI = 120
NOTE_BOX = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}  # keeps notes readable where they cross a line


@dataclass(frozen=True)
class Curve:
    """One line in axes of its own: its points with notes, and a horizontal line at a level to compare with."""

    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    y: Sequence[float]
    notes: Sequence[str] = ()
    level: float | None = None
    level_name: str = ""
    first_name: str = ""  # of the first point, which is then drawn hollow
    integers: bool = False  # x counts something


@dataclass(frozen=True)
class Bars:
    """One number of each row before and after, in axes of their own; they share the rows with other bars."""

    title: str
    before: Sequence[float]
    after: Sequence[float]
    unit: str = ""


def draw_curves(title: str, curves: Sequence[Curve], path: str | Path | None = None) -> Figure:
    """Curves side by side, as a figure that notebooks show and, with a path, as an image file; ValueError where matplotlib is missing."""
    figure = _new_figure((WIDTH + 0.8) * len(curves), 3.6)
    for axes, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        _draw_curve(axes, curve)
    figure.suptitle(title, fontsize=12)
    return _written(figure, path)


def draw_bars(
    title: str, rows: Sequence[str], groups: Sequence[str | None], colours: Mapping[str, str], bars: Sequence[Bars], path: str | Path | None
) -> Figure:
    """Bars side by side; see `draw_curves`.

    Args:
        rows: their names, from top to bottom.
        groups: a group for each row, which gives its colour; None for rows that did not change, which are hatched.
        colours: a colour for each group.
    """
    figure = _new_figure(WIDTH * len(bars) + 0.11 * max(map(len, rows), default=0), ROW * len(rows) + MARGIN)
    all_axes = figure.subplots(1, len(bars), squeeze=False, sharey=True)[0]
    from matplotlib.patches import Patch
    from matplotlib.ticker import EngFormatter, MaxNLocator

    styles: dict[str | None, dict[str, Any]] = {name: {"color": colour} for name, colour in colours.items() if name in groups}
    if None in groups:
        styles[None] = {"facecolor": "white", "edgecolor": DENSE, "hatch": "/////", "linewidth": 0.6}
    for axes, panel in zip(all_axes, bars, strict=True):
        axes.barh(range(len(rows)), panel.before, height=0.84, color=BEFORE)
        for group, style in styles.items():
            members = [index for index, other in enumerate(groups) if other == group]
            axes.barh(members, [panel.after[index] for index in members], height=0.5, **style)
        axes.set_title(panel.title, fontsize=9)
        axes.xaxis.set_major_formatter(EngFormatter(panel.unit))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_yticks(range(len(rows)), rows)
    all_axes[0].set_ylim(len(rows) - 0.4, -0.6)
    handles = [Patch(color=BEFORE, label="before"), *(Patch(label=group or "stays dense", **style) for group, style in styles.items())]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=12)
    return _written(figure, path)


def _draw_curve(axes: Any, curve: Curve) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    start = 1 if curve.first_name else 0
    if curve.level is not None:
        axes.axhline(curve.level, color="black", linestyle="--", linewidth=1, label=curve.level_name)
    axes.plot(curve.x, curve.y, color="C0", linewidth=1.6, alpha=0.7)
    axes.plot(curve.x[start:], curve.y[start:], "o", color="C0")
    if start:
        label = "" if curve.first_name == curve.level_name else curve.first_name
        axes.plot(curve.x[:1], curve.y[:1], "o", color="C0", markerfacecolor="white", label=label)
    for x, y, note in zip(curve.x, curve.y, curve.notes, strict=False):
        axes.annotate(note, (x, y), textcoords="offset points", xytext=(0, 8), ha="center", fontsize=8, bbox=NOTE_BOX)
    axes.set_title(curve.title, fontsize=10)
    axes.set_xlabel(curve.x_label)
    axes.set_ylabel(curve.y_label)
    axes.margins(x=0.08, y=0.15)
    if curve.integers:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlim(curve.x[0] - 0.4, curve.x[-1] + 0.4)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)


def _new_figure(width: float, height: float) -> Figure:
    """An empty figure that does not need pyplot, and that notebooks show without it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a plot needs matplotlib: pip install 'dsconv_surgery[plot]'.") from error

    class Picture(Figure):
        def _repr_png_(self) -> bytes:
            data = io.BytesIO()
            self.savefig(data, format="png")
            return data.getvalue()

    return Picture(figsize=(width, height), dpi=DPI, layout="constrained")


def _written(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        figure.savefig(path)
    return figure
