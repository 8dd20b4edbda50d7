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
from dsconv_surgery.schemes.objective import Objective
from dsconv_surgery.schemes.whitening import Whitening


class CP(Scheme):
    """`V[o,i,y,x] = sum_r E[o,r] R[r,i] D[r,y,x]` by alternating least squares (Lebedev et al. 2015, with the taps in one factor)."""

    name = "cp"
    slow_search = (3.4, 2.0)  # measured on ResNet-20
    wide_search = 0.9  # in this and other schemes, measured on resnet18 at 64 px

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
        tap_shape = self._tap_shape(spec)
        for terms in als.decompose(weight.flatten(3), tap_shape, [single_rank(rank) for rank in ranks], self.full_rank(spec), rough):
            yield self._factors(spec, terms)

    def approximate(self, spec: ConvSpec, objective: Objective, rank: Rank, rough: bool = False) -> Factors:
        whitening = Whitening(objective, spec, self.chain(spec, rank))
        terms = als.decompose_whitened(whitening.kernel.flatten(3), self._tap_shape(spec), single_rank(rank), rough)
        return whitening.undo(self._factors(spec, terms))

    def _tap_shape(self, spec: ConvSpec) -> tuple[int, ...]:
        return tuple(link.taps for link in self.tap_links(spec).values())

    def _factors(self, spec: ConvSpec, terms: als.Terms) -> Factors:
        outputs, inputs, *taps = terms
        named = zip(self.tap_links(spec).items(), taps, strict=True)
        tap_factors = {name: factor.mT.unflatten(2, (1, *link.kernel)) for (name, link), factor in named}
        return {"reduce": inputs.mT[..., None, None], **tap_factors, "expand": outputs[..., None, None]}

    def kernel(self, spec: ConvSpec, factors: Factors) -> Tensor:
        features = self.features(spec, factors)
        return (list(factors.values())[-1].flatten(2) @ features.flatten(2)).unflatten(2, features.shape[2:])

    def features(self, spec: ConvSpec, factors: Factors) -> Tensor:
        first, *taps, _ = factors.values()
        return als.terms_of(first.flatten(2), reduce(torch.mul, taps).flatten(2)).unflatten(3, spec.kernel)

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
