"""Depthwise separable convolutions in both orders, with several kernels per channel."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from dsconv_surgery.network.geometry import ConvSpec, Rank
from dsconv_surgery.schemes.base import Factors, single_rank
from dsconv_surgery.schemes.low_rank import LowRank
from dsconv_surgery.schemes.objective import Objective
from dsconv_surgery.schemes.whitening import approximate_whitened


class Depthwise(LowRank):
    """`V[o,i,y,x] = sum_j P[o,i,j] D[i,j,y,x]` with m kernels j per input channel i.

    The factors are the SVD of the O x (Ky Kx) slice of each input channel (Guo et al. 2018, network decoupling).
    """

    name = "depthwise"
    wide_search = 0.65

    def full_rank(self, spec: ConvSpec) -> int:
        return min(spec.taps, spec.out_channels)

    def chain(self, spec: ConvSpec, rank: Rank) -> dict[str, ConvSpec]:
        width = spec.in_channels * single_rank(rank)
        return {"depthwise": replace(spec, out_channels=width, groups=spec.in_channels), "pointwise": ConvSpec(width, spec.out_channels)}

    def unfold(self, weight: Tensor) -> Tensor:
        return weight.transpose(1, 2).flatten(3)  # g, i, o, k

    def links(self, spec: ConvSpec, left: Tensor, right: Tensor) -> Factors:
        return {
            "depthwise": right.flatten(1, 2).unsqueeze(2).unflatten(3, spec.kernel),
            "pointwise": left.transpose(1, 2).flatten(2)[..., None, None],
        }

    def kernel(self, spec: ConvSpec, factors: Factors) -> Tensor:
        depthwise, pointwise = factors["depthwise"], factors["pointwise"]
        m = depthwise.shape[1] // spec.in_channels
        taps = depthwise.flatten(2).unflatten(1, (-1, m))  # g, i, m, k
        mixing = pointwise.flatten(2).unflatten(2, (-1, m)).transpose(1, 2)  # g, i, o, m
        return (mixing @ taps).transpose(1, 2).unflatten(3, depthwise.shape[3:])


class PointwiseDepthwise(LowRank):
    """`V[o,i,y,x] = sum_j P[o,j,i] D[o,j,y,x]` with m kernels j per output channel o.

    The factors are the SVD of the I x (Ky Kx) slice of each output channel (Guo et al. 2018; for m = 1 the blueprint separable
    convolution of Haase & Amthor 2020).
    """

    name = "pointwise_depthwise"
    wide_search = 0.4

    def full_rank(self, spec: ConvSpec) -> int:
        return min(spec.taps, spec.in_channels)

    def chain(self, spec: ConvSpec, rank: Rank) -> dict[str, ConvSpec]:
        width = spec.out_channels * single_rank(rank)
        return {"pointwise": ConvSpec(spec.in_channels, width), "depthwise": replace(spec, in_channels=width, groups=spec.out_channels)}

    def approximate(self, spec: ConvSpec, objective: Objective, rank: Rank, rough: bool = False) -> Factors:
        return approximate_whitened(self, spec, objective, rank, rough)

    def unfold(self, weight: Tensor) -> Tensor:
        return weight.flatten(3)  # g, o, i, k

    def links(self, spec: ConvSpec, left: Tensor, right: Tensor) -> Factors:
        return {"pointwise": left.mT.flatten(1, 2)[..., None, None], "depthwise": right.unflatten(3, spec.kernel)}

    def kernel(self, spec: ConvSpec, factors: Factors) -> Tensor:
        pointwise, depthwise = factors["pointwise"], factors["depthwise"]
        mixing = pointwise.flatten(2).unflatten(1, (-1, depthwise.shape[2]))  # g, o, m, i
        return (mixing.mT @ depthwise.flatten(3)).unflatten(3, depthwise.shape[3:])
