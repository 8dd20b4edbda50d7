"""The truncated singular value decomposition that the closed-form schemes share."""

from __future__ import annotations

import torch
from torch import Tensor


def energies(matrix: Tensor) -> Tensor:
    """Squared singular values, largest first: (..., a, b) -> (..., min(a, b)).

    From the smaller Gram matrix: cheaper by far than an SVD, and exact to rounding in float64 as only squares are wanted.
    """
    return torch.linalg.eigvalsh(_small_gram(matrix)).flip(-1).clamp(min=0)


def truncated(matrix: Tensor, ranks: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Best factors `left @ right` of each rank: (..., a, r) and (..., r, b), both sides sharing a component's norm evenly.

    One side is an orthonormal basis of the leading singular vectors, the other the matrix projected on it, so that the product
    is a projection whatever the eigenvectors' accuracy.
    """
    top = max(ranks)
    basis = torch.linalg.eigh(_small_gram(matrix))[1].flip(-1)[..., :top]
    if matrix.shape[-2] <= matrix.shape[-1]:
        left, right = basis, basis.mT @ matrix
    else:
        left, right = matrix @ basis, basis.mT
    norms = torch.linalg.vector_norm(left, dim=-2) * torch.linalg.vector_norm(right, dim=-1)
    share = torch.where(norms > 0, norms, 1.0).sqrt()
    if matrix.shape[-2] <= matrix.shape[-1]:
        left, right = left * share.unsqueeze(-2), right / share.unsqueeze(-1)
    else:
        left, right = left / share.unsqueeze(-2), right * share.unsqueeze(-1)
    return [(left[..., :rank], right[..., :rank, :]) for rank in ranks]


def _small_gram(matrix: Tensor) -> Tensor:
    return matrix @ matrix.mT if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT @ matrix
