"""What is known of a network while its layers' options are judged: what they see on images, and what their errors do to its outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsconv_surgery.calibration.images import Images
from dsconv_surgery.calibration.moments import layer_moments
from dsconv_surgery.network.discovery import ConvSite
from dsconv_surgery.network.graph_rewrite import trace
from dsconv_surgery.schemes import Objective
from dsconv_surgery.support.cache import Cache, digest
from dsconv_surgery.support.copies import evaluation_copy, run_model, unregistered_tensors
from dsconv_surgery.support.fidelity import OutputComparison, output_tensors

PULL = 0.1  # ridge towards the weights, in units of the inputs' mean square, when options are judged on data


class DamageEstimator:
    """A network, calibration images if there are some, and a cache for what is found out about them.

    Args:
        model: not changed.
        sites: the layers that options are judged for.
        images: None to judge by weights alone.
        cache: where results are kept.
    """

    def __init__(self, model: nn.Module, sites: Sequence[ConvSite], images: Images | None, cache: Cache) -> None:
        self._model, self.images, self.cache = model, images, cache
        self._objective = None if images is None else layer_moments(model, images, sites)
        self._latest: tuple[str, tuple[Objective, Objective]] | None = None  # one layer's: of wide ones they take time and memory

    def objectives(self, name: str) -> tuple[Objective, Objective]:
        """What a layer should give on the images, given what it sees in the dense network; and with a pull towards its weights."""
        if self._objective is None:
            raise ValueError("there are no calibration images to judge by.")
        if self._latest is None or self._latest[0] != name:
            self._latest = None
            plain = self._objective(name)
            self._latest = name, (plain, plain.ridged(PULL * max(plain.scale, 1e-12)))
        return self._latest[1]

    @cached_property
    def digest(self) -> str:
        """Of the network - weights, structure and, where it can be traced, what it computes - and of the images and how they are used."""
        parts: list[Tensor | str] = [str(self._model)]
        for name, value in self._model.state_dict().items():
            parts += [name, value if isinstance(value, Tensor) else repr(value)]
        parts += unregistered_tensors(self._model)  # those of them that no state_dict holds
        try:
            parts.append(trace(evaluation_copy(self._model)).code)
        except Exception:  # whatever stands against tracing
            parts.append("not traced")
            for outputs in self._wanted if self.images is not None else []:  # what it computes shows, as far as it can be known
                parts += outputs
        if self.images is not None:
            parts.append(f"{self.images.settings.patches} {self.images.settings.seed} {self.images.example}")
            for _, inputs in self.images:
                parts.append(digest(*(t if isinstance(t, Tensor) else repr(t) for t in inputs)))
        return digest(*parts)

    def divergence(self, name: str, replacement: nn.Module) -> float:
        """How far the network's outputs move if one layer is replaced, the mean of its error made up for where it will be.

        Of a classifier the Kullback-Leibler divergence from its own softmax, in nats; of other networks the squared relative error.
        """
        wanted, centred = self._wanted, self.objectives(name)[0].centred
        layer = self._dense.get_submodule(name)
        replacement = replacement.eval()

        def instead(_module: nn.Module, args: Any, output: Tensor) -> Tensor:
            given = replacement(*args)
            if not centred:
                return given
            off = output - given
            return given + (off.mean((0, 2, 3), keepdim=True) if off.ndim == 4 else off.flatten(0, -2).mean(0))

        handle = layer.register_forward_hook(instead)
        try:
            found = _divergence(wanted, self._outputs())
        finally:
            handle.remove()
        if not math.isfinite(found):
            raise ValueError(f"{name}: with an error in this layer the network's outputs on calibration images are not finite. Exclude it.")
        return found

    @cached_property
    def _dense(self) -> nn.Module:
        return evaluation_copy(self._model)

    @cached_property
    def _wanted(self) -> list[list[Tensor]]:
        found = self._outputs()
        if not all(not bool(t.isnan().any()) and bool(t.isfinite().any()) for batch in found for t in batch if t.numel()):
            raise ValueError("calibration: the network's own outputs on these images are NaN, or nothing but infinite. Repair it first.")
        return found

    def _outputs(self) -> list[list[Tensor]]:
        found: list[list[Tensor]] = []
        images: Any = self.images
        with torch.no_grad():
            for inputs in images.probe_batches():
                found.append(output_tensors(run_model(self._dense, inputs)))
        return found


def _divergence(targets: list[list[Tensor]], outputs: list[list[Tensor]]) -> float:
    """Of classifiers the divergence of the outputs, of other networks their squared relative error, over all processes."""
    comparison = OutputComparison()
    for target, output in zip(targets, outputs, strict=True):
        comparison.add(target, output, len(target[0]) if target else 0)
    comparison.all_reduce()
    divergence = comparison.divergence
    return comparison.error if divergence is None else divergence


WIDTH = 0.3  # in log error, over which effects are averaged: single ones scatter by half


def smooth_curve(x: Any, y: Any, at: Any) -> Any:
    """Local linear regression of y on x, both logarithms, never falling; below the least x with slope 1."""
    grid = np.linspace(x.min(), max(x.max(), x.min() + 1e-6), 100)
    off = x - grid[:, None]
    weight = np.exp(-0.5 * (off / WIDTH) ** 2) + 1e-9
    # Of slopes, 1.5 is what there is before any measurement.
    moments = [(weight * off**k).sum(1) for k in range(3)]
    moments[2] += 0.05
    seen = [(weight * y).sum(1), (weight * off * y).sum(1) + 0.05 * 1.5]
    level = (moments[2] * seen[0] - moments[1] * seen[1]) / (moments[0] * moments[2] - moments[1] ** 2)
    return interpolate(grid, np.maximum.accumulate(level), at, slope=1.0)


def interpolate(x: Any, y: Any, at: Any, slope: float | None = None) -> Any:
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
