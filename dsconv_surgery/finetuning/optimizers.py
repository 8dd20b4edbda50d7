"""What an optimizer step of factored layers is made of: learning rates, their schedule, and decay of products."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from pytorch_optimizer import SOAP
from torch import Tensor, nn

from dsconv_surgery.plan import Plan
from dsconv_surgery.schemes import get_scheme, links_of

SCALING = 0.0  # learning rates grow with this power of a weight's root mean square
Optimizers = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]  # groups of parameters, each with its "lr" -> an optimizer
OPTIMIZERS: dict[str, Optimizers] = {
    # Adam in the eigenbasis of a weight's second moments, row by row and column by column (Vyas et al. 2024), up to so many of them
    "soap": partial(SOAP, betas=(0.9, 0.99), shampoo_beta=0.95, weight_decay=0.0, max_precondition_dim=1024),
    "adamw": partial(torch.optim.AdamW, weight_decay=0.0),
}
Product = tuple[Callable[[], Tensor], list[Tensor]]  # gives a kernel, and the weights that it is made of


def products(model: nn.Module, plan: Plan) -> list[Product]:
    """Of every chain the product of its links, of every other convolution and linear layer its own weight, where they are trained."""
    found: list[Product] = []
    inside: set[int] = set()
    for cut in plan.cuts:
        if not links_of(cut.chain, model.get_submodule(cut.name)):
            raise ValueError(
                f"{cut.name}: not cut as the plan says, to {cut.scheme!r} at rank {cut.rank}. Pass the plan that came with it."
            )
        links = dict(model.get_submodule(cut.name).named_children())
        weights = {name: link.get_parameter("weight") for name, link in links.items()}
        scheme, block, groups = get_scheme(cut.scheme), replace(cut.spec.one_group(), bias=False), cut.spec.groups

        def product(weights: Any = weights, scheme: Any = scheme, block: Any = block, groups: int = groups) -> Tensor:
            factors = {name: w.reshape(groups, -1, *w.shape[1:], *(1,) * (4 - w.ndim)) for name, w in weights.items()}
            return scheme.kernel(block, factors)

        found.append((product, list(weights.values())))
        inside |= {id(w) for w in weights.values()}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Conv2d | nn.Linear) and isinstance(weight, Tensor) and weight.requires_grad and id(weight) not in inside:
            found.append((partial(torch.Tensor.view_as, weight, weight), [weight]))
    return [(product, its) for product, its in found if all(w.requires_grad for w in its)]


def decay(kernels: Sequence[Product], amount: float) -> None:
    """A step of this size against the gradient of `|V|^2 / 2`, summed over kernels V, for the factors (Khodak et al. 2021)."""
    weights = list({id(w): w for _, its in kernels for w in its}.values())
    with torch.enable_grad():
        norm = torch.stack([product().square().sum() for product, _ in kernels]).sum() / 2
    with torch.no_grad():
        for weight, gradient in zip(weights, torch.autograd.grad(norm, weights), strict=True):
            weight.sub_(gradient, alpha=amount)


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """The learning rate's share of its highest, linear up and then down along half a cosine."""
    up = round(warmup * steps)
    if step < up:
        return (step + 1) / up
    return 0.5 * (1 + math.cos(math.pi * (step - up) / max(1, steps - up)))


def by_rate(trained: Sequence[Tensor], lr: float) -> list[dict[str, Any]]:
    """Parameters by their learning rate, which may grow with their size, in steps of two."""
    sizes = [float(p.detach().float().square().mean().sqrt()) if p.ndim > 1 else 0.0 for p in trained]
    usual = math.exp(np.mean([math.log(size) for size in sizes if size > 0] or [0.0]))
    groups: dict[int, list[Tensor]] = {}
    for parameter, size in zip(trained, sizes, strict=True):
        groups.setdefault(round(SCALING * math.log2(size / usual)) if size > 0 else 0, []).append(parameter)
    return [{"params": its, "lr": lr * 2.0**power} for power, its in groups.items()]
