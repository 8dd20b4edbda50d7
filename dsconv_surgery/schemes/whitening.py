"""Factors near those of least error on data: those of the weights in coordinates where the error of outputs is nearly a plain one."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from dsconv_surgery.network.geometry import ConvSpec, Rank
from dsconv_surgery.schemes.base import Factors, Scheme
from dsconv_surgery.schemes.objective import Objective

RIDGE = 1e-3  # added to the eigenvalues of a second moment, in units of their mean


class Whitening:
    """Coordinates in which `E |(T - V) p|^2`, T being the kernel of least error, is nearly the squared norm of a kernel's change.

    The second moment S of the patches is replaced by a Kronecker product of second moments C of the input channels and K of the taps
    (as in K-FAC, Martens & Grosse 2015): the kernel is multiplied by `C^1/2` and `K^1/2`. A chain of the result becomes one of the
    kernel if its first link is multiplied by `C^-1/2` and the links with taps by `K^-1/2`. K is a product of two moments if height and
    width have a link each. The first link of the chain must read all input channels.

    Attributes:
        kernel: T in these coordinates, (groups, out, in, height, width) in float64.
    """

    def __init__(self, objective: Objective, spec: ConvSpec, chain: dict[str, ConvSpec]) -> None:
        self._chain = chain
        self._first, *_ = chain
        self._split = sum(link.taps > 1 for link in chain.values()) == 2
        sizes = (spec.in_channels, *(spec.kernel if self._split else (spec.taps,)))
        if sizes not in objective.whitened:
            objective.whitened[sizes] = _whitened(objective, spec, sizes)
        self.kernel, self._inverses = objective.whitened[sizes]

    def undo(self, factors: Factors) -> Factors:
        """The factors of the kernel itself from those of a chain for `kernel`."""
        channels, *taps = self._inverses
        result: Factors = {}
        for name, factor in factors.items():
            link = self._chain[name]
            if name == self._first:
                factor = torch.einsum("gpihw,gij->gpjhw", factor, channels)
            if link.taps > 1:
                inverse = taps[int(self._split and link.kernel[0] == 1)]
                factor = torch.einsum("gpik,gkl->gpil", factor.flatten(3), inverse).unflatten(3, factor.shape[3:])
            result[name] = factor
        return result


def approximate_whitened(scheme: Scheme, spec: ConvSpec, objective: Objective, rank: Rank, rough: bool) -> Factors:
    """The factors that a scheme computes of the kernel of least error in these coordinates."""
    whitening = Whitening(objective, spec, scheme.chain(spec, rank))
    return whitening.undo(next(scheme.factorize(spec, whitening.kernel, [rank], rough)))


def _whitened(objective: Objective, spec: ConvSpec, sizes: tuple[int, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The kernel of least error in the coordinates of a `Whitening`, and the inverse roots of the second moments."""
    (channels, *taps), inverses = zip(*map(_root_and_inverse, objective.kronecker_factors(sizes)), strict=True)
    target = objective.target().double().unflatten(2, (spec.in_channels, spec.taps))
    all_taps = reduce(lambda a, b: torch.einsum("gij,gkl->gikjl", a, b).flatten(3).flatten(1, 2), taps)
    return torch.einsum("goik,gij,gkl->gojl", target, channels, all_taps).unflatten(3, spec.kernel), inverses


def _root_and_inverse(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a second moment (g, n, n), regularised, and its inverse."""
    values, vectors = torch.linalg.eigh(moment)
    roots = (values.clamp(min=0) + RIDGE * values.mean(1, keepdim=True).clamp(min=1e-30)).sqrt().unsqueeze(1)
    return (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT
