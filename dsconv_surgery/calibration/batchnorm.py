"""BatchNorm statistics: of a cut network, estimated anew where held-out calibration images are the better for it; over all processes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dsconv_surgery.calibration.images import MIN_TO_HOLD_OUT, Images, held_out
from dsconv_surgery.support import distributed
from dsconv_surgery.support.copies import model_device, run_model, to_device
from dsconv_surgery.support.fidelity import OutputComparison


def reestimate_batchnorm(dense: nn.Module, cut: nn.Module, images: Images, always: bool = False) -> bool:
    """Estimate the running statistics of a cut network's BatchNorms from calibration images, if that brings it nearer to the dense one.

    Estimated on three images of four, judged on the fourth: by the squared error of the outputs. After a fit to data this is
    seldom of use, for the fit has brought the outputs where they were already.

    Args:
        dense: in evaluation mode.
        cut: its running statistics are replaced, or left alone.
        always: replace them without asking.

    Returns:
        Whether they were replaced.
    """
    trial: Any = copy.deepcopy(cut)
    norms = {name: module for name, module in trial.named_modules() if isinstance(module, _BatchNorm) and module.running_mean is not None}
    if not norms or images.count < MIN_TO_HOLD_OUT:
        return False
    with collecting_statistics(trial), torch.no_grad():
        for first, inputs in images:
            fit = ~held_out(first, inputs[0].shape[0])
            if int(fit.sum()) > 1:
                trial(*to_device(_some(inputs, fit), model_device(dense)))
    counted: Any
    for counted in norms.values():  # of this process's part of the images, weighted by batches
        share = distributed.all_reduce_sum(counted.num_batches_tracked.double())
        for value in (counted.running_mean, counted.running_var):
            value.copy_(distributed.all_reduce_sum(value * counted.num_batches_tracked) / share)
    if not always:
        as_it_is, anew = _held_out_errors(dense, (copy.deepcopy(cut).eval(), trial), images)
        if anew >= as_it_is:
            return False
    for name, norm in norms.items():
        its: Any = cut.get_submodule(name)
        its.running_mean.copy_(norm.running_mean)
        its.running_var.copy_(norm.running_var)
    return True


@contextmanager
def collecting_statistics(model: nn.Module) -> Iterator[None]:
    """Statistics of BatchNorms become the plain mean over the batches seen for as long as this lasts, in evaluation mode."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]
    kept = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
        norm.train()
    try:
        yield
    finally:
        model.eval()
        for norm, momentum in zip(norms, kept, strict=True):
            norm.momentum = momentum


@contextmanager
def over_ranks(counts: bool) -> Iterator[None]:
    """BatchNorms in training mode normalise by the whole batch, not by this process's share of it, for as long as this lasts.

    As nn.SyncBatchNorm does, which is for CUDA only. `F.batch_norm` itself is replaced: what runs the forward pass again in the backward
    pass (activation checkpointing) has to find the same, and modes of torch are not on there.

    Args:
        counts: whether this process's share is part of the batch, rather than there to keep step.
    """
    plain = F.batch_norm

    def batch_norm(
        input: Tensor,  # noqa: A002 - torch's names
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return plain(input, running_mean, running_var, weight, bias, training, momentum, eps)
        where, shape = [0, *range(2, input.ndim)], (1, -1, *[1] * (input.ndim - 2))
        x = input if input.dtype == torch.float64 else input.float()
        count = distributed.all_reduce_sum(x.new_tensor(counts * x.numel() / x.shape[1]))
        if count <= 1:
            raise ValueError(f"BatchNorm: expected more than 1 value per channel in training, found input of shape {tuple(input.shape)}.")
        mean = distributed.all_reduce_sum_with_gradient(counts * x.sum(where)) / count
        centred = x - mean.reshape(shape)
        variance = distributed.all_reduce_sum_with_gradient(counts * centred.square().sum(where)) / count
        with torch.no_grad():
            for running, now in ((running_mean, mean), (running_var, variance * count / (count - 1))):
                if running is not None:
                    running.lerp_(now.to(running), momentum)
        scaled = centred * (variance + eps).rsqrt().reshape(shape)
        scaled = scaled if weight is None else scaled * weight.reshape(shape)
        return (scaled if bias is None else scaled + bias.reshape(shape)).to(input.dtype)

    F.batch_norm = batch_norm
    try:
        yield
    finally:
        F.batch_norm = plain


def _some(inputs: tuple[Any, ...], mask: Tensor) -> tuple[Any, ...]:
    return tuple(t[mask.to(t.device)] for t in inputs)


def _held_out_errors(dense: nn.Module, cuts: Sequence[nn.Module], images: Images) -> list[float]:
    """The squared error of each cut network's outputs on held-out images."""
    comparisons = [OutputComparison() for _ in cuts]
    with torch.no_grad():
        for first, inputs in images:
            held = held_out(first, inputs[0].shape[0])
            if bool(held.any()):
                selected = _some(inputs, held)
                target = run_model(dense, selected)
                for cut, comparison in zip(cuts, comparisons, strict=True):
                    comparison.add(target, run_model(cut, selected), int(held.sum()))
    for comparison in comparisons:
        comparison.all_reduce()
    return [comparison.squared_error for comparison in comparisons]
