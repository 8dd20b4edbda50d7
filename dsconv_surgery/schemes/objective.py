"""The output error of a layer on data as a quadratic function of its kernel, and its closed-form minimum for two schemes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError as LinAlgError  # type: ignore[attr-defined]

from dsconv_surgery.support.fidelity import relative_to_energy

# Ridges in float64 and float32, as shares of the quantity that is solved for: nearly parallel terms do not cancel each other.
RIDGE, SINGLE_RIDGE = 1e-9, 1e-6
RIDGE_GROWTH, RIDGE_TRIES = 1e3, 6  # a ridge grows until rounding errors leave the matrix positive definite


@dataclass(frozen=True)
class Objective:
    """The error of a kernel V against the target outputs of a layer: `E |t - V p|^2 + ridge |V - W|^2`, a quadratic in V.

    With `S = E[p p^T] + ridge` and `B = E[t p^T] + ridge W` it is `tr(V S V^T) - 2 tr(V B^T) + tr(spread)`. Patches p have
    n = in x height x width entries; groups are the first dimension. If there are fewer patches than n, S is stored as the patches.
    """

    weight: Tensor  # W: (g, o, n)
    cross: Tensor  # B: (g, o, n)
    gram: Tensor  # S: (g, n, n); with `rows`, R = p / sqrt(count): (g, count, n), where S = R^T R + ridge
    spread: Tensor  # E[t t^T] + ridge W W^T: (g, o, o)
    ridge: float = 0.0
    rows: bool = False
    centred: bool = False  # whether the means of p and t were subtracted
    floor: float = 0.0  # energies and errors up to this are rounding errors of p and t
    whitened: dict[tuple[int, ...], Any] = field(init=False, repr=False, compare=False, default_factory=dict)  # kept by `Whitening`

    @cached_property
    def energy(self) -> float:
        """The mean squared norm of the targets; zero where it is only rounding errors."""
        energy = float(self.spread.diagonal(dim1=1, dim2=2).sum(dtype=torch.float64))
        return energy if energy > self.floor else 0.0

    @property
    def unit(self) -> float:
        """The energy to divide errors by in a search, never zero."""
        return max(self.energy, self.floor, 1e-300)

    @cached_property
    def scale(self) -> float:
        """The mean of the diagonal of `E[p p^T]`, at least its rounding errors, and 1 if it is zero; ridges are multiples of it."""
        diagonal = self.gram.square().sum(1) if self.rows else self.gram.diagonal(dim1=1, dim2=2)
        squares = float(self.weight.square().sum(dtype=torch.float64))
        rounding = self.floor / squares if squares else 0.0
        return max(float(diagonal.mean()) - (0.0 if self.rows else self.ridge), rounding) or 1.0

    @cached_property
    def size(self) -> float:
        """The average error of kernels of norm one."""
        return self.scale + self.ridge

    def ridged(self, ridge: float) -> Objective:
        """The same objective with a larger ridge, by `ridge`."""
        gram = self.gram
        if not self.rows:
            gram = gram + ridge * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        spread = self.spread + ridge * (self.weight @ self.weight.mT)
        return replace(self, gram=gram, cross=self.cross + ridge * self.weight, spread=spread, ridge=self.ridge + ridge)

    def weighted(self, metric: Tensor) -> Objective:
        """The objective for `|M (t - V p)|^2` with M (g, o, o), as a function of `M V`."""
        spread = metric.double() @ self.spread @ metric.double().mT
        return replace(self, weight=metric @ self.weight, cross=metric @ self.cross, spread=spread)

    def product(self, kernels: Tensor) -> Tensor:
        """`kernels @ S` for (g, any, n)."""
        if self.rows:
            return (kernels @ self.gram.mT) @ self.gram + self.ridge * kernels
        return kernels @ self.gram

    def projected(self, kernels: Tensor, columns: Any = slice(None)) -> Tensor:
        """What `moment` and `slope` need of kernels: `kernels @ S`, or with rows `kernels @ R^T`, which is shorter.

        Kernels are (g, any, n) without the entries that `columns` leaves out, which are zeros.
        """
        return kernels @ (self.gram[..., columns].mT if self.rows else self.gram[:, columns])

    def moment(self, kernels: Tensor, columns: Any, projected: Tensor) -> Tensor:
        """`V @ S @ kernels^T` for kernels as above and `projected` of V; with rows, V and the kernels are the same, with all entries."""
        if not self.rows:
            return projected[..., columns] @ kernels.mT
        moment = projected @ projected.mT
        return moment + self.ridge * (kernels @ kernels.mT) if self.ridge else moment

    def slope(self, mixing: Tensor, kernels: Tensor, projected: Tensor) -> Tensor:
        """Half the gradient of the error at the kernel V = `mixing @ kernels`: `V S - B`."""
        product = mixing @ projected
        if self.rows:
            product = product @ self.gram
            product = product + self.ridge * (mixing @ kernels) if self.ridge else product
        return product - self.cross

    def kronecker_factors(self, sizes: Sequence[int]) -> list[Tensor]:
        """Second moments (g, size, size) along the axes of a patch, whose Kronecker product is close to S.

        The axes are the input channels and the taps, (in, height x width) or (in, height, width). Each moment is the mean of the diagonal
        blocks of S along the other axes; all but the first are divided by their mean diagonal.
        """
        axes, moments = "abc"[: len(sizes)], []
        blocks = self.gram.unflatten(-1, sizes) if self.rows else self.gram.unflatten(2, sizes).unflatten(1, sizes)
        for axis, letter in enumerate(axes):
            if self.rows:
                rows = blocks.movedim(axis + 2, -1).flatten(1, -2)
                moment = rows.mT @ rows
            else:
                moment = torch.einsum(f"g{axes}{axes.replace(letter, 'z')}->g{letter}z", blocks)
            moment = moment.double() * (sizes[axis] / math.prod(sizes))
            if self.rows:
                moment = moment + self.ridge * torch.eye(sizes[axis], dtype=moment.dtype, device=moment.device)
            moments.append(moment / moment.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)[:, None, None] if axis else moment)
        return moments

    def value(self, kernel: Tensor) -> float:
        """The error of a kernel (g, o, ...), relative to the energy: never negative, and 0 or 1 if the energy is zero."""
        v = kernel.flatten(2).to(self.cross.dtype)
        projected = self.projected(v)
        square = (projected * (projected if self.rows else v)).sum(dtype=torch.float64)
        if self.rows and self.ridge:
            square = square + self.ridge * v.square().sum(dtype=torch.float64)
        error = float(square - 2 * (v * self.cross).sum(dtype=torch.float64)) + self.energy
        return relative_to_energy(error, self.energy, self.floor)

    @cached_property
    def principal_outputs(self) -> tuple[Tensor, Tensor]:
        """The kernel T of least error, (g, o, n), and the eigenvectors of `T S T^T` by rising eigenvalues, (g, o, o)."""
        target = self.target()
        return target, torch.linalg.eigh(self.product(target) @ target.mT)[1]

    def target(self) -> Tensor:
        """`W + (B - W S) S^-1`, the kernel of least error: (g, o, n). If t = W p, it is W, even where S is singular."""
        residual = self.cross - self.product(self.weight)
        if float(residual.abs().max()) <= (1e-12 if self.cross.dtype == torch.float64 else 1e-5) * float(self.cross.abs().max()):
            return self.weight
        tiny = (RIDGE if self.gram.dtype == torch.float64 else SINGLE_RIDGE) * self.scale
        if self.rows:  # (R^T R + a)^-1 = (1 - R^T (R R^T + a)^-1 R) / a
            ridge = self.ridge + tiny
            inner = self.gram @ self.gram.mT
            solved = torch.cholesky_solve(self.gram @ residual.mT, ridged_cholesky(inner, inner.new_full(inner.shape[:2], ridge)))
            return self.weight + (residual - solved.mT @ self.gram) / ridge
        factor = ridged_cholesky(self.gram, self.gram.new_full(self.gram.shape[:2], tiny))
        return self.weight + torch.cholesky_solve(residual.mT, factor).mT


def ridged_cholesky(matrix: Tensor, ridge: Tensor) -> Tensor:
    """The Cholesky factor of `matrix + diag(ridge)`; the ridge grows where rounding errors made the matrix indefinite.

    Raises:
        LinAlgError: the matrix is not finite, or far from positive semidefinite.
    """
    for _ in range(RIDGE_TRIES):
        factor, failed = torch.linalg.cholesky_ex(matrix + torch.diag_embed(ridge))
        if not bool(failed.any()):
            return factor
        ridge = RIDGE_GROWTH * ridge
    largest = float(matrix.abs().max())
    raise LinAlgError(f"a matrix of second moments is not positive definite (largest entry {largest:.3g}).")


def leading_outputs(objective: Objective, count: int) -> tuple[Tensor, Tensor]:
    """The optimal kernel `E R` with few channels between E (g, o, r) and R (g, r, n).

    `E = U` and `R = U^T T`, with T the kernel of least error and U the leading eigenvectors of `T S T^T` (Zhang et al. 2015).
    """
    target, vectors = objective.principal_outputs
    leading = vectors[..., -count:].flip(-1)
    return leading, leading.mT @ target
