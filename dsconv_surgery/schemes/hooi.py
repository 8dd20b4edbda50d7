"""Tucker-2 decomposition of one group's kernel (out, in, taps) in tensorly's terms: HOSVD, then higher-order orthogonal iteration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import tensorly
import torch
from tensorly.tenalg import multi_mode_dot
from tensorly.tucker_tensor import TuckerTensor
from torch import Tensor

SWEEPS, ROUGH_SWEEPS = 10, 2  # limits; more than two gain little
STALL = 1e-6  # stop when a sweep raises the explained squared norm by less than this share of the kernel's


@contextmanager
def _pytorch_backend() -> Iterator[None]:
    """Switch this thread alone; `tensorly.backend_context` would restore the caller's backend in all threads."""
    previous = tensorly.get_backend()
    tensorly.set_backend("pytorch", local_threadsafe=True)
    try:
        yield
    finally:
        tensorly.set_backend(previous, local_threadsafe=True)


@_pytorch_backend()
def hosvd(tensor: Tensor) -> TuckerTensor:
    """The exact form, with the strongest directions of both channel modes first. The factor of the taps is the identity."""
    outputs, inputs = _singular_vectors(tensor, 0), _singular_vectors(tensor, 1)
    return _tucker_2(multi_mode_dot(tensor, [outputs.T, inputs.T]), outputs, inputs)


@_pytorch_backend()
def hooi(tensor: Tensor, rank: tuple[int, int], previous: list[TuckerTensor], sweeps: int = SWEEPS) -> TuckerTensor:
    """The form of a rank (out, in) that explains no less than any smaller of the previous results, of which the first is `hosvd`'s."""
    exact_core, (_, exact_inputs, _) = previous[0]
    if exact_core.shape[:2] == rank:
        return previous[0]
    q, p = rank
    inputs, explained = exact_inputs[:, :p], _energy(exact_core[:q, :p])
    smaller = [result for result in previous if result.rank[0] <= q and result.rank[1] <= p]
    best = max(smaller, key=lambda result: _energy(result.core), default=None)
    if best is not None and _energy(best.core) > explained:  # start from the best one, with its input basis completed
        inputs = torch.linalg.qr(torch.cat([best.factors[1], exact_inputs], 1))[0][:, :p]
        explained = _energy(_core_and_basis(tensor, inputs, 1, q)[0])
    for _ in range(sweeps):
        _, outputs = _core_and_basis(tensor, inputs, 1, q)
        core, inputs = _core_and_basis(tensor, outputs, 0, p)
        before, explained = explained, _energy(core)
        if explained - before <= STALL * _energy(tensor):
            break
    return _tucker_2(core, outputs, inputs)


def _core_and_basis(tensor: Tensor, basis: Tensor, mode: int, rank: int) -> tuple[Tensor, Tensor]:
    """For a basis of one channel mode, the best basis of the other and the core."""
    projected = multi_mode_dot(tensor, [basis.T], [mode])
    other = _singular_vectors(projected, 1 - mode)[:, :rank]
    return multi_mode_dot(projected, [other.T], [1 - mode]), other


def _singular_vectors(tensor: Tensor, mode: int) -> Tensor:
    unfolding = tensorly.unfold(tensor, mode)
    return torch.linalg.eigh(unfolding @ unfolding.T)[1].flip(-1)


def _tucker_2(core: Tensor, outputs: Tensor, inputs: Tensor) -> TuckerTensor:
    return TuckerTensor((core, [outputs, inputs, torch.eye(core.shape[2], dtype=core.dtype, device=core.device)]))


def _energy(tensor: Tensor) -> float:
    return float(tensor.square().sum())
