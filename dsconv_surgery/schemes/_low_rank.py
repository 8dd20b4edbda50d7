"""The truncated singular value decomposition that the closed-form schemes share."""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 128  # sides up to here are decomposed in float64 at once
GRADED = 1e-3  # eigenvalues below this share of the largest are beyond what float32 separates


def energies(matrix: Tensor) -> Tensor:
    """Squared singular values, largest first: (..., a, b) -> (..., min(a, b)).

    From the smaller Gram matrix: cheaper by far than an SVD, and exact to rounding in float64 as only squares are wanted.
    """
    return torch.linalg.eigvalsh(_small_gram(matrix)).flip(-1).clamp(min=0)


def truncated(matrix: Tensor, ranks: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Best factors `left @ right` of each rank: (..., a, r) and (..., r, b), both sides sharing a component's norm evenly.

    One side is a basis of the leading singular vectors, the other the matrix projected on it. An inaccuracy e of the basis so
    enters the error as e squared, which is why float32 eigenvectors do for wide layers: 1e-12 of error for half the time.
    """
    basis = leading(matrix, max(ranks))
    wide = matrix.shape[-2] <= matrix.shape[-1]
    left, right = (basis, basis.mT @ matrix) if wide else (matrix @ basis, basis.mT)
    norms = torch.linalg.vector_norm(left, dim=-2) * torch.linalg.vector_norm(right, dim=-1)
    share = torch.where(norms > 0, norms, 1.0).sqrt()
    up, down = (left, right) if wide else (right.mT, left.mT)
    up, down = up * share.unsqueeze(-2), down / share.unsqueeze(-1)
    left, right = (up, down) if wide else (down.mT, up.mT)
    return [(left[..., :rank], right[..., :rank, :]) for rank in ranks]


def leading(matrix: Tensor, count: int) -> Tensor:
    """Leading singular vectors of the shorter side, as columns: (..., min(a, b), count)."""
    if min(matrix.shape[-2:]) > SMALL:
        scale = matrix.abs().amax().clamp(min=1e-300)  # squares must neither overflow nor vanish
        values, vectors = torch.linalg.eigh(_small_gram((matrix / scale).float()))
        if bool((values[..., -count] > GRADED * values[..., -1]).all()):
            return vectors.flip(-1)[..., :count].to(matrix.dtype)
    return torch.linalg.eigh(_small_gram(matrix))[1].flip(-1)[..., :count]


def _small_gram(matrix: Tensor) -> Tensor:
    return matrix @ matrix.mT if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT @ matrix
