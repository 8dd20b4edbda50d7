"""Line plots, one panel beside the other, written to a file (needs matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Panel:
    """One line in axes of its own."""

    x_label: str
    y_label: str
    x: Sequence[float]
    y: Sequence[float]


def save_panels(path: str | Path, panels: Sequence[Panel]) -> None:
    """Draw panels side by side and write the picture to a file; ValueError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a plot needs matplotlib: pip install 'dsconv_surgery[plot]'.") from error
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.plot(panel.x, panel.y, marker="o")
        axes.set_xlabel(panel.x_label)
        axes.set_ylabel(panel.y_label)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
