"""Tucker-2: a 1x1 to few channels, a k x k among few, a 1x1 back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from dsconv_surgery.network.geometry import ConvSpec, Pair, Rank
from dsconv_surgery.schemes.base import Factors, one_tap, pair
from dsconv_surgery.schemes.objective import Objective

SWEEPS = 10  # at most; HOOI gains little after two
STALL = 1e-6  # stop when a sweep explains less than this share of the norm more
OFFERED = 24  # ranks per side that a rule is offered: 24 x 24 pairs instead of every one


class Tucker:
    """`V[o,i,y,x] = sum_{p,q} E[o,q] C[q,p,y,x] R[p,i]`, rank (p, q): HOSVD, then higher-order orthogonal iteration (Kim et al. 2016).

    Written here and not with tensorly's `partial_tucker`: the two leading eigenspaces of small Gram matrices stand in for its
    SVDs, groups go as a batch, and a rank above its dimension is an error and not silently padded (tests/benchmarks/factorize.py).
    """

    name = "tucker"

    def refuses(self, spec: ConvSpec) -> str | None:
        return one_tap(spec)

    def full_rank(self, spec: ConvSpec) -> Pair:
        return spec.in_channels, spec.out_channels

    def ranks(self, spec: ConvSpec) -> Iterable[Pair]:
        return product(_offered(spec.in_channels), _offered(spec.out_channels))

    def chain(self, spec: ConvSpec, rank: Rank) -> dict[str, ConvSpec]:
        p, q = pair(rank)
        return {
            "reduce": ConvSpec(spec.in_channels, p),
            "core": replace(spec, in_channels=p, out_channels=q),
            "expand": ConvSpec(q, spec.out_channels),
        }

    def factorize(self, spec: ConvSpec, weight: Tensor, ranks: list[Rank], rough: bool = False) -> Iterator[Factors]:
        tensor = weight.flatten(3)  # g, o, i, k
        energy = float(tensor.square().sum())
        first_in, first_out = _basis(tensor.transpose(1, 2)), _basis(tensor)
        done: list[tuple[float, int, int, Tensor]] = []
        for rank in ranks:
            p, q = pair(rank)
            side_in, side_out = first_in[..., :p], first_out[..., :q]
            explained = float(_project(tensor, side_in, side_out).square().sum())
            smaller = [found for found in done if found[1] <= p and found[2] <= q]
            if smaller and (best := max(smaller, key=lambda found: found[0]))[0] > explained:
                # A larger pair must never explain less: start from the best smaller one, its subspace completed.
                side_in = torch.linalg.qr(torch.cat([best[3], first_in], -1))[0][..., :p]
                side_out = _basis(torch.einsum("goik,gip->gopk", tensor, side_in))[..., :q]
                explained = float(_project(tensor, side_in, side_out).square().sum())
            for _ in range(SWEEPS if (p, q) != self.full_rank(spec) else 0):
                side_out = _basis(torch.einsum("goik,gip->gopk", tensor, side_in))[..., :q]
                side_in = _basis(torch.einsum("goik,goq->giqk", tensor, side_out))[..., :p]
                before, explained = explained, float(_project(tensor, side_in, side_out).square().sum())
                if explained - before <= STALL * energy:
                    break
            done.append((explained, p, q, side_in))
            core = _project(tensor, side_in, side_out)
            yield {
                "reduce": side_in.mT[..., None, None],
                "core": core.unflatten(3, weight.shape[3:]),
                "expand": side_out[..., None, None],
            }

    def optimum(self, spec: ConvSpec, objective: Objective, rank: Rank) -> None:
        return None

    def kernel(self, spec: ConvSpec, factors: Factors) -> Tensor:
        reduce, core, expand = factors["reduce"].flatten(2), factors["core"].flatten(3), factors["expand"].flatten(2)
        return torch.einsum("gpi,gqpk,goq->goik", reduce, core, expand).unflatten(3, factors["core"].shape[3:])

    def spectrum(self, spec: ConvSpec, weight: Tensor) -> Tensor:
        tensor = weight.flatten(3)
        core = _project(tensor, _basis(tensor.transpose(1, 2)), _basis(tensor))
        return core.square().sum((0, 3)).mT


def _offered(channels: int) -> list[int]:
    return sorted({max(1, round(channels * step / OFFERED)) for step in range(1, OFFERED + 1)})


def _basis(tensor: Tensor) -> Tensor:
    """Eigenvectors, leading first, of the Gram matrix of the second dimension: (g, a, b, c) -> (g, a, a)."""
    unfolding = tensor.flatten(2)
    return torch.linalg.eigh(unfolding @ unfolding.mT)[1].flip(-1)


def _project(tensor: Tensor, side_in: Tensor, side_out: Tensor) -> Tensor:
    return torch.einsum("goik,gip,goq->gqpk", tensor, side_in, side_out)
