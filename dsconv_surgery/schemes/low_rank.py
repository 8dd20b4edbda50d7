"""The truncated singular value decomposition (SVD), and the base class of the schemes that consist of one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from dsconv_surgery.network.geometry import ConvSpec, Rank
from dsconv_surgery.schemes.base import Factors, Scheme, single_rank

SMALL = 128  # matrices with a shorter side are decomposed in float64
GRADED = 1e-3  # float32 does not resolve eigenvalues below this share of the largest


class LowRank(Scheme):
    """A scheme whose factors are the truncated SVD of an unfolding of the kernel, which is optimal at every rank."""

    @abstractmethod
    def unfold(self, weight: Tensor) -> Tensor:
        """The kernel (groups, out, in, height, width) as matrices (groups, ..., rows, columns)."""

    @abstractmethod
    def links(self, spec: ConvSpec, left: Tensor, right: Tensor) -> Factors:
        """The factors for the unfolding `left @ right`: (groups, ..., rows, rank) and (groups, ..., rank, columns)."""

    def factorize(self, spec: ConvSpec, weight: Tensor, ranks: list[Rank], rough: bool = False) -> Iterator[Factors]:
        for left, right in truncated_svd(self.unfold(weight), [single_rank(rank) for rank in ranks]):
            yield self.links(spec, left, right)

    def spectrum(self, spec: ConvSpec, weight: Tensor) -> Tensor:
        squares = squared_singular_values(self.unfold(weight))
        return squares.sum(tuple(range(squares.ndim - 1)))


def squared_singular_values(matrix: Tensor) -> Tensor:
    """Squared singular values, largest first: (..., a, b) -> (..., min(a, b)).

    The eigenvalues of the smaller Gram matrix cost less than an SVD, and squares lose no accuracy by it in float64.
    """
    return torch.linalg.eigvalsh(_small_gram(matrix), UPLO="U").flip(-1).clamp(min=0)


def truncated_svd(matrix: Tensor, ranks: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Optimal factors `left @ right` at each rank: (..., a, r) and (..., r, b), each component's norm shared evenly.

    One factor is a basis of the leading singular vectors, the other the projected matrix. An error e of the basis adds e squared
    to the error of the product. Float32 eigenvectors are therefore enough for wide layers: they add 1e-12 and take half the time.
    """
    basis = leading_vectors(matrix, max(ranks))
    dtype, matrix, wide = matrix.dtype, matrix.to(basis.dtype), matrix.shape[-2] <= matrix.shape[-1]
    projected = basis.mT @ matrix if wide else (matrix @ basis).mT
    norms = torch.linalg.vector_norm(basis, dim=-2) * torch.linalg.vector_norm(projected, dim=-1)
    scale = torch.where(norms > 0, norms, 1.0).sqrt()
    basis, projected = (basis * scale.unsqueeze(-2)).to(dtype), (projected / scale.unsqueeze(-1)).to(dtype)
    left, right = (basis, projected) if wide else (projected.mT, basis.mT)
    return [(left[..., :rank], right[..., :rank, :]) for rank in ranks]


def leading_vectors(matrix: Tensor, count: int) -> Tensor:
    """The leading singular vectors of the shorter side: (..., min(a, b), count), in float32 where that is accurate enough."""
    if min(matrix.shape[-2:]) > SMALL and 1e-12 < float(matrix.abs().amax()) < 1e12:  # float32 squares neither vanish nor overflow
        values, vectors = torch.linalg.eigh(_small_gram(matrix.float()), UPLO="U")
        if bool((values[..., -count] > GRADED * values[..., -1]).all()):
            return vectors[..., -count:].flip(-1)
    return torch.linalg.eigh(_small_gram(matrix), UPLO="U")[1][..., -count:].flip(-1)


def _small_gram(matrix: Tensor) -> Tensor:
    """The Gram matrix of the shorter side. For large ones only the blocks of the upper triangle are computed: eigh reads no others."""
    rows = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    side = rows.shape[-2]
    if side <= 4 * SMALL:
        return rows @ rows.mT
    gram = rows.new_zeros(*rows.shape[:-1], side)
    for start in range(0, side, SMALL):
        stop = start + SMALL
        gram[..., start:stop, start:] = rows[..., start:stop, :] @ rows[..., start:, :].mT
    return gram
