"""Curves through a layer's measured errors and damages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsconv_surgery.network.geometry import Rank

# Of log damage over log error, in CIFAR ResNets: the mean slope of layers, and the variance of single measurements over that of slopes.
PRIOR_SLOPE, PRIOR_WEIGHT = 1.75, 0.9
TINY = 1e-9  # smaller errors and damages count as equal


def truncation_errors(spectrum: Tensor) -> Tensor:
    """Relative squared errors of keeping the first r (or r, q) components of a spectrum."""
    total = spectrum.sum()
    if spectrum.ndim == 1:  # summed from the small end, so that small errors keep their digits
        errors = torch.cat([spectrum.flip(0).cumsum(0).flip(0)[1:], spectrum.new_zeros(1)])
    else:
        errors = total - spectrum.cumsum(0).cumsum(1)
    return (errors / total).clamp(min=0) if total > 0 else torch.zeros_like(spectrum)


def abscissa(ranks: Sequence[Rank], bounds: Sequence[float] | None) -> Any:
    """What log errors are smooth in: the root of the rank; for pairs of ranks, minus the logarithm of the weights' error."""
    if bounds is not None:
        return -np.log(np.maximum(bounds, TINY))
    return np.sqrt([float(rank) if isinstance(rank, int) else 0.0 for rank in ranks])


def interpolate(x: Any, y: Any, targets: Any) -> Any:
    """Falling values through (x, y), by monotonic cubic pieces (PCHIP), extended by lines; zero below a single x."""
    from scipy.interpolate import PchipInterpolator  # here, as it takes long to import

    x, first = np.unique(x, return_index=True)
    y = np.minimum.accumulate(y[first])
    if len(x) < 2:
        return np.where(targets >= x[0], y[0], 0.0)
    curve, inside = PchipInterpolator(x, y), np.clip(targets, x[0], x[-1])
    slopes = [(y[1] - y[0]) / (x[1] - x[0]), (y[-1] - y[-2]) / (x[-1] - x[-2])]
    return curve(inside) + np.where(targets < x[0], slopes[0], slopes[1]) * (targets - inside)


def damage_curve(points: Sequence[tuple[float, float]], errors: Sequence[float]) -> list[float]:
    """Damages at some errors, by a line through measured pairs of error and damage, log against log.

    Least squares with a prior on the slope, which single measurements, that scatter by a third, would miss. Zero for errors of zero.
    """
    x, y = np.log(np.maximum(np.array(points), TINY)).T
    offset = x - x.mean()
    slope = (offset @ (y - y.mean()) + PRIOR_WEIGHT * PRIOR_SLOPE) / (offset @ offset + PRIOR_WEIGHT)
    logs = y.mean() + max(float(slope), 0.5) * (np.log(np.maximum(np.array(errors), TINY)) - x.mean())
    return [float(damage) if error > TINY else 0.0 for damage, error in zip(np.exp(logs), errors, strict=True)]
