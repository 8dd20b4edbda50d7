"""The loss of fine-tuning: labels, and the outputs of the dense network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dsconv_surgery.support.fidelity import output_distance

Loss = Callable[..., Tensor]  # (outputs, *targets) -> the mean over the batch


class DistillationLoss:
    """The loss `(1 - d) labels + d teacher` of a batch.

    For outputs y of the network and z of the teacher, `teacher` is `T^2 / N sum_n KL(softmax(z_n / T) | softmax(y_n / T))` where both
    are (N images, classes) (Hinton et al. 2015), and `|y - z|^2 / |z|^2` for outputs of other shapes. d is 0 without a teacher and 1
    without labels. The loss of the labels is cross-entropy by default.
    """

    def __init__(self, teacher: nn.Module | None, loss: Loss | None, share: float, temperature: float) -> None:
        self.teacher, self._loss = teacher, loss or F.cross_entropy
        self._share, self._temperature = share, temperature

    def teacher_outputs(self, inputs: tuple[Any, ...]) -> Any:
        """The teacher's outputs without gradients; None without a teacher."""
        with torch.no_grad():
            return None if self.teacher is None else self.teacher(*inputs)

    def __call__(self, outputs: Any, teacher_outputs: Any, targets: tuple[Any, ...], k: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and "labels" and "teacher" before they are weighted; `targets` and `k` as `mix_images` returns them."""
        parts: dict[str, Tensor] = {}
        share = 0.0 if self.teacher is None else self._share if targets else 1.0
        if share < 1:
            count = len(targets) if k == 1 else len(targets) // 2
            parts["labels"] = k * self._labels_loss(outputs, targets[:count])
            if count < len(targets):
                parts["labels"] = parts["labels"] + (1 - k) * self._labels_loss(outputs, targets[count:])
        if self.teacher is not None:
            parts["teacher"] = output_distance(teacher_outputs, outputs, self._temperature)
        weights = {"labels": 1 - share, "teacher": share}
        total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        return total, {name: part.detach() for name, part in parts.items()}

    def _labels_loss(self, outputs: Any, targets: tuple[Any, ...]) -> Tensor:
        result = self._loss(pytree.tree_map_only(Tensor, Tensor.float, outputs), *targets)
        if not isinstance(result, Tensor) or result.numel() != 1:
            kind = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"fine_tune: loss gave {kind}, expected a tensor of one number, the mean over the batch.")
        return result.reshape(())
