"""The truncated singular value decomposition that the closed-form schemes share."""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 128  # sides up to here are decomposed in float64 at once
GRADED = 1e-3  # eigenvalues below this share of the largest are beyond what float32 separates


def squared_singular_values(matrix: Tensor) -> Tensor:
    """Squared singular values, largest first: (..., a, b) -> (..., min(a, b)).

    From the smaller Gram matrix: cheaper by far than an SVD, and exact to rounding in float64 as only squares are wanted.
    """
    return torch.linalg.eigvalsh(_small_gram(matrix), UPLO="U").flip(-1).clamp(min=0)


def truncated_svd(matrix: Tensor, ranks: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Best factors `left @ right` of each rank: (..., a, r) and (..., r, b), both sides sharing a component's norm evenly.

    One side is a basis of the leading singular vectors, the other the matrix projected on it. An inaccuracy e of the basis so
    enters the error as e squared, which is why float32 eigenvectors do for wide layers: 1e-12 of error for half the time.
    """
    basis = leading_vectors(matrix, max(ranks))
    precise, matrix = matrix.dtype, matrix.to(basis.dtype)
    wide = matrix.shape[-2] <= matrix.shape[-1]
    left, right = (basis, basis.mT @ matrix) if wide else (matrix @ basis, basis.mT)
    norms = torch.linalg.vector_norm(left, dim=-2) * torch.linalg.vector_norm(right, dim=-1)
    share = torch.where(norms > 0, norms, 1.0).sqrt()
    up, down = (left, right) if wide else (right.mT, left.mT)
    up, down = up * share.unsqueeze(-2), down / share.unsqueeze(-1)
    left, right = (up, down) if wide else (down.mT, up.mT)
    left, right = left.to(precise), right.to(precise)
    return [(left[..., :rank], right[..., :rank, :]) for rank in ranks]


def leading_vectors(matrix: Tensor, count: int) -> Tensor:
    """Leading singular vectors of the shorter side, as columns: (..., min(a, b), count), in float32 where that is enough."""
    if min(matrix.shape[-2:]) > SMALL and 1e-12 < float(matrix.abs().amax()) < 1e12:  # squares neither vanish nor overflow
        values, vectors = torch.linalg.eigh(_small_gram(matrix.float()), UPLO="U")
        if bool((values[..., -count] > GRADED * values[..., -1]).all()):
            return vectors[..., -count:].flip(-1)
    return torch.linalg.eigh(_small_gram(matrix), UPLO="U")[1][..., -count:].flip(-1)


def _small_gram(matrix: Tensor) -> Tensor:
    """The Gram matrix of the shorter side; of a wide one only the upper blocks, all that eigh is told to read."""
    rows = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    side = rows.shape[-2]
    if side <= 4 * SMALL:
        return rows @ rows.mT
    gram = rows.new_zeros(*rows.shape[:-1], side)
    for start in range(0, side, SMALL):
        stop = start + SMALL
        gram[..., start:stop, start:] = rows[..., start:stop, :] @ rows[..., start:, :].mT
    return gram
