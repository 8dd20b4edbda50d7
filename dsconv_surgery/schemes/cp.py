"""CP: a 1x1 to R channels, a depthwise k x k on them, a 1x1 back; also with the taps split along height and width."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dsconv_surgery.network.geometry import ConvSpec, Rank
from dsconv_surgery.schemes import als
from dsconv_surgery.schemes.base import Factors, one_tap, split_taps, whole
from dsconv_surgery.schemes.objective import Objective


class CP:
    """`V[o,i,y,x] = sum_r E[o,r] R[r,i] D[r,y,x]` by alternating least squares (Lebedev et al. 2015, taps kept together)."""

    name = "cp"

    def refuses(self, spec: ConvSpec) -> str | None:
        return one_tap(spec)

    def full_rank(self, spec: ConvSpec) -> int:
        i, o, k = spec.in_channels, spec.out_channels, spec.taps
        return min(k * i, k * o, i * o)

    def ranks(self, spec: ConvSpec) -> Iterable[int]:
        return range(1, self.full_rank(spec) + 1)

    def chain(self, spec: ConvSpec, rank: Rank) -> dict[str, ConvSpec]:
        r = whole(rank)
        return {
            "reduce": ConvSpec(spec.in_channels, r),
            "depthwise": replace(spec, in_channels=r, out_channels=r, groups=r),
            "expand": ConvSpec(r, spec.out_channels),
        }

    def factorize(self, spec: ConvSpec, weight: Tensor, ranks: list[Rank], rough: bool = False) -> Iterator[Factors]:
        for terms in als.decompose(weight.flatten(3), (spec.taps,), [whole(rank) for rank in ranks], self.full_rank(spec), rough):
            (taps,) = terms.taps
            yield {
                "reduce": terms.inputs.mT[..., None, None],
                "depthwise": taps.mT.unflatten(2, (1, *spec.kernel)),
                "expand": terms.outputs[..., None, None],
            }

    def optimum(self, spec: ConvSpec, objective: Objective, rank: Rank) -> None:
        return None

    def kernel(self, spec: ConvSpec, factors: Factors) -> Tensor:
        reduce, taps, expand = factors["reduce"].flatten(2), factors["depthwise"].flatten(2), factors["expand"].flatten(2)
        return _sum_of_terms(reduce, taps, expand).unflatten(3, spec.kernel)

    def spectrum(self, spec: ConvSpec, weight: Tensor) -> None:
        return None


class SplitCP:
    """`V[o,i,y,x] = sum_r E[o,r] R[r,i] Y[r,y] X[r,x]` by alternating least squares (Lebedev et al. 2015)."""

    name = "cp_split"

    def refuses(self, spec: ConvSpec) -> str | None:
        if spec.taps > 1 and 1 in spec.kernel:
            return f"the taps of a {spec.kernel[0]}x{spec.kernel[1]} kernel lie along one axis: cp is the same with a link less."
        return one_tap(spec)

    def full_rank(self, spec: ConvSpec) -> int:
        i, o, k = spec.in_channels, spec.out_channels, spec.taps
        return min(k * i, k * o, i * o * min(spec.kernel))

    def ranks(self, spec: ConvSpec) -> Iterable[int]:
        return range(1, self.full_rank(spec) + 1)

    def chain(self, spec: ConvSpec, rank: Rank) -> dict[str, ConvSpec]:
        r = whole(rank)
        vertical, horizontal = split_taps(replace(spec, in_channels=r, out_channels=r, groups=r))
        return {
            "reduce": ConvSpec(spec.in_channels, r),
            "vertical": vertical,
            "horizontal": horizontal,
            "expand": ConvSpec(r, spec.out_channels),
        }

    def factorize(self, spec: ConvSpec, weight: Tensor, ranks: list[Rank], rough: bool = False) -> Iterator[Factors]:
        for terms in als.decompose(weight.flatten(3), spec.kernel, [whole(rank) for rank in ranks], self.full_rank(spec), rough):
            along_height, along_width = terms.taps
            yield {
                "reduce": terms.inputs.mT[..., None, None],
                "vertical": along_height.mT[:, :, None, :, None],
                "horizontal": along_width.mT[:, :, None, None, :],
                "expand": terms.outputs[..., None, None],
            }

    def optimum(self, spec: ConvSpec, objective: Objective, rank: Rank) -> None:
        return None

    def kernel(self, spec: ConvSpec, factors: Factors) -> Tensor:
        taps = (factors["vertical"] * factors["horizontal"]).flatten(2)
        return _sum_of_terms(factors["reduce"].flatten(2), taps, factors["expand"].flatten(2)).unflatten(3, spec.kernel)

    def spectrum(self, spec: ConvSpec, weight: Tensor) -> None:
        return None


def _sum_of_terms(reduce: Tensor, taps: Tensor, expand: Tensor) -> Tensor:
    """(g, r, i), (g, r, k), (g, o, r) -> (g, o, i, k)."""
    return (expand @ torch.einsum("gri,grk->grik", reduce, taps).flatten(2)).unflatten(2, (reduce.shape[2], taps.shape[2]))


def term_energy(factors: Factors) -> float:
    """The sum of the terms' squared norms."""
    reduce, *taps, expand = (factor.flatten(2) for factor in factors.values())
    energy = reduce.square().sum(2) * expand.square().sum(1)
    for tap in taps:
        energy = energy * tap.square().sum(2)
    return float(energy.sum())
