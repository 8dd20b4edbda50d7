"""Optimizers for factored layers, and the schedule of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

MakeOptimizer = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]  # (parameters, learning rate) -> an optimizer


def soap(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Adam in the eigenbasis of each weight's row and column second moments, up to 1,024 rows or columns (Vyas et al. 2024)."""
    from pytorch_optimizer import SOAP

    return SOAP(parameters, lr=lr, betas=(0.9, 0.99), shampoo_beta=0.95, weight_decay=0.0, max_precondition_dim=1024)


OPTIMIZERS: dict[str, MakeOptimizer] = {"soap": soap, "adamw": partial(torch.optim.AdamW, weight_decay=0.0)}


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """The learning rate divided by its highest value: it rises linearly in the warm-up, then falls along half a cosine."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
