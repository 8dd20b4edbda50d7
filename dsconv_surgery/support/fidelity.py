"""How close one network's outputs are to another's: the only place that knows which outputs can be compared, and how."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from numbers import Real
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsconv_surgery.support import distributed
from dsconv_surgery.support.copies import evaluation_copy, run_model
from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.outputs import OutputSelector
from dsconv_surgery.support.records import record

ROUNDING = 2.0**-42  # squared relative rounding errors of layer outputs in float32: four times its epsilon, squared


def is_classification(tensors: Sequence[Tensor]) -> bool:
    """Whether an output is one tensor of logits, (images, classes)."""
    return len(tensors) == 1 and tensors[0].ndim == 2 and tensors[0].shape[1] > 1


def class_divergence(target: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """`sum_n KL(softmax(target_n / T) | softmax(logits_n / T))` over images n, in nats; differentiable.

    Classes that both networks mask with minus infinity add nothing.
    """
    q, p = ((side / temperature).log_softmax(1).clamp(min=-1e30) for side in (logits, target))
    return F.kl_div(q, p, log_target=True, reduction="sum")


def squared_error(target: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """`sum (target - output)^2` and `sum target^2` in float64, without entries that are the same infinity in both."""
    mask = ~(target.isinf() & (target == output))
    a, b = torch.where(mask, target, 0.0).double(), torch.where(mask, output, 0.0).double()
    return (a - b).square().sum(), a.square().sum()


def relative_to_energy(error: float, energy: float, floor: float = 0.0) -> float:
    """`error / energy`; values up to `floor` are rounding errors and count as zero, and an error of zero energy as 1."""
    return max(error, 0.0) / energy if energy > floor else float(error > floor)


def output_distance(pairs: Sequence[tuple[Tensor, Tensor]], temperature: float) -> Tensor:
    """How far outputs y are from a teacher's z, differentiable: for classifiers `T^2 / N sum_n KL_n`, else `|y - z|^2 / |z|^2`.

    The pairs are those of `OutputSelector.pairs(teacher's, network's)`.
    """
    pairs = [(target.float(), output.float()) for target, output in pairs]
    if is_classification([target for target, _ in pairs]):
        target, output = pairs[0]
        return class_divergence(target, output, temperature) / len(target) * temperature**2
    error = torch.stack([(output - target).square().sum() for target, output in pairs]).sum()
    return error / torch.stack([target.square().sum() for target, _ in pairs]).sum().clamp(min=1e-12)


class OutputComparison:
    """Compares outputs of two networks batch by batch; error, agreement and divergence follow from its sums."""

    def __init__(self, select: OutputSelector) -> None:
        self.classification = True
        self.images = 0
        self._select = select
        # Squared error, squared norm, images with the same top class, divergence, rows of classifiers' outputs; on the outputs' device.
        self._sums = torch.zeros(5, dtype=torch.float64, device="cpu")

    def add(self, target: Any, output: Any, images: int) -> None:
        """One batch: the dense network's output and the other network's."""
        tensors = self._select.pairs(target, output)
        targets, outputs = [a for a, _ in tensors], [b for _, b in tensors]
        sums = targets[0].new_zeros(5, dtype=torch.float64)
        for a, b in tensors:
            sums[:2] += torch.stack(squared_error(a, b)).to(sums.device)
        self.classification = self.classification and is_classification(targets)
        if self.classification:
            sums[2] = (targets[0].argmax(1) == outputs[0].argmax(1)).sum()
            sums[3] = class_divergence(targets[0].double(), outputs[0].double())
            sums[4] = len(targets[0])  # a video has several rows for each image
        self.images += images
        self._sums = self._sums.to(sums.device) + sums

    def all_reduce(self) -> None:
        """Sum over all processes."""
        *sums, images = distributed.all_reduce_sum(torch.cat([self._sums, self._sums.new_tensor([self.images])]))
        self._sums, self.images = torch.stack(sums), int(images)
        self.classification = self.classification and float(self._sums[4]) > 0  # a process without images does not know

    @property
    def error(self) -> float:
        """The squared relative error of all outputs."""
        missed, norm = self._sums[:2].tolist()
        return relative_to_energy(missed, norm)

    @property
    def squared_error(self) -> float:
        """The squared error of all outputs, summed."""
        return float(self._sums[0])

    @property
    def distance(self) -> float:
        """The divergence of classifiers, the squared relative error of other outputs."""
        return self.error if self.divergence is None else self.divergence

    @property
    def agreement(self) -> float | None:
        """For classifiers, the share of images with the same top class."""
        return float(self._sums[2] / self._sums[4]) if self.classification and self.images else None

    @property
    def divergence(self) -> float | None:
        """For classifiers, the mean Kullback-Leibler divergence from the dense network's softmax, in nats."""
        return max(float(self._sums[3] / self._sums[4]), 0.0) if self.classification and self.images else None


@record
class Fidelity:
    """How close a network's outputs are to those of the dense network on some images.

    `error` is the squared relative error of all outputs. For classifiers, `agreement` is the share of images with the same top class
    and `divergence` the mean Kullback-Leibler divergence from the dense network's softmax, in nats.
    """

    images: int
    error: float
    agreement: float | None
    divergence: float | None
    layer_errors: dict[str, float]  # squared relative error of layers' outputs, each channel about its mean
    synthetic: bool = False  # the images were synthetic

    def __str__(self) -> str:
        agreement = "" if self.agreement is None else f", same top class {100 * self.agreement:.2f} %"
        divergence = "" if self.divergence is None else f", divergence {self.divergence:.4f} nats"
        images = f"{self.images:,} {'synthetic ' * self.synthetic}images"
        return f"outputs on {images}: squared relative error {self.error:.4f}{agreement}{divergence}"


@record
class Recovery:
    """What training on calibration images changed: the distance from the dense network's outputs on held-out images.

    The distance is the divergence of classifiers, in nats, or the squared relative error of other outputs, as `measure` says. If no
    epoch lowered it, the cut network was not changed, and `epoch` is 0.
    """

    images: int  # to train on
    held_out: int
    measure: str
    before: float
    after: float
    epoch: int
    finite: bool = True  # whether the loss was, in all steps

    def __str__(self) -> str:
        unit = " nats" if self.measure == "divergence" else ""
        if self.epoch:
            change = f"{self.measure} on {self.held_out:,} others {self.before:.4f} -> {self.after:.4f}{unit}"
            return f"recovered on {self.images:,} calibration images: {change}, with the weights after epoch {self.epoch}"
        reason = "no epoch lowered it" if self.finite else "the loss was not finite; lower lr"
        value = f"{self.measure} on {self.held_out:,} others stays {self.before:.4f}{unit}"
        return f"not recovered on {self.images:,} calibration images: {value}, as {reason}"


def measure_fidelity(
    before: nn.Module,
    after: nn.Module,
    batches: Iterable[tuple[int, int, Inputs]],
    select: OutputSelector,
    layers: Mapping[str, str] | None = None,
) -> Fidelity:
    """Send the same images through both networks, in evaluation mode, and compare the outputs of the networks and of some layers.

    Args:
        before, after: the dense network and the one made from it.
        batches: the number of the first image, the number of images and the inputs of each batch.
        select: the tensors of the outputs to compare.
        layers: names of layers of the dense network, each with the name of the layer of the other network that has the same output.
    """
    comparison = OutputComparison(select)
    sums: dict[str, Tensor] = {}
    clones = [evaluation_copy(model) for model in (before, after)]
    outputs: dict[tuple[int, str], list[Tensor]] = defaultdict(list)
    for side, (name, other) in product((0, 1), (layers or {}).items()):
        layer = clones[side].get_submodule((name, other)[side])
        layer.register_forward_hook(lambda _layer, _args, output, key=(side, name): outputs[key].append(output.detach().clone()))
    with torch.no_grad():
        for first_image, count, inputs in batches:
            outputs.clear()
            dense, cut = (run_model(clone, inputs, first_image) for clone in clones)
            comparison.add(dense, cut, count)
            for name in layers or ():
                for a, b in zip(outputs[0, name], outputs[1, name], strict=True):
                    total = _channel_sums(a, b, clones[0].get_submodule(name))
                    sums[name] = sums[name] + total if name in sums else total
    layer_errors = {name: _centred_error(total) for name, total in sums.items()}
    return Fidelity(comparison.images, comparison.error, comparison.agreement, comparison.divergence, layer_errors)


def _channel_sums(target: Tensor, output: Tensor, layer: nn.Module) -> Tensor:
    """Per channel: count, sum and sum of squares of the target, sum and sum of squares of the difference: (5, channels)."""
    rows = [(t if isinstance(layer, nn.Linear) or t.ndim < 3 else t.movedim(-3, -1)).flatten(0, -2).double() for t in (target, output)]
    a, d = rows[0], rows[0] - rows[1]
    return torch.stack([torch.full_like(a[0], len(a)), a.sum(0), a.square().sum(0), d.sum(0), d.square().sum(0)])


def _centred_error(sums: Tensor) -> float:
    count, target, target_squares, difference, difference_squares = sums
    variance = float((target_squares - target.square() / count).sum())
    missed = float((difference_squares - difference.square() / count).sum())
    return relative_to_energy(missed, variance, ROUNDING * float(target_squares.sum()))


def checked_score(evaluate: Callable[[nn.Module], float], model: nn.Module, name: str = "evaluate") -> float:
    """The score that a user's function gives a copy of a network in evaluation mode; ValueError unless it is one number."""
    score: Any = evaluate(evaluation_copy(model))
    if isinstance(score, Tensor | np.generic | np.ndarray) and math.prod(score.shape) == 1:
        score = score.item()
    if not isinstance(score, Real) or score != score:
        raise ValueError(f"{name}: found {score!r}, expected a number, higher for better.")
    return float(score)
