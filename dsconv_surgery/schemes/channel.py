"""Channel decomposition: a k x k convolution to few channels, then a 1x1."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import Tensor

from dsconv_surgery.network.geometry import ConvSpec, Rank
from dsconv_surgery.schemes import low_rank
from dsconv_surgery.schemes.base import Factors, one_tap, whole
from dsconv_surgery.schemes.objective import Objective, leading_outputs


class Channel:
    """`V[o,i,y,x] = sum_r E[o,r] R[r,i,y,x]`: the SVD of the O x (I K) unfolding (Zhang et al. 2015, without data)."""

    name = "channel"

    def refuses(self, spec: ConvSpec) -> str | None:
        return one_tap(spec)

    def full_rank(self, spec: ConvSpec) -> int:
        return min(spec.out_channels, spec.in_channels * spec.taps)

    def ranks(self, spec: ConvSpec) -> Iterable[int]:
        return range(1, self.full_rank(spec) + 1)

    def chain(self, spec: ConvSpec, rank: Rank) -> dict[str, ConvSpec]:
        r = whole(rank)
        return {"reduce": replace(spec, out_channels=r), "expand": ConvSpec(r, spec.out_channels)}

    def factorize(self, spec: ConvSpec, weight: Tensor, ranks: list[Rank], rough: bool = False) -> Iterator[Factors]:
        for left, right in low_rank.truncated_svd(weight.flatten(2), [whole(rank) for rank in ranks]):
            yield {"reduce": right.unflatten(2, weight.shape[2:]), "expand": left[..., None, None]}

    def optimum(self, spec: ConvSpec, objective: Objective, rank: Rank) -> Factors:
        expand, reduce = leading_outputs(objective, whole(rank))
        return {"reduce": reduce.unflatten(2, (spec.in_channels, *spec.kernel)), "expand": expand[..., None, None]}

    def kernel(self, spec: ConvSpec, factors: Factors) -> Tensor:
        reduce, expand = factors["reduce"], factors["expand"]
        return (expand.flatten(2) @ reduce.flatten(2)).unflatten(2, reduce.shape[2:])

    def spectrum(self, spec: ConvSpec, weight: Tensor) -> Tensor:
        return low_rank.squared_singular_values(weight.flatten(2)).sum(0)
