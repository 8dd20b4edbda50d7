"""Spatial decomposition: a k x 1 convolution, then a 1 x k."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from dsconv_surgery.network.geometry import ConvSpec, Rank
from dsconv_surgery.schemes.base import Factors, single_rank, split_taps
from dsconv_surgery.schemes.low_rank import LowRank
from dsconv_surgery.schemes.objective import Objective
from dsconv_surgery.schemes.whitening import approximate_whitened


class Spatial(LowRank):
    """`V[o,i,y,x] = sum_r X[o,r,x] Y[r,i,y]`: the SVD of the (I Ky) x (O Kx) unfolding (Jaderberg et al. 2014)."""

    name = "spatial"
    wide_search = 0.9

    def full_rank(self, spec: ConvSpec) -> int:
        return min(spec.in_channels * spec.kernel[0], spec.out_channels * spec.kernel[1])

    def chain(self, spec: ConvSpec, rank: Rank) -> dict[str, ConvSpec]:
        r = single_rank(rank)
        vertical, horizontal = split_taps(spec)
        return {"vertical": replace(vertical, out_channels=r), "horizontal": replace(horizontal, in_channels=r)}

    def approximate(self, spec: ConvSpec, objective: Objective, rank: Rank, rough: bool = False) -> Factors:
        return approximate_whitened(self, spec, objective, rank, rough)

    def unfold(self, weight: Tensor) -> Tensor:
        return weight.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)

    def links(self, spec: ConvSpec, left: Tensor, right: Tensor) -> Factors:
        height, width = spec.kernel
        return {
            "vertical": left.mT.unflatten(2, (spec.in_channels, height)).unsqueeze(4),
            "horizontal": right.unflatten(2, (spec.out_channels, width)).transpose(1, 2).unsqueeze(3),
        }

    def kernel(self, spec: ConvSpec, factors: Factors) -> Tensor:
        vertical, horizontal = factors["vertical"].squeeze(4), factors["horizontal"].squeeze(3)
        g, o, r, kw = horizontal.shape
        _, _, i, kh = vertical.shape
        product = horizontal.transpose(2, 3).reshape(g, o * kw, r) @ vertical.reshape(g, r, i * kh)
        return product.reshape(g, o, kw, i, kh).permute(0, 1, 3, 4, 2)
