"""Spatial decomposition: a k x 1 convolution, then a 1 x k."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import Tensor

from dsconv_surgery.network.geometry import ConvSpec, Rank
from dsconv_surgery.schemes import low_rank
from dsconv_surgery.schemes.base import Factors, one_tap, split_taps, whole
from dsconv_surgery.schemes.objective import Objective


class Spatial:
    """`V[o,i,y,x] = sum_r H[o,r,x] V[r,i,y]`: the SVD of the (I Kh) x (O Kw) unfolding (Jaderberg et al. 2014)."""

    name = "spatial"

    def refuses(self, spec: ConvSpec) -> str | None:
        return one_tap(spec)

    def full_rank(self, spec: ConvSpec) -> int:
        return min(spec.in_channels * spec.kernel[0], spec.out_channels * spec.kernel[1])

    def ranks(self, spec: ConvSpec) -> Iterable[int]:
        return range(1, self.full_rank(spec) + 1)

    def chain(self, spec: ConvSpec, rank: Rank) -> dict[str, ConvSpec]:
        r = whole(rank)
        vertical, horizontal = split_taps(spec)
        return {"vertical": replace(vertical, out_channels=r), "horizontal": replace(horizontal, in_channels=r)}

    def factorize(self, spec: ConvSpec, weight: Tensor, ranks: list[Rank], rough: bool = False) -> Iterator[Factors]:
        _, o, i, kh, kw = weight.shape
        for left, right in low_rank.truncated_svd(self._unfolding(weight), [whole(rank) for rank in ranks]):
            yield {
                "vertical": left.mT.unflatten(2, (i, kh)).unsqueeze(4),
                "horizontal": right.unflatten(2, (o, kw)).transpose(1, 2).unsqueeze(3),
            }

    def optimum(self, spec: ConvSpec, objective: Objective, rank: Rank) -> None:
        return None

    def kernel(self, spec: ConvSpec, factors: Factors) -> Tensor:
        vertical, horizontal = factors["vertical"].squeeze(4), factors["horizontal"].squeeze(3)
        g, o, r, kw = horizontal.shape
        _, _, i, kh = vertical.shape
        product = horizontal.transpose(2, 3).reshape(g, o * kw, r) @ vertical.reshape(g, r, i * kh)
        return product.reshape(g, o, kw, i, kh).permute(0, 1, 3, 4, 2)

    def spectrum(self, spec: ConvSpec, weight: Tensor) -> Tensor:
        return low_rank.squared_singular_values(self._unfolding(weight)).sum(0)

    @staticmethod
    def _unfolding(weight: Tensor) -> Tensor:
        return weight.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)
