"""Damage of a layer's error: how far it moves the network's outputs on calibration images, and the curve through such measurements."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dsconv_surgery.calibration.images import Images
from dsconv_surgery.calibration.moments import layer_moments
from dsconv_surgery.calibration.side_by_side import SideBySide, checked_trace
from dsconv_surgery.network.discovery import ConvSite
from dsconv_surgery.network.graph_rewrite import trace
from dsconv_surgery.schemes import Objective
from dsconv_surgery.support.cache import Cache, digest
from dsconv_surgery.support.copies import evaluation_copy, run_model, unregistered_tensors
from dsconv_surgery.support.fidelity import OutputComparison
from dsconv_surgery.support.outputs import OutputSelector
from dsconv_surgery.support.progress import Progress

RIDGE = 0.1  # pulls factors towards the weights, in units of the inputs' mean square


class DamageEstimator:
    """Measures how errors of single layers move a network's outputs.

    Args:
        model: not changed.
        sites: the layers with options.
        images: calibration images; None to use the weights alone.
        cache: stores results.
        progress: shows the pass over the images.
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[ConvSite], images: Images | None, cache: Cache, progress: Progress | None = None
    ) -> None:
        self._model, self._names, self.images, self.cache = model, [site.name for site in sites], images, cache
        self._select = OutputSelector() if images is None else images.select_outputs
        self._objectives = None if images is None else layer_moments(model, images, sites, progress or Progress(False))

    def objectives(self, name: str) -> tuple[Objective, Objective, Tensor]:
        """The error of a layer's outputs on the dense network's inputs, to fit to (with a ridge towards the weights) and to judge by.

        The third is the mean of the layer's patches, (g, n).
        """
        if self._objectives is None:
            raise ValueError(f"{name}: errors of outputs need calibration images, and none were passed. Pass calibration=.")
        fit, judge, mean = self._objectives(name)
        return fit.ridged(RIDGE * fit.scale), judge, mean

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
                for output in self._run_whole():
                    parts += self._select(output)
            parts.append(f"{self.images.settings.patches} {self.images.settings.seed} {self.images.example}")
            for _, _, inputs in self.images:
                leaves = pytree.tree_leaves((inputs.args, inputs.kwargs))
                parts.append(digest(*(leaf if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)))
        return digest(*parts)

    def divergence(self, name: str, chain: nn.Module, shift: Tensor | None = None) -> float:
        """How far the network's outputs move if a chain replaces one layer; `shift`, (out,), is added to its output, as a bias will be.

        For a classifier the Kullback-Leibler divergence from the dense network, in nats; otherwise the squared relative error.
        """
        targets, replacement = self._targets, _Shifted(chain.eval(), self._dense.get_submodule(name), shift)
        if self._pair is not None:
            if name not in self._pair.following:
                return 0.0  # no image reaches it
            outputs: Iterable[Any] = self._pair.outputs(name, replacement)
        else:
            handle = self._dense.get_submodule(name).register_forward_hook(replacement.replace, with_kwargs=True)
            try:
                outputs = list(self._run_whole())
            finally:
                handle.remove()
        comparison = OutputComparison(self._select)
        for (count, target), output in zip(targets, outputs, strict=True):
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
    def _pair(self) -> SideBySide | None:
        """Runs the part of the network behind a layer; None for networks that cannot be traced, which run as a whole."""
        images: Any = self.images
        graph = checked_trace(self._dense, images)
        return None if graph is None else SideBySide(self._dense, graph, images, self._names, probe=True)

    def close(self) -> None:
        """Release stored activations, and delete temporary files; the next measurement makes them anew."""
        if pair := self.__dict__.get("_pair"):
            pair.close()

    @cached_property
    def _targets(self) -> list[tuple[int, Any]]:
        """The number of images and the dense network's output, for each chunk of images."""
        images: Any = self.images
        outputs = self._run_whole() if self._pair is None else self._pair.outputs(self._pair.first_layer, None)
        targets = [(count, output) for (_, count, _), output in zip(images.probe_batches(), outputs, strict=True)]
        tensors = [tensor for _, output in targets for tensor in self._select(output) if tensor.numel()]
        if not all(not bool(t.isnan().any()) and bool(t.isfinite().any()) for t in tensors):
            raise ValueError("calibration: the network's own outputs on these images are NaN, or nothing but infinite. Repair it first.")
        return targets

    def _run_whole(self) -> Iterator[Any]:
        images: Any = self.images
        with torch.no_grad():
            for first_image, _, inputs in images.probe_batches():
                yield run_model(self._dense, inputs, first_image)


class _Shifted(nn.Module):
    """A chain in the place of a layer, with a value added to each output channel."""

    def __init__(self, chain: nn.Module, layer: nn.Module, shift: Tensor | None) -> None:
        super().__init__()
        per_channel = (-1,) if isinstance(layer, nn.Linear) else (-1, 1, 1)
        self.chain, self.shift = chain, 0.0 if shift is None else shift.to(layer.get_parameter("weight")).reshape(per_channel)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.chain(*args, **kwargs) + self.shift

    def replace(self, _layer: nn.Module, args: Any, kwargs: Any, _output: Any) -> Tensor:
        """The output of a forward hook."""
        return self.forward(*args, **kwargs)
