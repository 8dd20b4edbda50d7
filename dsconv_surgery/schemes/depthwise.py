"""Depthwise separable convolutions, in both orders, with several kernels per channel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import Tensor

from dsconv_surgery.network.geometry import ConvSpec, Rank
from dsconv_surgery.schemes import low_rank
from dsconv_surgery.schemes.base import Factors, one_tap, whole
from dsconv_surgery.schemes.objective import Objective


class Depthwise:
    """`V[o,i,y,x] = sum_j P[o,i,j] D[i,j,y,x]`, j < m kernels per input channel: an SVD of each input channel's O x K slice
    (Guo et al. 2018, network decoupling)."""

    name = "depthwise"

    def refuses(self, spec: ConvSpec) -> str | None:
        return one_tap(spec)

    def full_rank(self, spec: ConvSpec) -> int:
        return min(spec.taps, spec.out_channels)

    def ranks(self, spec: ConvSpec) -> Iterable[int]:
        return range(1, self.full_rank(spec) + 1)

    def chain(self, spec: ConvSpec, rank: Rank) -> dict[str, ConvSpec]:
        i, wide = spec.in_channels, spec.in_channels * whole(rank)
        return {
            "depthwise": replace(spec, out_channels=wide, groups=i),
            "pointwise": ConvSpec(wide, spec.out_channels),
        }

    def factorize(self, spec: ConvSpec, weight: Tensor, ranks: list[Rank], rough: bool = False) -> Iterator[Factors]:
        for left, right in low_rank.truncated_svd(self._slices(weight), [whole(rank) for rank in ranks]):
            yield {
                "depthwise": right.flatten(1, 2).unsqueeze(2).unflatten(3, weight.shape[3:]),
                "pointwise": left.transpose(1, 2).flatten(2)[..., None, None],
            }

    def optimum(self, spec: ConvSpec, objective: Objective, rank: Rank) -> None:
        return None

    def kernel(self, spec: ConvSpec, factors: Factors) -> Tensor:
        depthwise, pointwise = factors["depthwise"], factors["pointwise"]
        m = depthwise.shape[1] // spec.in_channels
        taps = depthwise.flatten(2).unflatten(1, (-1, m))  # g, i, m, k
        mixing = pointwise.flatten(2).unflatten(2, (-1, m)).transpose(1, 2)  # g, i, o, m
        return (mixing @ taps).transpose(1, 2).unflatten(3, depthwise.shape[3:])

    def spectrum(self, spec: ConvSpec, weight: Tensor) -> Tensor:
        return low_rank.squared_singular_values(self._slices(weight)).sum((0, 1))

    @staticmethod
    def _slices(weight: Tensor) -> Tensor:
        return weight.transpose(1, 2).flatten(3)  # g, i, o, k


class PointwiseDepthwise:
    """`V[o,i,y,x] = sum_j P[o,j,i] D[o,j,y,x]`, j < m kernels per output channel: an SVD of each output channel's I x K slice
    (Guo et al. 2018; blueprint separable, Haase & Amthor 2020)."""

    name = "pointwise_depthwise"

    def refuses(self, spec: ConvSpec) -> str | None:
        return one_tap(spec)

    def full_rank(self, spec: ConvSpec) -> int:
        return min(spec.taps, spec.in_channels)

    def ranks(self, spec: ConvSpec) -> Iterable[int]:
        return range(1, self.full_rank(spec) + 1)

    def chain(self, spec: ConvSpec, rank: Rank) -> dict[str, ConvSpec]:
        o, wide = spec.out_channels, spec.out_channels * whole(rank)
        return {
            "pointwise": ConvSpec(spec.in_channels, wide),
            "depthwise": replace(spec, in_channels=wide, groups=o),
        }

    def factorize(self, spec: ConvSpec, weight: Tensor, ranks: list[Rank], rough: bool = False) -> Iterator[Factors]:
        for left, right in low_rank.truncated_svd(weight.flatten(3), [whole(rank) for rank in ranks]):
            yield {
                "pointwise": left.mT.flatten(1, 2)[..., None, None],
                "depthwise": right.unflatten(3, weight.shape[3:]),
            }

    def optimum(self, spec: ConvSpec, objective: Objective, rank: Rank) -> None:
        return None

    def kernel(self, spec: ConvSpec, factors: Factors) -> Tensor:
        pointwise, depthwise = factors["pointwise"], factors["depthwise"]
        mixing = pointwise.flatten(2).unflatten(1, depthwise.shape[1:3])  # g, o, m, i
        return (mixing.mT @ depthwise.flatten(3)).unflatten(3, depthwise.shape[3:])

    def spectrum(self, spec: ConvSpec, weight: Tensor) -> Tensor:
        return low_rank.squared_singular_values(weight.flatten(3)).sum((0, 1))
