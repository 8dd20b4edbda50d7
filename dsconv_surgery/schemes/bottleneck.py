"""Bottleneck: a 1x1 convolution or a linear layer as two, through few channels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import Tensor

from dsconv_surgery.network.geometry import ConvSpec, Rank
from dsconv_surgery.schemes import low_rank
from dsconv_surgery.schemes.base import Factors, whole
from dsconv_surgery.schemes.objective import Objective, leading_outputs


class Bottleneck:
    """`V[o,i] = sum_r E[o,r] R[r,i]`: the matrix SVD (Denil et al. 2013, Denton et al. 2014)."""

    name = "bottleneck"

    def refuses(self, spec: ConvSpec) -> str | None:
        return None if spec.taps == 1 else f"only for 1x1 convolutions and linear layers, not {spec.kernel[0]}x{spec.kernel[1]}."

    def full_rank(self, spec: ConvSpec) -> int:
        return min(spec.in_channels, spec.out_channels)

    def ranks(self, spec: ConvSpec) -> Iterable[int]:
        return range(1, self.full_rank(spec) + 1)

    def chain(self, spec: ConvSpec, rank: Rank) -> dict[str, ConvSpec]:
        r = whole(rank)
        return {"reduce": replace(spec, out_channels=r), "expand": ConvSpec(r, spec.out_channels, kind=spec.kind)}

    def factorize(self, spec: ConvSpec, weight: Tensor, ranks: list[Rank], rough: bool = False) -> Iterator[Factors]:
        for left, right in low_rank.truncated_svd(weight.flatten(2), [whole(rank) for rank in ranks]):
            yield {"reduce": right[..., None, None], "expand": left[..., None, None]}

    def optimum(self, spec: ConvSpec, objective: Objective, rank: Rank) -> Factors:
        expand, reduce = leading_outputs(objective, whole(rank))
        return {"reduce": reduce[..., None, None], "expand": expand[..., None, None]}

    def kernel(self, spec: ConvSpec, factors: Factors) -> Tensor:
        return (factors["expand"].flatten(2) @ factors["reduce"].flatten(2))[..., None, None]

    def spectrum(self, spec: ConvSpec, weight: Tensor) -> Tensor:
        return low_rank.squared_singular_values(weight.flatten(2)).sum(0)
