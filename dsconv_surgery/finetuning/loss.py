"""What a network being fine-tuned learns from: labels, the dense network's outputs, and the outputs of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dsconv_surgery.support.fidelity import class_divergence

Loss = Callable[..., Tensor]  # (outputs, *targets) -> a mean over the batch


def cut_layers(model: nn.Module, teacher: nn.Module) -> list[str]:
    """Names under which the dense network has a convolution or linear layer and the other a chain in its place."""
    chains = {name for name, module in model.named_modules() if type(module) is nn.Sequential}
    return [name for name, layer in teacher.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear) and name in chains]


def blocks_of(model: nn.Module, teacher: nn.Module) -> list[str]:
    """The modules around cut layers that both networks have under one name, of one type: where their outputs are to agree."""
    found: dict[str, None] = {}
    for name in cut_layers(model, teacher):
        block = name.rpartition(".")[0]
        if block and type(model.get_submodule(block)) is type(teacher.get_submodule(block)):
            found[block] = None
    return list(found)


class DistillationLoss:
    """The loss `(1 - d) labels + d teacher + f features` of a batch.

    `teacher` is `T^2 KL(softmax(z / T) | softmax(y / T))` for outputs y and the dense network's z, both (images, classes) (Hinton et
    al. 2015), and `|y - z|^2 / |z|^2` for outputs of other shapes; `features` the mean over blocks of `|u - v|^2 / |v|^2` for a block's
    output u and the dense network's v (FitNets, Romero et al. 2015). What is not there - labels, a teacher - takes no part.

    Args:
        model: the network in training.
        teacher: the dense one, in evaluation mode; or None.
        loss: of labels.
        share: d in [0, 1], where there are both labels and a teacher.
        temperature: T.
        features: f.
    """

    def __init__(
        self, model: nn.Module, teacher: nn.Module | None, loss: Loss | None, share: float, temperature: float, features: float
    ) -> None:
        self._model, self.teacher, self._loss = model, teacher, loss or F.cross_entropy
        self._share, self._temperature, self._features = share, temperature, features
        self.blocks = blocks_of(model, teacher) if teacher is not None and features > 0 else []
        self._seen: list[dict[str, Any]] = [{}, {}]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Blocks' outputs are noted for as long as this lasts."""
        with ExitStack() as hooks:
            networks = () if self.teacher is None else (self._model, self.teacher)
            for seen, model in zip(self._seen, networks, strict=False):
                for name in self.blocks:

                    def note(_module: nn.Module, _args: Any, output: Any, name: str = name, seen: dict[str, Any] = seen) -> None:
                        seen[name] = output

                    hooks.callback(model.get_submodule(name).register_forward_hook(note).remove)
            yield

    def wanted(self, inputs: tuple[Any, ...]) -> Any:
        """The dense network's outputs, if there is one."""
        if self.teacher is None:
            return None
        with torch.no_grad():
            return self.teacher(*inputs)

    def __call__(self, outputs: Any, wanted: Any, targets: tuple[Any, ...], kept: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its parts by name, before they are weighted; targets of `mixed` batches have those mixed in after them."""
        parts: dict[str, Tensor] = {}
        share = 0.0 if self.teacher is None else self._share if targets else 1.0
        if share < 1:
            given = pytree.tree_map_only(Tensor, Tensor.float, outputs)
            half = len(targets) if kept == 1 else len(targets) // 2
            parts["labels"] = kept * self._of_labels(given, targets[:half])
            if half < len(targets):
                parts["labels"] = parts["labels"] + (1 - kept) * self._of_labels(given, targets[half:])
        if self.teacher is not None:
            parts["teacher"] = self._apart(outputs, wanted)
            if self.blocks:
                mine, its = (list(seen.values()) for seen in self._seen)
                parts["features"] = torch.stack([_relative_error(u, v) for u, v in zip(mine, its, strict=True)]).mean()
                for seen in self._seen:
                    seen.clear()
        weights = {"labels": 1 - share, "teacher": share, "features": self._features}
        total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        return total, {name: part.detach() for name, part in parts.items()}

    def _of_labels(self, outputs: Any, targets: tuple[Any, ...]) -> Tensor:
        found = self._loss(outputs, *targets)
        if not isinstance(found, Tensor) or found.numel() != 1:
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"fine_tune: loss gave {what}, expected a tensor of one number, the mean over the batch.")
        return found.reshape(())

    def _apart(self, outputs: Any, wanted: Any) -> Tensor:
        given, its = pytree.tree_leaves(outputs), pytree.tree_leaves(wanted)
        shapes = [[tuple(t.shape) for t in tensors if isinstance(t, Tensor)] for tensors in (given, its)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"fine_tune: the network gives {shapes[0]} and the teacher {shapes[1]}, expected tensors of the same shapes: the network "
                "that was cut, as teacher. Outputs that a network has in training only (aux_logits) are to be switched off."
            )
        if len(given) == len(its) == 1 and given[0].ndim == 2 and given[0].shape[1] > 1:
            divergence = class_divergence(its[0].float(), given[0].float(), self._temperature)
            return divergence / len(its[0]) * self._temperature**2
        return _relative_error(outputs, wanted)


def _relative_error(given: Any, wanted: Any) -> Tensor:
    """`|given - wanted|^2 / |wanted|^2` over all numbers of a batch."""
    pairs = [
        (a.float(), b.float())
        for a, b in zip(pytree.tree_leaves(given), pytree.tree_leaves(wanted), strict=True)
        if isinstance(a, Tensor) and a.is_floating_point()
    ]
    missed = torch.stack([(a - b).square().sum() for a, b in pairs]).sum()
    return missed / torch.stack([b.square().sum() for _, b in pairs]).sum().clamp(min=1e-12)
