"""What a network costs, counted and timed: parameters, MACs, latency. Imports nothing of ours."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dsconv_surgery.support.copies import detached_copies


def log_softmax(logits: Tensor) -> Tensor:
    """Of each row; finite also where a logit is minus infinity, so that `p (log p - log q)` is 0 for classes that are masked out."""
    return logits.log_softmax(1).clamp(min=-1e30)


def comparable_values(wanted: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of both but for those that are the same infinity, such as what is masked out."""
    where = ~(wanted.isinf() & (wanted == given))
    return wanted[where].double(), given[where].double()


@dataclass(frozen=True)
class Fidelity:
    """How near a network's outputs are to another's on some images.

    `error` is the squared relative error of all outputs; for classifiers - one output, (images, classes) - `agreement` is the
    share of images with the same top class, `divergence` the mean Kullback-Leibler divergence from the first's softmax, in nats.
    """

    images: int
    error: float
    agreement: float | None
    divergence: float | None
    layer_errors: dict[str, float]  # squared relative error of layers' outputs, each channel about its mean

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}


def measure_fidelity(before: nn.Module, after: nn.Module, batches: Iterable[tuple[Any, ...]], layers: Sequence[str] = ()) -> Fidelity:
    """Send the same images through both, in evaluation mode, and compare outputs; of `layers` (in both networks) as well."""
    off = total = divergence = 0.0
    images = agreeing = 0
    classifier = True
    sums: dict[str, Tensor] = {}
    clones = [copy.deepcopy(model, detached_copies(model)).eval() for model in (before, after)]
    outputs: dict[tuple[int, str], list[Tensor]] = {}
    for side, clone in enumerate(clones):
        for name in layers:
            clone.get_submodule(name).register_forward_hook(
                lambda _module, _args, output, key=(side, name): outputs.setdefault(key, []).append(output.detach().clone())
            )
    with torch.no_grad():
        for inputs in batches:
            outputs.clear()
            given = pytree.tree_map_only(Tensor, lambda t: t.to(next(before.parameters()).device), inputs)
            dense, cut = (
                [t for t in pytree.tree_leaves(clone(*copy.deepcopy(given))) if isinstance(t, Tensor) and t.is_floating_point()]
                for clone in clones
            )
            images += inputs[0].shape[0]
            pairs = [comparable_values(a, b) for a, b in zip(dense, cut, strict=True)]
            off += sum(float((a - b).square().sum()) for a, b in pairs)
            total += sum(float(a.square().sum()) for a, _ in pairs)
            classifier = classifier and len(dense) == 1 and dense[0].ndim == 2 and dense[0].shape[1] > 1
            if classifier:
                p, q = (log_softmax(side[0].double()) for side in (dense, cut))
                agreeing += int((p.argmax(1) == q.argmax(1)).sum())
                divergence += float((p.exp() * (p - q)).sum())
            for name in layers:
                for a, b in zip(outputs[0, name], outputs[1, name], strict=True):
                    sums[name] = sums.get(name, torch.zeros(())) + _channel_sums(a, b, clones[0].get_submodule(name))
    return Fidelity(
        images,
        off / total if total else float(off > 0),
        agreeing / images if classifier and images else None,
        divergence / images if classifier and images else None,
        {name: _centred_error(found) for name, found in sums.items()},
    )


def _channel_sums(wanted: Tensor, given: Tensor, layer: nn.Module) -> Tensor:
    """By channel: count, sums and sums of squares of what is wanted and of what it is missed by, (5, channels)."""
    rows = [(t if isinstance(layer, nn.Linear) or t.ndim < 3 else t.movedim(-3, -1)).flatten(0, -2).double() for t in (wanted, given)]
    a, d = rows[0], rows[0] - rows[1]
    return torch.stack([torch.full_like(a[0], len(a)), a.sum(0), a.square().sum(0), d.sum(0), d.square().sum(0)])


def _centred_error(sums: Tensor) -> float:
    count, wanted, wanted_squares, missed, missed_squares = sums
    variance = float((wanted_squares - wanted.square() / count).sum())
    return float((missed_squares - missed.square() / count).sum()) / variance if variance > 0 else 0.0


def checked_score(evaluate: Callable[[nn.Module], float], model: nn.Module, name: str = "evaluate") -> float:
    """A network's score by a function, given under this name; ValueError unless it is a number, or a tensor of one."""
    score: Any = evaluate(model)
    if isinstance(score, Tensor | np.generic | np.ndarray) and math.prod(score.shape) == 1:
        score = score.item()
    if not isinstance(score, Real) or score != score:
        raise ValueError(f"{name}: found {score!r}, expected a number, higher for better.")
    return float(score)
