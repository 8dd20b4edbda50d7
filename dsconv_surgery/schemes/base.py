"""The base class of schemes, and helpers that several schemes share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from dsconv_surgery.network.geometry import ConvSpec, Pair, Rank
from dsconv_surgery.schemes.objective import Objective

Factors = dict[str, Tensor]  # link name -> weight, (groups, out, in / link groups, height, width)


class Scheme(ABC):
    """A way to write one convolution as a chain of smaller convolutions.

    A scheme sees one group of a layer and no bias: `spec` has `groups=1` and `bias=False`. The groups of a grouped layer are
    stacked along the first dimension of `weight`, (groups, out, in, height, width) in float64, and of every factor.

    A subclass sets `name` and defines `full_rank`, `chain`, `factorize` and `kernel`; the other methods have defaults.
    `examples/tensor_train.py` is a complete scheme in one file.
    """

    name: str
    general: str | None = None  # a scheme that can write every kernel of this one at the same rank
    # What plans expect of a whole search in a layer that is not wide: where ten iterations multiply an error e1 by g, it multiplies an
    # error e by `g^a (e1 / e)^(b log g)`.
    slow_search: tuple[float, float] = (1.0, 0.0)  # (a, b)
    wide_search: float | None = None  # by what a search multiplies the error in wide layers; None to measure it in each of them

    def refuses(self, spec: ConvSpec) -> str | None:
        """Why the scheme does not apply to this geometry, as a sentence; None if it applies."""
        layer = "linear layer" if spec.kind == "linear" else "1x1 kernel"
        return f"a {layer} has no taps to separate. Use bottleneck." if spec.taps == 1 else None

    @abstractmethod
    def full_rank(self, spec: ConvSpec) -> Rank:
        """The smallest rank at which every kernel is exact; for pairs of ranks, the largest value of each."""

    def ranks(self, spec: ConvSpec) -> Iterable[Rank]:
        """The ranks that the planner may choose, in ascending order."""
        full = self.full_rank(spec)
        return range(1, full + 1) if isinstance(full, int) else product(range(1, full[0] + 1), range(1, full[1] + 1))

    @abstractmethod
    def chain(self, spec: ConvSpec, rank: Rank) -> dict[str, ConvSpec]:
        """The geometry of each link, in running order; the names become those of the submodules."""

    @abstractmethod
    def factorize(self, spec: ConvSpec, weight: Tensor, ranks: list[Rank], rough: bool = False) -> Iterator[Factors]:
        """Yield the factors of a kernel for each of the ascending ranks.

        With `rough`, an iterative scheme may stop early: the factors only start a search on calibration data.
        """

    @abstractmethod
    def kernel(self, spec: ConvSpec, factors: Factors) -> Tensor:
        """The dense kernel of the factors, (groups, out, in, height, width): linear in each factor, and differentiable."""

    def features(self, spec: ConvSpec, factors: Factors) -> Tensor:
        """The kernels that the last link combines, (groups, features, in, height, width), one for each of its inputs and taps.

        They do not depend on the last factor's values. Not for schemes whose last link is depthwise.
        """
        *_, last = factors
        return self.kernel(spec, {**factors, last: identity_like(factors[last])})

    def optimum(self, spec: ConvSpec, objective: Objective, rank: Rank) -> Factors | None:
        """The factors of least error on data, if there is a closed form; None leaves it to the search in `fitting`."""
        return None

    def approximate(self, spec: ConvSpec, objective: Objective, rank: Rank, rough: bool = False) -> Factors:
        """Factors near those of least error on data, for a search to start from; without this method, it starts from those of the weights.

        It is not called for the full rank. With `rough`, which plans pass, an iterative scheme may stop early.
        """
        raise NotImplementedError(f"{self.name} has no factors on data without a search. Ask can_approximate first.")

    def spectrum(self, spec: ConvSpec, weight: Tensor) -> Tensor | None:
        """The squared norm that each further rank explains, summed over groups: (full rank,), or (first, second) for pairs.

        It gives the errors of all ranks from one decomposition: exact if that is optimal at every rank, upper bounds otherwise.
        None if there is no such decomposition.
        """
        return None

    def term_energy(self, factors: Factors) -> float | None:
        """The sum of the squared norms of the terms whose sum is the kernel; None if terms cannot cancel each other."""
        return None


def identity_like(last: Tensor) -> Tensor:
    """A weight of the last link that makes each of its inputs, at each tap, an output."""
    eye = torch.eye(last[0, 0].numel(), dtype=last.dtype, device=last.device)
    return eye.unflatten(1, last.shape[2:]).expand(last.shape[0], *(-1,) * 4)


def single_rank(rank: Rank) -> int:
    """The rank of a scheme that has one rank."""
    if not isinstance(rank, int):
        raise TypeError(f"expected one rank, found {rank}.")
    return rank


def rank_pair(rank: Rank) -> Pair:
    """The ranks of a scheme that has two."""
    if isinstance(rank, int):
        raise TypeError(f"expected a pair of ranks, found {rank}.")
    return rank


def split_taps(spec: ConvSpec) -> tuple[ConvSpec, ConvSpec]:
    """The geometry along the height and along the width, with the channels of `spec`."""
    along_height: Pair | Literal["same"] = "same" if spec.padding == "same" else (spec.padding[0], 0)
    along_width: Pair | Literal["same"] = "same" if spec.padding == "same" else (0, spec.padding[1])
    (kh, kw), (sh, sw), (dh, dw) = spec.kernel, spec.stride, spec.dilation
    return (
        replace(spec, kernel=(kh, 1), stride=(sh, 1), dilation=(dh, 1), padding=along_height),
        replace(spec, kernel=(1, kw), stride=(1, sw), dilation=(1, dw), padding=along_width),
    )
