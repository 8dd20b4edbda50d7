"""Channel decomposition: a k x k convolution to few channels, then a 1x1; bottleneck is the same for layers without taps."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from dsconv_surgery.network.geometry import ConvSpec, Rank
from dsconv_surgery.schemes.base import Factors, single_rank
from dsconv_surgery.schemes.low_rank import LowRank
from dsconv_surgery.schemes.objective import Objective, leading_outputs


class Channel(LowRank):
    """`V[o,i,y,x] = sum_r E[o,r] R[r,i,y,x]`: the SVD of the O x (I Ky Kx) unfolding (Zhang et al. 2015)."""

    name = "channel"

    def full_rank(self, spec: ConvSpec) -> int:
        return min(spec.out_channels, spec.in_channels * spec.taps)

    def chain(self, spec: ConvSpec, rank: Rank) -> dict[str, ConvSpec]:
        r = single_rank(rank)
        return {"reduce": replace(spec, out_channels=r), "expand": ConvSpec(r, spec.out_channels, kind=spec.kind)}

    def unfold(self, weight: Tensor) -> Tensor:
        return weight.flatten(2)

    def links(self, spec: ConvSpec, left: Tensor, right: Tensor) -> Factors:
        return {"reduce": right.unflatten(2, (spec.in_channels, *spec.kernel)), "expand": left[..., None, None]}

    def optimum(self, spec: ConvSpec, objective: Objective, rank: Rank) -> Factors:
        return self.links(spec, *leading_outputs(objective, single_rank(rank)))

    def kernel(self, spec: ConvSpec, factors: Factors) -> Tensor:
        reduce, expand = factors["reduce"], factors["expand"]
        return (expand.flatten(2) @ reduce.flatten(2)).unflatten(2, reduce.shape[2:])


class Bottleneck(Channel):
    """`V[o,i] = sum_r E[o,r] R[r,i]`, a 1x1 convolution or linear layer as two: the SVD (Denil et al. 2013, Denton et al. 2014)."""

    name = "bottleneck"

    def refuses(self, spec: ConvSpec) -> str | None:
        return None if spec.taps == 1 else f"only for 1x1 convolutions and linear layers, not {spec.kernel[0]}x{spec.kernel[1]}."
