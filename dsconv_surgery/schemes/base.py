"""What a scheme is, and the few things that several of them say alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal, Protocol

from torch import Tensor

from dsconv_surgery.network.geometry import ConvSpec, Pair, Rank
from dsconv_surgery.schemes.objective import Objective

Factors = dict[str, Tensor]  # link name -> its weight, (groups, out, in / link groups, height, width)


class Scheme(Protocol):
    """A way of writing one convolution as a chain of smaller ones.

    A scheme only ever sees one group: `spec` has `groups=1` and no bias. A grouped layer's blocks come along the first
    dimension of `weight`, (groups, out, in, height, width) in float64, and of every factor; a plain layer has one.
    """

    name: str

    def refuses(self, spec: ConvSpec) -> str | None:
        """Why this geometry cannot be written so, or None."""
        ...

    def full_rank(self, spec: ConvSpec) -> Rank:
        """The rank at which the kernel is exact; a pair bounds each of its entries."""
        ...

    def ranks(self, spec: ConvSpec) -> Iterable[Rank]:
        """The ranks offered to a rule, smallest first; lazy where there are many."""
        ...

    def chain(self, spec: ConvSpec, rank: Rank) -> dict[str, ConvSpec]:
        """The links in running order; their names become the submodules'."""
        ...

    def factorize(self, spec: ConvSpec, weight: Tensor, ranks: list[Rank], rough: bool = False) -> Iterator[Factors]:
        """Factors for each rank in turn (ascending), from one decomposition or each starting at the one before.

        `rough`: good enough to start a search for data with; a scheme that iterates may stop early.
        """
        ...

    def optimum(self, spec: ConvSpec, objective: Objective, rank: Rank) -> Factors | None:
        """The best factors for data, where there is a closed form; None leaves it to the search that all schemes share."""
        ...

    def kernel(self, spec: ConvSpec, factors: Factors) -> Tensor:
        """The dense kernel that the factors stand for, (groups, out, in, height, width); linear in each of them, and differentiable."""
        ...

    def spectrum(self, spec: ConvSpec, weight: Tensor) -> Tensor | None:
        """The squared norm that each further rank explains, summed over groups: (full rank,), for a pair (first, second).

        All errors from one decomposition: exact where it is optimal for every rank, bounds from above elsewhere; None where
        there is nothing of the kind.
        """
        ...


def whole(rank: Rank) -> int:
    """The rank of a scheme that has a single one."""
    if not isinstance(rank, int):
        raise TypeError(f"expected one rank, found {rank}.")
    return rank


def pair(rank: Rank) -> Pair:
    """The rank of a scheme that has two."""
    if isinstance(rank, int):
        raise TypeError(f"expected a pair of ranks, found {rank}.")
    return rank


def one_tap(spec: ConvSpec) -> str | None:
    """The refusal of every scheme but bottleneck."""
    if spec.kind == "linear":
        return "a linear layer has no taps to separate: only bottleneck applies."
    return "a 1x1 kernel has no taps to separate: only bottleneck applies." if spec.taps == 1 else None


def split_taps(spec: ConvSpec) -> tuple[ConvSpec, ConvSpec]:
    """The geometry along height alone and along width alone; channels are left as they are."""
    along_height: Pair | Literal["same"] = "same" if spec.padding == "same" else (spec.padding[0], 0)
    along_width: Pair | Literal["same"] = "same" if spec.padding == "same" else (0, spec.padding[1])
    (kh, kw), (sh, sw), (dh, dw) = spec.kernel, spec.stride, spec.dilation
    return (
        replace(spec, kernel=(kh, 1), stride=(sh, 1), dilation=(dh, 1), padding=along_height),
        replace(spec, kernel=(1, kw), stride=(1, sw), dilation=(1, dw), padding=along_width),
    )
