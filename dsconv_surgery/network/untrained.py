"""Signs that a network was never trained: BatchNorms or weights as torch initialises them."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dsconv_surgery.network.layers import is_layer, is_plain_tensor
from dsconv_surgery.support.user_warning import warn_user

FULL_SHARE, SPREAD = 0.98, 0.05  # how close the largest weight is to the bound of the draw, and its spread to that of a uniform one
ENOUGH = 200  # weights; fewer may look uniform by chance


def warn_if_untrained(model: nn.Module) -> None:
    """Warn if the weights of a network look as they were initialised."""
    if reason := untrained_reason(model):
        warn_user(
            f"the network's weights look untrained: {reason}. Errors and ranks for random weights say nothing about trained ones. Load the "
            "trained weights first.",
        )


@torch.no_grad()
def untrained_reason(model: nn.Module) -> str | None:
    """Why a network looks untrained, or None: all BatchNorms have initial statistics, or all layers initial weights."""
    pairs = [(norm.running_mean, norm.running_var) for norm in model.modules() if isinstance(norm, _BatchNorm)]
    norms = [(mean, variance) for mean, variance in pairs if mean is not None and variance is not None and not mean.is_meta]
    if norms:
        initial = all(not bool(mean.any()) and bool(torch.all(variance == 1)) for mean, variance in norms)
        return f"the statistics of its {len(norms)} BatchNorms are all mean 0 and variance 1" if initial else None
    weights = [layer._parameters.get("weight") for layer in model.modules() if is_layer(layer)]
    tensors = [w for w in weights if w is not None and is_plain_tensor(w) and w.is_floating_point() and not w.is_meta]
    tensors = [tensor for tensor in tensors if tensor.numel() >= ENOUGH]
    if tensors and all(map(_is_initial, tensors)):
        return "its weights are spread as torch draws them for a new layer"
    return None


def _is_initial(weight: torch.Tensor) -> bool:
    """Whether weights are uniform in `+-1 / sqrt(fan in)`, as those of new convolutions and linear layers."""
    values = weight.double() * math.sqrt(weight[0].numel())
    largest, spread = float(values.abs().max()), float(values.std()) * math.sqrt(3)
    return FULL_SHARE <= largest <= 1 + 1e-3 and abs(spread - 1) < SPREAD
