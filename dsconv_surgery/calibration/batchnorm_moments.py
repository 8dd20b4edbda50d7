"""How far images are from those that a network was trained on: the inputs of its BatchNorms against their running statistics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from dsconv_surgery.support import distributed
from dsconv_surgery.support.copies import evaluation_copy, model_device, run_model
from dsconv_surgery.support.formatting import as_sentence
from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.random_state import seeded

SLACK = 1e-3  # share of the mean variance that is added to the variance of every channel, as dead channels have none


class _Stop(Exception):  # noqa: N818
    """No error: ends a forward pass early."""


class BatchNormMoments:
    """Observes the inputs x of a network's BatchNorms, as z = (x - running mean) / running standard deviation.

    On the training images, z has mean 0 and variance 1 in every channel. BatchNorms with initial statistics are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = evaluation_copy(model).requires_grad_(False)
        self._norms = {name: norm for name, norm in self._model.named_modules() if isinstance(norm, _BatchNorm) and _is_trained(norm)}
        self._images, self._only_first = 0, False
        self._calls: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for name, norm in self._norms.items():
            norm.register_forward_pre_hook(lambda norm, args, name=name: self._observe(name, norm, args[0]))

    def __bool__(self) -> bool:
        """Whether the network has BatchNorm statistics."""
        return bool(self._norms)

    def _observe(self, name: str, norm: Any, x: Tensor) -> None:
        x = x.float()
        shape = (1, -1, *(1,) * (x.ndim - 2))
        z = (x - norm.running_mean.float().view(shape)) / _scale(norm).view(shape)
        each = [(t if t.ndim == 2 else t.flatten(2).mean(2)).cpu() for t in (z, z * z)]
        if len(x) != self._images:  # rows are not images: all images share the mean
            each = [t.mean(0).expand(self._images, -1) for t in each]
        self._calls[name].append((each[0], each[1]))
        if self._only_first:
            raise _Stop

    def run(self, inputs: Inputs, count: int, only_first: bool = False, differentiable: bool = False) -> dict[str, tuple[Tensor, Tensor]]:
        """The mean of z and of z^2 for each image, at each BatchNorm, in running order: two tensors (count, channels).

        Args:
            inputs: the images as the network takes them.
            count: the number of images.
            only_first: stop at the first BatchNorm.
            differentiable: let gradients flow to the images.
        """
        self._images, self._only_first = count, only_first
        self._calls.clear()
        try:
            if differentiable:
                values = pytree.tree_map_only(Tensor, lambda t: t.to(model_device(self._model), copy=True), inputs)
                with seeded(0):
                    self._model(*values.args, **values.kwargs)
            else:
                with torch.no_grad():
                    run_model(self._model, inputs)
        except _Stop:
            return self._averages()
        except Exception as error:
            raise ValueError(f"the model does not run on {inputs}: {as_sentence(error)} Pass inputs as the model takes them.") from error
        return self._averages()

    def _averages(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (_mean([m for m, _ in calls]), _mean([s for _, s in calls])) for name, calls in self._calls.items()}

    def distance(self, batches: Iterable[tuple[int, Inputs]]) -> float:
        """`mean_distance` for images in batches, (number of images, inputs), of all processes together."""
        total, sums, zero = 0, dict[str, Tensor](), torch.zeros((), device="cpu")
        for count, inputs in batches:
            total += count
            for name, moments in self.run(inputs, count).items():
                sums[name] = sums.get(name, zero) + torch.stack(moments).sum(1, dtype=torch.float64)
        total = int(distributed.all_reduce_sum(torch.tensor(total, device="cpu")))
        sums = {name: distributed.all_reduce_sum(value) for name, value in sums.items()}
        return float(self.mean_distance({name: (value[0] / total, value[1] / total) for name, value in sums.items()}))

    def mean_distance(self, moments: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """The divergence `KL(N(m, s^2) | N(0, 1)) = (s^2 - 1 - log s^2 + m^2) / 2` of a channel, in nats, on the mean.

        Args:
            moments: the mean of z and of z^2 over all images, for each BatchNorm: (channels,).
        """
        return torch.stack([self._distance(name, *moment) for name, moment in moments.items()]).mean()

    def _distance(self, name: str, mean: Tensor, square: Tensor) -> Tensor:
        norm: Any = self._norms[name]
        slack = 1 - norm.running_var.double().cpu() / _scale(norm).double().cpu().square()
        variance = (square.double() - mean.double().square()).clamp(min=0) + slack
        return (variance - 1 - variance.log() + mean.double().square()).mean() / 2


def _mean(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).mean(0)


def _scale(norm: Any) -> Tensor:
    """The running standard deviation, of at least a small share of the mean over channels: (channels,)."""
    variance = norm.running_var.float()
    return (variance + norm.eps + SLACK * variance.mean()).sqrt()


def _is_trained(norm: Any) -> bool:
    """Whether there are running statistics, and other ones than initially."""
    if norm.running_mean is None or norm.running_var is None:
        return False
    return bool((norm.running_mean != 0).any() or (norm.running_var != 1).any())
