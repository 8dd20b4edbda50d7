"""Tucker-2: a 1x1 to few channels, a k x k among few, a 1x1 back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from dsconv_surgery.network.geometry import ConvSpec, Pair, Rank
from dsconv_surgery.schemes.base import Factors, Scheme, rank_pair

SWEEPS = 10  # limit of HOOI; it gains little after two
STALL = 1e-6  # stop when a sweep raises the explained squared norm by less than this share of the kernel's
OFFERED = 24  # ranks per side that the planner may choose: 24 x 24 pairs


class Tucker(Scheme):
    """`V[o,i,y,x] = sum_{p,q} E[o,q] C[q,p,y,x] R[p,i]` at rank (p, q): HOSVD, then HOOI (Kim et al. 2016).

    HOOI (higher-order orthogonal iteration) solves for the basis of one side at a time, given the other.

    tensorly's `partial_tucker` (0.10) does the same, but uses the SVD that it is passed for the start alone, always makes three
    sweeps, takes no batch of groups and pads ranks above a dimension. Measured on 3x3 kernels at half the channels, one thread,
    with our eigenvalue solver as its SVD: 1.6 times our time at 64 and 128 channels, 1.9 at 256, 4.4 to 20 for 32 groups of 32 to
    4 channels, and 0.01 to 0.06 % more error. Our HOOI written with its `unfold` and `multi_mode_dot` finds the same errors in 0.8
    to 1.2 times our time for one group, but in 1.8 to 10 times for 32, as it takes one group after the other.
    """

    name = "tucker"

    def full_rank(self, spec: ConvSpec) -> Pair:
        return spec.in_channels, spec.out_channels

    def ranks(self, spec: ConvSpec) -> Iterable[Pair]:
        return product(_spaced_ranks(spec.in_channels), _spaced_ranks(spec.out_channels))

    def chain(self, spec: ConvSpec, rank: Rank) -> dict[str, ConvSpec]:
        p, q = rank_pair(rank)
        return {
            "reduce": ConvSpec(spec.in_channels, p),
            "core": replace(spec, in_channels=p, out_channels=q),
            "expand": ConvSpec(q, spec.out_channels),
        }

    def factorize(self, spec: ConvSpec, weight: Tensor, ranks: list[Rank], rough: bool = False) -> Iterator[Factors]:
        tensor = weight.flatten(3)  # g, o, i, k
        energy = float(tensor.square().sum())
        hosvd_in, hosvd_out = _basis(tensor.transpose(1, 2)), _basis(tensor)
        previous: list[tuple[float, int, int, Tensor]] = []  # explained, p, q, input basis
        for rank in ranks:
            p, q = rank_pair(rank)
            basis_in, basis_out = hosvd_in[..., :p], hosvd_out[..., :q]
            explained = float(_core(tensor, basis_in, basis_out).square().sum())
            smaller = [result for result in previous if result[1] <= p and result[2] <= q]
            best = max(smaller, key=lambda result: result[0], default=None)
            if best is not None and best[0] > explained:
                # A larger pair must not explain less: start from the best smaller pair, with its input basis completed.
                basis_in = torch.linalg.qr(torch.cat([best[3], hosvd_in], -1))[0][..., :p]
                basis_out = _basis(torch.einsum("goik,gip->gopk", tensor, basis_in))[..., :q]
                explained = float(_core(tensor, basis_in, basis_out).square().sum())
            for _ in range(SWEEPS if (p, q) != self.full_rank(spec) else 0):
                basis_out = _basis(torch.einsum("goik,gip->gopk", tensor, basis_in))[..., :q]
                basis_in = _basis(torch.einsum("goik,goq->giqk", tensor, basis_out))[..., :p]
                before, explained = explained, float(_core(tensor, basis_in, basis_out).square().sum())
                if explained - before <= STALL * energy:
                    break
            previous.append((explained, p, q, basis_in))
            core = _core(tensor, basis_in, basis_out).unflatten(3, spec.kernel)
            yield {"reduce": basis_in.mT[..., None, None], "core": core, "expand": basis_out[..., None, None]}

    def kernel(self, spec: ConvSpec, factors: Factors) -> Tensor:
        reduce, core, expand = factors["reduce"].flatten(2), factors["core"].flatten(3), factors["expand"].flatten(2)
        return torch.einsum("gpi,gqpk,goq->goik", reduce, core, expand).unflatten(3, factors["core"].shape[3:])

    def spectrum(self, spec: ConvSpec, weight: Tensor) -> Tensor:
        tensor = weight.flatten(3)
        core = _core(tensor, _basis(tensor.transpose(1, 2)), _basis(tensor))
        return core.square().sum((0, 3)).mT


def _spaced_ranks(channels: int) -> list[int]:
    return sorted({max(1, round(channels * step / OFFERED)) for step in range(1, OFFERED + 1)})


def _basis(tensor: Tensor) -> Tensor:
    """Left singular vectors, leading first, of the unfolding along the second dimension: (g, a, b, c) -> (g, a, a)."""
    unfolding = tensor.flatten(2)
    return torch.linalg.eigh(unfolding @ unfolding.mT)[1].flip(-1)


def _core(tensor: Tensor, basis_in: Tensor, basis_out: Tensor) -> Tensor:
    """The mode products of the kernel with both bases: (g, q, p, k)."""
    return torch.einsum("goik,gip,goq->gqpk", tensor, basis_in, basis_out)
