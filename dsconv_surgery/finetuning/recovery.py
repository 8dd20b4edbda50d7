"""Recovery: train a cut network towards the dense network's layers and outputs on the calibration images; held-out images judge."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dsconv_surgery.calibration.images import HELD_OUT_EVERY, MIN_TO_HOLD_OUT, Images, held_out
from dsconv_surgery.calibration.side_by_side import network_pair
from dsconv_surgery.finetuning.fine_tune import fine_tune
from dsconv_surgery.finetuning.history import History
from dsconv_surgery.finetuning.settings import FineTune
from dsconv_surgery.plan import Plan
from dsconv_surgery.support import distributed
from dsconv_surgery.support.copies import evaluation_copy, run_model
from dsconv_surgery.support.fidelity import OutputComparison, Recovery
from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.outputs import OutputSelector, output_tensors

RECOVERY = FineTune(epochs=10, accumulate=4)  # of recover=True
BATCH = 16  # images; few, so that a step's batches mix images from many places in the user's batches


def recovery_settings(recover: bool | FineTune, images: Images | None, model: nn.Module) -> FineTune | None:
    """The settings that the argument `recover=` stands for, None for False; ValueError or TypeError where recovery is impossible."""
    if not isinstance(recover, bool | FineTune):
        raise TypeError(f"recover: found {type(recover).__name__}, expected True, False or FineTune(...).")
    if recover is False:
        return None
    if images is None:
        raise ValueError("recover: the cut network is trained on calibration images, and there are none. Pass calibration=batches.")
    if images.count < MIN_TO_HOLD_OUT:
        raise ValueError(
            f"recover: found {images.count} calibration images, expected at least {MIN_TO_HOLD_OUT}: one image of {HELD_OUT_EVERY} is held "
            "out to decide whether training helps. Pass more images, or leave out recover."
        )
    if distributed.several_processes():
        raise ValueError("recover: found several processes, expected one. Compress in one process, or leave out recover and fine_tune.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("recover: no parameter of the model requires a gradient. Call model.requires_grad_() first.")
    return RECOVERY if recover is True else recover


@dataclass(frozen=True)
class HeldOut:
    """Images that no factor was fitted to, the dense network, and its outputs for them."""

    dense: nn.Module  # in evaluation mode
    images: Images  # all of them
    parts: list[tuple[int, int, Inputs]]  # the number of the first image, the number of images, and the inputs
    targets: list[Any]

    @classmethod
    def split(cls, model: nn.Module, images: Images, example: Inputs) -> tuple[Images, HeldOut]:
        """The images to train on, and every fourth image, held out; both in memory."""
        training: list[Inputs] = []
        parts: list[tuple[int, int, Inputs]] = []
        for first_image, count, inputs in images:
            mask = held_out(first_image, count)
            if not mask.all():
                training.append(images.structure.select(inputs, ~mask))
            if mask.any():
                parts.append((first_image, int(mask.sum()), images.structure.select(inputs, mask)))
        dense = evaluation_copy(model)
        with torch.no_grad():
            targets = [run_model(dense, inputs, first_image) for first_image, _, inputs in parts]
        settings = replace(images.settings, batches=training)
        return Images(settings, example, output=images.select_outputs.function), cls(dense, images, parts, targets)

    @torch.no_grad()
    def compare(self, network: nn.Module) -> OutputComparison:
        """The outputs of a network in evaluation mode, compared with those of the dense one."""
        comparison = OutputComparison(self.images.select_outputs)
        for (first_image, count, inputs), target in zip(self.parts, self.targets, strict=True):
            comparison.add(target, run_model(network, inputs, first_image), count)
        return comparison

    def score(self, network: nn.Module) -> float:
        """The negative distance from the dense network's outputs, a finite number."""
        distance = self.compare(network).distance
        return -distance if math.isfinite(distance) else -sys.float_info.max


def recover_cut(
    cut: nn.Module, plan: Plan, training: Images, held: HeldOut, settings: FineTune, progress: bool | None
) -> tuple[nn.Module | None, History | None, Recovery]:
    """Train a cut network in place, without labels, towards the dense network; held-out images choose the epoch.

    Minimises `sum_l |y_l - z_l|^2 / |z_l|^2` with equal weights over the network's output and the outputs of the cut layers (behind
    their BatchNorms), y of the cut network and z of the dense one (hints, Romero et al. 2015).

    After each epoch, outputs on the held-out images are compared with the dense network's: by divergence for classifiers, by squared
    relative error for other outputs.

    Returns:
        the network with the weights of the best epoch, None if no epoch was better than the cut; the history, None if the loss was not
        finite; and the distances.
    """
    before = held.compare(evaluation_copy(cut))
    batches, select = _ShuffledBatches(training), training.select_outputs
    layers = _observed_layers(held.dense, plan, training)
    teacher, student = (_WithLayers(network, names, select) for network, names in zip((held.dense, cut), layers, strict=True))
    with torch.no_grad():
        first_image, _, inputs = next(iter(training))
        tensors = run_model(teacher, inputs, first_image)
    if len(tensors) > 1:  # without layers, the loss of class scores is their divergence, which a factor would change
        student.scales = teacher.scales = [_inverse_norm(tensor) for tensor in tensors]
    history = None
    with suppress(FloatingPointError):
        options: dict[str, Any] = {"inputs": batches.inputs, "progress": progress, "settings": settings}
        history = fine_tune(student, batches, teacher=teacher, validate=lambda copy: held.score(copy.get_submodule("network")), **options)
    measure = "squared relative error" if before.divergence is None else "divergence"
    counts = training.count, before.images, measure, before.distance
    best = history.best if history else None
    if history is None or best is None or not -(best.score or 0.0) < before.distance:
        return None, history, Recovery(*counts, before.distance, 0, history is not None)
    student.load_state_dict(history.weights["best"])
    return cut, history, Recovery(*counts, -(best.score or 0.0), best.epoch)


def _observed_layers(model: nn.Module, plan: Plan, images: Images) -> tuple[list[str], list[str]]:
    """For each cut, the BatchNorm after it, or else the layer itself in the dense network and the chain's last link in the other."""
    with closing(network_pair(model, images, [cut.name for cut in plan.cuts])) as pair:
        norms = [pair.following[cut.name].batchnorm for cut in plan.cuts]
    links = [f"{cut.name}.{list(cut.chain)[-1]}".removeprefix(".") for cut in plan.cuts]
    names = [cut.name for cut in plan.cuts]
    dense, cut = ([norm or name for norm, name in zip(norms, group, strict=True)] for group in (names, links))
    return dense, cut


def _inverse_norm(tensor: Tensor) -> float:
    norm = float(tensor.double().square().sum().sqrt())
    return 1 / norm if 0 < norm < math.inf else 1.0


class _WithLayers(nn.Module):
    """A network that returns the outputs of some layers in running order, and then its own, each times a number."""

    def __init__(self, network: nn.Module, layers: list[str], select: OutputSelector) -> None:
        super().__init__()
        self.network, self.layers = network, layers
        self.select: Callable[[Any], list[Tensor]] = lambda output: select(output)  # a function, which copies of the module share
        self.scales: list[float] = []

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        scales, results = iter(self.scales), list[Tensor]()

        def collect(tensors: list[Tensor]) -> None:
            results.extend(tensor * next(scales, 1.0) for tensor in tensors)  # a copy: the network may change its values in place

        modules = [self.network.get_submodule(name) for name in self.layers]
        handles = [module.register_forward_hook(lambda _m, _args, output: collect(output_tensors(output))) for module in modules]
        try:
            output = self.network(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        collect(self.select(output))
        return results


class _ShuffledBatches:
    """Images in batches of a few, drawn in another order in each epoch; `fine_tune` seeds torch for it."""

    def __init__(self, images: Images) -> None:
        self._structure = images.structure
        self._parts = [(count, inputs) for _, count, inputs in images]
        first = self._parts[0][1]
        self.inputs = 1 if first.kwargs else len(first.args)

    def __len__(self) -> int:
        return sum(-(-count // BATCH) for count, _ in self._parts)

    def __iter__(self) -> Iterator[Any]:
        batches: list[tuple[Inputs, Tensor]] = []
        for count, part in self._parts:
            order = torch.randperm(count, device="cpu")
            batches += [(part, rows) for rows in order.tensor_split(-(-count // BATCH))]
        for index in torch.randperm(len(batches), device="cpu").tolist():
            part, rows = batches[index]
            inputs = self._structure.select(part, rows)
            yield (inputs,) if inputs.kwargs else inputs.args
