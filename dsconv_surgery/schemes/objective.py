"""What a layer should give on data, as a quadratic in its kernel, and the closed form that two schemes have for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

RIDGE, SINGLE_RIDGE = 1e-9, 1e-6  # in float64 and float32: shares of what is solved for, so that nearly parallel parts do not cancel


@dataclass(frozen=True)
class Objective:
    """How far a kernel V is from what a layer should give on data: `E |t - V p|^2 + ridge |V - W|^2`, a quadratic in V.

    With `S = E[p p^T] + ridge` and `B = E[t p^T] + ridge W` it is `tr(V S V^T) - 2 tr(V B^T) + tr(spread)`. Patches p run over
    (in, height, width); groups come first everywhere. Where patches are fewer than a patch is long, S is held as the patches.
    """

    weight: Tensor  # W: (g, o, n)
    cross: Tensor  # B: (g, o, n)
    gram: Tensor  # S: (g, n, n); or rows p / sqrt(count): (g, count, n), of which S is the product with themselves, plus `ridge`
    spread: Tensor  # E[t t^T] + ridge W W^T: (g, o, o)
    ridge: float = 0.0
    rows: bool = False
    centred: bool = False  # p and t are about their means

    @cached_property
    def energy(self) -> float:
        return float(self.spread.diagonal(dim1=1, dim2=2).sum(dtype=torch.float64))

    @property
    def scale(self) -> float:
        """The mean of the second moment's diagonal, in which ridges are given."""
        diagonal = self.gram.square().sum(1) if self.rows else self.gram.diagonal(dim1=1, dim2=2)
        return float(diagonal.mean()) - (0.0 if self.rows else self.ridge)

    @cached_property
    def size(self) -> float:
        """The error that a kernel of norm one makes on average over its directions."""
        return self.scale + self.ridge

    def ridged(self, ridge: float) -> Objective:
        """The same with a pull towards W, on top of what there is."""
        gram = (
            self.gram if self.rows else self.gram + ridge * torch.eye(self.gram.shape[-1], dtype=self.gram.dtype, device=self.gram.device)
        )
        spread = self.spread + ridge * (self.weight @ self.weight.mT)
        return replace(self, gram=gram, cross=self.cross + ridge * self.weight, spread=spread, ridge=self.ridge + ridge)

    def weighted(self, metric: Tensor) -> Objective:
        """The same for `|M (t - V p)|^2`, M being (g, o, o): a kernel V of this one is M^-1 V of the plain one."""
        return replace(
            self, weight=metric @ self.weight, cross=metric @ self.cross, spread=metric.double() @ self.spread @ metric.double().mT
        )

    def product(self, kernels: Tensor) -> Tensor:
        """`kernels @ S` for (g, any, n)."""
        if self.rows:
            return (kernels @ self.gram.mT) @ self.gram + self.ridge * kernels
        return kernels @ self.gram

    def value(self, kernel: Tensor) -> float:
        """The error relative to the energy, for a kernel (g, o, ...)."""
        v = kernel.flatten(2).to(self.cross.dtype)
        off = float((self.product(v) * v).sum(dtype=torch.float64) - 2 * (v * self.cross).sum(dtype=torch.float64)) + self.energy
        return off / self.energy if self.energy > 0 else 0.0

    def target(self) -> Tensor:
        """`W + (B - W S) S^-1`, the kernel of least error: (g, o, n). Where t = W p it is W, however singular S may be."""
        rest = self.cross - self.product(self.weight)
        if float(rest.abs().max()) <= 1e-12 * float(self.cross.abs().max()):
            return self.weight
        tiny = (RIDGE if self.gram.dtype == torch.float64 else SINGLE_RIDGE) * max(self.scale, 1e-30)
        if self.rows:  # (R^T R + a)^-1 = (1 - R^T (R R^T + a)^-1 R) / a
            ridge = self.ridge + tiny
            inner = self.gram @ self.gram.mT
            inner.diagonal(dim1=1, dim2=2).add_(ridge)
            seen = torch.cholesky_solve(self.gram @ rest.mT, torch.linalg.cholesky(inner))
            return self.weight + (rest - seen.mT @ self.gram) / ridge
        gram = self.gram.clone()
        gram.diagonal(dim1=1, dim2=2).add_(tiny)
        return self.weight + torch.cholesky_solve(rest.mT, torch.linalg.cholesky(gram)).mT


def leading_outputs(objective: Objective, count: int) -> tuple[Tensor, Tensor]:
    """The best kernel through few channels: `E R` with E (g, o, r) and R (g, r, n).

    `R = U^T T`, `E = U` for T the kernel of least error and U the leading eigenvectors of `T S T^T` (Zhang et al. 2015).
    """
    target = objective.target()
    leading = torch.linalg.eigh(objective.product(target) @ target.mT)[1][..., -count:].flip(-1)
    return leading, leading.mT @ target
