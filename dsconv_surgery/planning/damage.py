"""Damage of a layer's error: how far it moves the network's outputs on calibration images, and curves through such measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dsconv_surgery.calibration.images import Images
from dsconv_surgery.calibration.moments import layer_moments
from dsconv_surgery.network.discovery import ConvSite
from dsconv_surgery.network.graph_rewrite import trace
from dsconv_surgery.schemes import Objective
from dsconv_surgery.support.cache import Cache, digest
from dsconv_surgery.support.copies import evaluation_copy, run_model, unregistered_tensors
from dsconv_surgery.support.fidelity import OutputComparison
from dsconv_surgery.support.outputs import OutputSelector

RIDGE = 0.1  # pulls factors towards the weights, in units of the inputs' mean square
BANDWIDTH = 0.3  # of the average over log errors: single measurements scatter by half
PRIOR_SLOPE, PRIOR_WEIGHT = 1.5, 0.05  # of log damage over log error, before any measurement


class DamageEstimator:
    """Measures how errors of single layers move a network's outputs.

    Args:
        model: not changed.
        sites: the layers with options.
        images: calibration images; None to use the weights alone.
        cache: stores results.
    """

    def __init__(self, model: nn.Module, sites: Sequence[ConvSite], images: Images | None, cache: Cache) -> None:
        self._model, self.images, self.cache = model, images, cache
        self._select = OutputSelector() if images is None else images.select_outputs
        self._objective = None if images is None else layer_moments(model, images, sites)
        self._latest: tuple[str, tuple[Objective, Objective]] | None = None  # of one layer only, because wide layers take much memory

    def objectives(self, name: str) -> tuple[Objective, Objective]:
        """The error of a layer's outputs on the dense network's inputs; and the same with a ridge towards the weights."""
        if self._objective is None:
            raise ValueError(f"{name}: errors of outputs need calibration images, and none were passed. Pass calibration=.")
        if self._latest is None or self._latest[0] != name:
            self._latest = None
            plain = self._objective(name)
            self._latest = name, (plain, plain.ridged(RIDGE * plain.scale))
        return self._latest[1]

    @cached_property
    def digest(self) -> str:
        """A digest of the network (weights, structure and, if it can be traced, code) and of the images and their settings."""
        parts: list[Tensor | str] = [str(self._model)]
        for name, value in self._model.state_dict().items():
            parts += [name, value.device.type, value] if isinstance(value, Tensor) else [name, repr(value)]
        parts += unregistered_tensors(self._model)
        try:
            parts.append(trace(evaluation_copy(self._model)).code)
        except Exception:  # the network cannot be traced, for any reason: its outputs stand for its code
            parts.append("not traced")
        if self.images is not None:
            if parts[-1] == "not traced" or self._select.function is not None:
                for _, output in self._targets:
                    parts += self._select(output)
            parts.append(f"{self.images.settings.patches} {self.images.settings.seed} {self.images.example}")
            for _, _, inputs in self.images:
                leaves = pytree.tree_leaves((inputs.args, inputs.kwargs))
                parts.append(digest(*(leaf if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)))
        return digest(*parts)

    def divergence(self, name: str, replacement: nn.Module) -> float:
        """How far the network's outputs move if one layer is replaced and, where it will have a bias, its mean error corrected.

        For a classifier the Kullback-Leibler divergence from the dense network, in nats; otherwise the squared relative error.
        """
        targets, centred = self._targets, self.objectives(name)[0].centred
        replacement = replacement.eval()

        def replace_output(_module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            result = replacement(*args, **kwargs)
            if not centred:
                return result
            error = output - result
            return result + (error.mean((0, 2, 3), keepdim=True) if error.ndim == 4 else error.flatten(0, -2).mean(0))

        handle = self._dense.get_submodule(name).register_forward_hook(replace_output, with_kwargs=True)
        try:
            outputs = self._outputs()
        finally:
            handle.remove()
        comparison = OutputComparison(self._select)
        for (count, target), (_, output) in zip(targets, outputs, strict=True):
            comparison.add(target, output, count)
        comparison.all_reduce()
        result = comparison.error if comparison.divergence is None else comparison.divergence
        if not math.isfinite(result):
            raise ValueError(f"{name}: with an error in this layer the network's outputs on calibration images are not finite. Exclude it.")
        return result

    @cached_property
    def _dense(self) -> nn.Module:
        return evaluation_copy(self._model)

    @cached_property
    def _targets(self) -> list[tuple[int, Any]]:
        targets = self._outputs()
        tensors = [tensor for _, output in targets for tensor in self._select(output) if tensor.numel()]
        if not all(not bool(t.isnan().any()) and bool(t.isfinite().any()) for t in tensors):
            raise ValueError("calibration: the network's own outputs on these images are NaN, or nothing but infinite. Repair it first.")
        return targets

    def _outputs(self) -> list[tuple[int, Any]]:
        """The number of images and the output, for each batch."""
        images: Any = self.images
        with torch.no_grad():
            return [(count, run_model(self._dense, inputs, first_image)) for first_image, count, inputs in images.probe_batches()]


def smooth_curve(x: Any, y: Any, targets: Any) -> Any:
    """Local linear regression of y on x, both logarithms, made monotonic; below the least x with slope 1."""
    grid = np.linspace(x.min(), max(x.max(), x.min() + 1e-6), 100)
    offset = x - grid[:, None]
    weight = np.exp(-0.5 * (offset / BANDWIDTH) ** 2) + 1e-9
    moments = [(weight * offset**k).sum(1) for k in range(3)]
    moments[2] += PRIOR_WEIGHT
    products = [(weight * y).sum(1), (weight * offset * y).sum(1) + PRIOR_WEIGHT * PRIOR_SLOPE]
    level = (moments[2] * products[0] - moments[1] * products[1]) / (moments[0] * moments[2] - moments[1] ** 2)
    return interpolate(grid, np.maximum.accumulate(level), targets, slope=1.0)


def interpolate(x: Any, y: Any, targets: Any, slope: float | None = None) -> Any:
    """Piecewise linear through (x, y), extended with the slopes of the end pieces.

    With `slope`, that is the slope below the first x and the least slope above the last.
    """
    x, first = np.unique(x, return_index=True)
    y = y[first]
    if len(x) == 1:
        return np.full(np.shape(targets), y[0]) + (slope or 0.0) * (targets - x[0])
    inner = np.interp(targets, x, y)
    low = y[0] + (slope if slope is not None else (y[1] - y[0]) / (x[1] - x[0])) * (targets - x[0])
    last = (y[-1] - y[-2]) / (x[-1] - x[-2])
    high = y[-1] + (last if slope is None else max(last, slope)) * (targets - x[-1])
    return np.where(targets < x[0], low, np.where(targets > x[-1], high, inner))
