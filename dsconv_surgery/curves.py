"""Curves through a few measurements: what lies between them."""

from __future__ import annotations

from typing import Any

import numpy as np

WIDTH = 0.3  # in log error, over which effects are averaged: single ones scatter by half


def smooth(x: Any, y: Any, at: Any) -> Any:
    """Local linear regression of y on x, both logarithms, never falling; below the least x with slope 1."""
    grid = np.linspace(x.min(), max(x.max(), x.min() + 1e-6), 100)
    off = x - grid[:, None]
    weight = np.exp(-0.5 * (off / WIDTH) ** 2) + 1e-9
    # Of slopes, 1.5 is what there is before any measurement.
    moments = [(weight * off**k).sum(1) for k in range(3)]
    moments[2] += 0.05
    seen = [(weight * y).sum(1), (weight * off * y).sum(1) + 0.05 * 1.5]
    level = (moments[2] * seen[0] - moments[1] * seen[1]) / (moments[0] * moments[2] - moments[1] ** 2)
    return along(grid, np.maximum.accumulate(level), at, slope=1.0)


def along(x: Any, y: Any, at: Any, slope: float | None = None) -> Any:
    """Piecewise linear through (x, y), x rising; beyond the ends with the slope of the last piece, or another one below the first."""
    x, first = np.unique(x, return_index=True)
    y = y[first]
    if len(x) == 1:
        return np.full(np.shape(at), y[0]) + (slope or 0.0) * (at - x[0])
    inner = np.interp(at, x, y)
    low = y[0] + (slope if slope is not None else (y[1] - y[0]) / (x[1] - x[0])) * (at - x[0])
    last = (y[-1] - y[-2]) / (x[-1] - x[-2])
    high = y[-1] + (last if slope is None else max(last, slope)) * (at - x[-1])
    return np.where(at < x[0], low, np.where(at > x[-1], high, inner))
