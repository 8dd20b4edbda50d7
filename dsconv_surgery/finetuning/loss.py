"""The loss of fine-tuning: labels, and the outputs of the dense network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dsconv_surgery.support.fidelity import output_distance
from dsconv_surgery.support.inputs import Inputs, describe_type
from dsconv_surgery.support.outputs import OutputSelector

Loss = Callable[..., Tensor]  # (outputs, *targets) -> the mean over the batch


def cross_entropy(outputs: Any, targets: tuple[Any, ...], select: OutputSelector) -> Tensor:
    """`F.cross_entropy` of class scores, which a user's function may select, and class indices; ValueError for other outputs or labels."""
    problem, source, remedy = None, "the network's output", "Pass "
    if select.function is not None:
        tensors = select(outputs)
        source, outputs = "the result of output=", tensors[0].float() if len(tensors) == 1 else tensors
    if not isinstance(outputs, Tensor):
        problem = f"{source} is {describe_type(outputs)}"
        if select.function is None:
            remedy = "Pass output=, a function from the output to class scores, as in output=lambda result: result.logits. Or pass "
    elif outputs.ndim < 2 or outputs.shape[1] < 2:
        problem = f"{source} has the shape {tuple(outputs.shape)}, without a column for each class"
    elif len(targets) != 1 or not isinstance(targets[0], Tensor):
        problem = f"the labels are {describe_type(targets)}"
    elif targets[0].dtype != torch.long:
        problem = f"the labels are {targets[0].dtype} numbers"
    if problem:
        raise ValueError(
            f"fine_tune: {problem}, but the default loss is cross-entropy of class scores and class indices. {remedy}loss=, a function of "
            "outputs and labels, as in loss=lambda outputs, labels: F.mse_loss(outputs, labels), or leave out the labels and pass teacher=."
        )
    return F.cross_entropy(outputs, targets[0])


class DistillationLoss:
    """The loss `(1 - d) labels + d teacher` of a batch.

    For outputs y of the network and z of the teacher, `teacher` is `T^2 / N sum_n KL(softmax(z_n / T) | softmax(y_n / T))` where both
    are (N images, classes) (Hinton et al. 2015), and `|y - z|^2 / |z|^2` for outputs of other shapes. d is 0 without a teacher and 1
    without labels. The loss of the labels is cross-entropy by default.
    """

    def __init__(self, teacher: nn.Module | None, loss: Loss | None, distill: float, temperature: float, select: OutputSelector) -> None:
        self.teacher, self._loss = teacher, loss
        self._distill, self._temperature, self._select = distill, temperature, select

    def teacher_outputs(self, inputs: Inputs) -> Any:
        """The teacher's outputs without gradients; None without a teacher."""
        with torch.no_grad():
            return None if self.teacher is None else self.teacher(*inputs.args, **inputs.kwargs)

    def __call__(self, outputs: Any, teacher_outputs: Any, targets: tuple[Any, ...], k: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and "labels" and "teacher" before they are weighted; `targets` and `k` as `mix_images` returns them."""
        parts: dict[str, Tensor] = {}
        share = 0.0 if self.teacher is None else self._distill if targets else 1.0
        if share < 1:
            count = len(targets) if k == 1 else len(targets) // 2
            parts["labels"] = k * self._labels_loss(outputs, targets[:count])
            if count < len(targets):
                parts["labels"] = parts["labels"] + (1 - k) * self._labels_loss(outputs, targets[count:])
        if self.teacher is not None:
            try:
                pairs = self._select.pairs(teacher_outputs, outputs)
            except ValueError as error:
                raise ValueError(
                    f"{error} Pass the network that was cut as teacher=, and switch off outputs that exist in training only (aux_logits)."
                ) from error
            parts["teacher"] = output_distance(pairs, self._temperature)
        weights = {"labels": 1 - share, "teacher": share}
        total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        return total, {name: part.detach() for name, part in parts.items()}

    def _labels_loss(self, outputs: Any, targets: tuple[Any, ...]) -> Tensor:
        outputs = pytree.tree_map_only(Tensor, Tensor.float, outputs)
        result = cross_entropy(outputs, targets, self._select) if self._loss is None else self._loss(outputs, *targets)
        if not isinstance(result, Tensor) or result.numel() != 1:
            kind = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"fine_tune: loss gave {kind}, expected a tensor of one number, the mean over the batch.")
        return result.reshape(())
