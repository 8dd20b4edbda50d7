"""What is known of a network while its layers' options are judged: what they see on images, and what their errors do to its outputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dsconv_surgery import graph, ranks
from dsconv_surgery.cache import Cache, digest
from dsconv_surgery.feed import on_device
from dsconv_surgery.graph import ConvSite
from dsconv_surgery.images import Images
from dsconv_surgery.measure import comparable, detached, log_softmax, loose_tensors
from dsconv_surgery.schemes import Objective
from dsconv_surgery.walk import layer_moments

PULL = 0.1  # ridge towards the weights, in units of the inputs' mean square, when options are judged on data
PROBED, PROBED_NUMBERS = 256, 2**23  # images at most, and numbers in them, on which an error's effect is measured


class Study:
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
        parts += loose_tensors(self._model)  # those of them that no state_dict holds
        try:
            parts.append(graph.traced(copy.deepcopy(self._model, detached(self._model)).eval()).code)
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
            found = _distance(wanted, self._outputs())
        finally:
            handle.remove()
        if not math.isfinite(found):
            raise ValueError(f"{name}: with an error in this layer the network's outputs on calibration images are not finite. Exclude it.")
        return found

    @cached_property
    def _dense(self) -> nn.Module:
        return copy.deepcopy(self._model, detached(self._model)).eval()

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
            for first, inputs in images:
                limit = max(1, min(PROBED, PROBED_NUMBERS // inputs[0][0].numel())) - first
                if limit <= 0:
                    break
                few = tuple(t[:limit].clone() for t in inputs)
                outputs = pytree.tree_leaves(self._dense(*on_device(few, self._dense)))
                found.append([t for t in outputs if isinstance(t, Tensor) and t.is_floating_point()])
        return found


def _distance(wanted: list[list[Tensor]], given: list[list[Tensor]]) -> float:
    off, total = 0.0, 0.0
    for outputs, its in zip(wanted, given, strict=True):
        if len(outputs) == 1 and outputs[0].ndim == 2 and outputs[0].shape[1] > 1:
            p, q = (log_softmax(side[0].double()) for side in (outputs, its))
            off, total = off + float((p.exp() * (p - q)).sum()), total + len(p)
        else:
            pairs = [comparable(a, b) for a, b in zip(outputs, its, strict=True)]
            off += float(sum((a - b).square().sum() for a, b in pairs))
            total += float(sum(a.square().sum() for a, _ in pairs))
    off, total = ranks.summed(torch.tensor([off, total], dtype=torch.float64)).tolist()
    found = off / total if total else 0.0
    return found if math.isnan(found) else max(0.0, found)
