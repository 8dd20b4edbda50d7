"""CP: a 1x1 to R channels, a depthwise k x k on them, a 1x1 back; also with the depthwise link split along height and width."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from dsconv_surgery.network.geometry import ConvSpec, Rank
from dsconv_surgery.schemes import als
from dsconv_surgery.schemes.base import Factors, Scheme, single_rank, split_taps


class CP(Scheme):
    """`V[o,i,y,x] = sum_r E[o,r] R[r,i] D[r,y,x]` by alternating least squares (Lebedev et al. 2015, with the taps in one factor)."""

    name = "cp"

    def full_rank(self, spec: ConvSpec) -> int:
        i, o, k = spec.in_channels, spec.out_channels, spec.taps
        return min(k * i, k * o, i * o)

    def tap_links(self, spec: ConvSpec) -> dict[str, ConvSpec]:
        """The links for the taps, `spec` being the geometry of all of them together."""
        return {"depthwise": spec}

    def chain(self, spec: ConvSpec, rank: Rank) -> dict[str, ConvSpec]:
        r = single_rank(rank)
        taps = self.tap_links(replace(spec, in_channels=r, out_channels=r, groups=r))
        return {"reduce": ConvSpec(spec.in_channels, r), **taps, "expand": ConvSpec(r, spec.out_channels)}

    def factorize(self, spec: ConvSpec, weight: Tensor, ranks: list[Rank], rough: bool = False) -> Iterator[Factors]:
        links = self.tap_links(spec)
        tap_shape = tuple(link.taps for link in links.values())
        for terms in als.decompose(weight.flatten(3), tap_shape, [single_rank(rank) for rank in ranks], self.full_rank(spec), rough):
            outputs, inputs, *taps = terms
            named = zip(links.items(), taps, strict=True)
            tap_factors = {name: factor.mT.unflatten(2, (1, *link.kernel)) for (name, link), factor in named}
            yield {"reduce": inputs.mT[..., None, None], **tap_factors, "expand": outputs[..., None, None]}

    def kernel(self, spec: ConvSpec, factors: Factors) -> Tensor:
        first, *taps, last = factors.values()
        kernel = als.sum_of_terms(first.flatten(2), reduce(torch.mul, taps).flatten(2), last.flatten(2))
        return kernel.unflatten(3, spec.kernel)

    def term_energy(self, factors: Factors) -> float:
        first, *taps, last = (factor.flatten(2) for factor in factors.values())
        squares = (first.square().sum(2), last.square().sum(1), *(factor.square().sum(2) for factor in taps))
        return float(reduce(torch.mul, squares).sum())


class SplitCP(CP):
    """`V[o,i,y,x] = sum_r E[o,r] R[r,i] Y[r,y] X[r,x]` by alternating least squares (Lebedev et al. 2015)."""

    name, general = "cp_split", "cp"

    def refuses(self, spec: ConvSpec) -> str | None:
        if spec.taps > 1 and 1 in spec.kernel:
            return f"the taps of a {spec.kernel[0]}x{spec.kernel[1]} kernel lie along one axis. Use cp, which needs one link less."
        return super().refuses(spec)

    def full_rank(self, spec: ConvSpec) -> int:
        i, o, k = spec.in_channels, spec.out_channels, spec.taps
        return min(k * i, k * o, i * o * min(spec.kernel))

    def tap_links(self, spec: ConvSpec) -> dict[str, ConvSpec]:
        return dict(zip(("vertical", "horizontal"), split_taps(spec), strict=True))
