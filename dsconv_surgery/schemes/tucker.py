"""Tucker-2: a 1x1 to few channels, a k x k among few, a 1x1 back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from dsconv_surgery.network.geometry import ConvSpec, Pair, Rank
from dsconv_surgery.schemes.base import Factors, Scheme, rank_pair
from dsconv_surgery.schemes.objective import Objective
from dsconv_surgery.schemes.whitening import approximate_whitened

OFFERED = 24  # ranks per side that the planner may choose: 24 x 24 pairs


class Tucker(Scheme):
    """`V[o,i,y,x] = sum_{p,q} E[o,q] C[q,p,y,x] R[p,i]` at rank (p, q): HOSVD, then HOOI (Kim et al. 2016).

    Groups are decomposed one after the other, so many small groups are slow: 32 groups of 8 channels take 6 to 9 times as long as all
    groups at once would. tensorly's `partial_tucker` takes at least twice as long as this.
    """

    name = "tucker"
    wide_search = 0.9

    def full_rank(self, spec: ConvSpec) -> Pair:
        return spec.in_channels, spec.out_channels

    def ranks(self, spec: ConvSpec) -> Iterable[Pair]:
        return product(_spaced_ranks(spec.in_channels), _spaced_ranks(spec.out_channels))

    def chain(self, spec: ConvSpec, rank: Rank) -> dict[str, ConvSpec]:
        p, q = rank_pair(rank)
        core = replace(spec, in_channels=p, out_channels=q)
        return {"reduce": ConvSpec(spec.in_channels, p), "core": core, "expand": ConvSpec(q, spec.out_channels)}

    def factorize(self, spec: ConvSpec, weight: Tensor, ranks: list[Rank], rough: bool = False) -> Iterator[Factors]:
        from dsconv_surgery.schemes.hooi import ROUGH_SWEEPS, SWEEPS, hooi, hosvd  # here, as tensorly takes a second to import

        groups = weight.flatten(3)  # g, o, i, k
        results = [[hosvd(tensor)] for tensor in groups]
        for rank in ranks:
            p, q = rank_pair(rank)
            for tensor, previous in zip(groups, results, strict=True):
                previous.append(hooi(tensor, (q, p), previous, ROUGH_SWEEPS if rough else SWEEPS))
            core = torch.stack([previous[-1].core for previous in results])
            expand, reduce = (torch.stack([previous[-1].factors[mode] for previous in results]) for mode in (0, 1))
            yield {"reduce": reduce.mT[..., None, None], "core": core.unflatten(3, spec.kernel), "expand": expand[..., None, None]}

    def kernel(self, spec: ConvSpec, factors: Factors) -> Tensor:
        reduce, core, expand = factors["reduce"].flatten(2), factors["core"].flatten(3), factors["expand"].flatten(2)
        return torch.einsum("gpi,gqpk,goq->goik", reduce, core, expand).unflatten(3, factors["core"].shape[3:])

    def approximate(self, spec: ConvSpec, objective: Objective, rank: Rank, rough: bool = False) -> Factors:
        return approximate_whitened(self, spec, objective, rank, rough)

    def spectrum(self, spec: ConvSpec, weight: Tensor) -> Tensor:
        from dsconv_surgery.schemes.hooi import hosvd

        return torch.stack([hosvd(tensor).core for tensor in weight.flatten(3)]).square().sum((0, 3)).mT


def _spaced_ranks(channels: int) -> list[int]:
    return sorted({max(1, round(channels * step / OFFERED)) for step in range(1, OFFERED + 1)})
