"""Alternating least squares (ALS) for the CP schemes, for all groups of a layer at once and warm-started along ascending ranks.

tensorly's `parafac` takes several times as long to the same error (tests/benchmarks/factorize.py). Here the start is an SVD of the
depthwise slices, which is already close; one large product serves the updates of two factors; and steps are extrapolated (Ang &
Gillis 2019)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

SWEEPS = 200  # limit of sweeps
ROUGH_SWEEPS, WIDE_ROUGH_SWEEPS = 10, 4  # limits for the start of a search on data, which ends lower from here than after more sweeps
ROUGH_SWEEPS_ON_DATA = 40  # the limit where errors are estimated
WORK, ROUGH_WORK = 10**11, 10**10  # limits on data: multiply-accumulates of one large product, added up over the sweeps
WIDE_SWEEPS = 20  # limit in wide layers, which run in float32
WIDE = 2 * 10**7  # a layer is wide if one of the two large products of a sweep needs more multiply-accumulates
STALL = 3e-4  # stop when the last ten sweeps lowered the squared error by less than this share of it per sweep
COMMON = 0.1  # share of the inputs' second moment that all channels have in common
RIDGE = 1e-9  # share of the mean diagonal; it pulls towards the previous iterate, so that no solve raises the error
SINGLE_RIDGE = 1e-5  # the same in float32
PENALTY = 3e-4  # weight of the sum of the terms' squared norms in the error: terms that cancel each other do not survive int8
NEARLY_EXACT = 1e-4  # relative errors below this are lowered further without the penalty, so that a kernel of this form is recovered
MOMENTUM_START, MOMENTUM_GROWTH, MOMENTUM_CAP = 0.5, 1.05, 2.0

# `V[g,o,i,k] = sum_r outputs[g,o,r] inputs[g,i,r] taps[g,k,r]` as (outputs, inputs, taps), or as (outputs, inputs, height, width)
# where taps[g,(y,x),r] = height[g,y,r] width[g,x,r].
Terms = tuple[Tensor, ...]


def sum_of_terms(inputs: Tensor, taps: Tensor, outputs: Tensor) -> Tensor:
    """The kernel (g, o, i, k) of inputs (g, r, i), taps (g, r, k) and outputs (g, o, r)."""
    features = terms_of(inputs, taps)
    return (outputs @ features.flatten(2)).unflatten(2, features.shape[2:])


def terms_of(inputs: Tensor, taps: Tensor) -> Tensor:
    """The outer products (g, r, i, k) of inputs (g, r, i) and taps (g, r, k)."""
    return inputs.unsqueeze(3) * taps.unsqueeze(2)


def decompose(tensor: Tensor, tap_shape: tuple[int, ...], ranks: list[int], full_rank: int, rough: bool = False) -> Iterator[Terms]:
    """Yield the CP terms of a kernel for each of the ascending ranks; the error never grows with the rank, unless `rough`.

    The squared error is weighted with the second moment `E[x_i x_j] = (1 - c) [i = j] + c` of the input channels, c = COMMON: after
    a ReLU all channels are positive, so they share a mean. This raises the plain error of the weights by three percent and saves up
    to four points of accuracy (tests/benchmarks/data_free.py). A penalty on the terms' squared norms keeps them from cancelling each
    other (the degeneracy of CP; Phan et al. 2020), which also helps the search.

    Args:
        tensor: float64 kernels, (g, o, i, k).
        tap_shape: (k,) for one factor of taps, (height, width) for two.
        ranks: terms per group.
        full_rank: from this rank on, the exact form is returned without iterations.
        rough: stop after a few sweeps.
    """
    result: Terms | None = None
    error = math.inf
    strength = (1 + tensor.shape[2] * COMMON / (1 - COMMON)) ** 0.5
    weighted = _scale_mean(tensor, 2, strength)
    for rank in ranks:
        if rank >= full_rank:
            yield _exact(tensor, tap_shape, full_rank)
            continue
        if result is None:
            start = _slice_terms(tensor, tap_shape, rank)
        else:  # add the strongest terms of the residual
            rest = tensor - _kernel(_in_precision(tensor, result)).double()
            further = _slice_terms(rest, tap_shape, rank - result[1].shape[-1])
            start = tuple(torch.cat(pair, -1) for pair in zip(result, further, strict=True))
        wide = tensor.numel() * rank > WIDE
        limit = (WIDE_ROUGH_SWEEPS if rough else WIDE_SWEEPS) if wide else (ROUGH_SWEEPS if rough else SWEEPS)
        swept = _sweep_until_stalled(weighted, _balanced(_scale_input_mean(start, strength)), limit)
        candidate = _balanced(_scale_input_mean(swept, 1 / strength))
        if not rough and len(ranks) > 1:  # the plain error, which reports show, must not grow
            previous, error = error, _error(tensor, candidate)
            if error > previous:
                candidate = _sweep_until_stalled(tensor, _balanced(start), limit)
                error = _error(tensor, candidate)
        result = candidate
        yield result


def decompose_whitened(tensor: Tensor, tap_shape: tuple[int, ...], rank: int, rough: bool = False) -> Terms:
    """The CP terms of a kernel (g, o, i, k) in coordinates where its plain error counts; `rough` stops earlier."""
    most, work = (ROUGH_SWEEPS_ON_DATA, ROUGH_WORK) if rough else (SWEEPS, WORK)
    limit = min(most, max(WIDE_ROUGH_SWEEPS, work // (tensor.numel() * rank)))
    return _sweep_until_stalled(tensor, _balanced(_slice_terms(tensor, tap_shape, rank)), limit)


def _in_precision(tensor: Tensor, terms: Terms) -> Terms:
    """The terms in float32 if the layer is wide and the numbers are in its range; else in float64."""
    wide = tensor.numel() * terms[1].shape[-1] > WIDE
    dtype = torch.float32 if wide and 1e-12 < float(tensor.square().sum()) < 1e12 else torch.float64
    return tuple(factor.to(dtype) for factor in terms)


def _scale_mean(tensor: Tensor, dim: int, scale: float) -> Tensor:
    """Scale the mean along a dimension, but not the deviations: a factor times the square root of `(1 - c) identity + c`."""
    return tensor + (scale - 1) * tensor.mean(dim, keepdim=True)


def _scale_input_mean(terms: Terms, scale: float) -> Terms:
    outputs, inputs, *taps = terms
    return (outputs, _scale_mean(inputs, 1, scale), *taps)


def _all_taps(taps: Sequence[Tensor]) -> Tensor:
    """The tap factor (g, k, r): the only one, or the Khatri-Rao product of two."""
    return taps[0] if len(taps) == 1 else torch.einsum("gyr,gxr->gyxr", *taps).flatten(1, 2)


def _kernel(terms: Terms) -> Tensor:
    outputs, inputs, *taps = terms
    return sum_of_terms(inputs.mT, _all_taps(taps).mT, outputs)


def _error(tensor: Tensor, terms: Terms) -> float:
    return float((tensor - _kernel(terms)).square().sum())


def _term_energy(terms: Terms) -> float:
    """The sum of the squared norms of all terms."""
    return float(torch.stack([factor.square().sum(1) for factor in terms]).prod(0).sum(dtype=torch.float64))


def _balanced(terms: Terms) -> Terms:
    """The same sum, with each term's norm shared evenly by its factors."""
    norms = [torch.linalg.vector_norm(factor, dim=1, keepdim=True).clamp(min=1e-30) for factor in terms]
    target = torch.stack(norms).log().mean(0).exp()
    return tuple(factor * (target / norm) for factor, norm in zip(terms, norms, strict=True))


def _slice_terms(tensor: Tensor, tap_shape: tuple[int, ...], count: int) -> Terms:
    """The `count` strongest singular components of all depthwise slices, by input or by output channel: the set of more energy."""
    energy_by_input, (inputs, outputs, *taps) = _strongest(tensor.transpose(1, 2), tap_shape, count)
    energy_by_output, by_output = _strongest(tensor, tap_shape, count)
    return (outputs, inputs, *taps) if energy_by_input >= energy_by_output else by_output


def _strongest(slices: Tensor, tap_shape: tuple[int, ...], count: int) -> tuple[float, Terms]:
    """The strongest components of slices (g, s, c, k): their energy; one-hot (g, s, r), scaled left vectors (g, c, r), taps."""
    scaled, values, right = _components(slices)
    taps = [right]
    if len(tap_shape) == 2:  # split each tap vector into outer products; each of them is a term
        u, s, v = torch.linalg.svd(right.unflatten(-1, tap_shape), full_matrices=False)  # g s j y t, g s j t, g s j t x
        scaled = scaled.unsqueeze(3).expand(*s.shape, -1).flatten(2, 3)
        taps = [(u * s.unsqueeze(-2)).mT.flatten(2, 3), v.flatten(2, 3)]
        values = (values.unsqueeze(-1) * s).flatten(2)
    chosen = values.flatten(1).topk(count).indices  # g r, an index into the flattened (s, j)
    energy = float(values.flatten(1).gather(1, chosen).square().sum())
    slice_of_term = one_hot(chosen // values.shape[2], slices.shape[1]).to(slices.dtype)
    rows = (factor.flatten(1, 2) for factor in (scaled, *taps))  # g (s j) c
    return energy, (slice_of_term.mT, *(row.gather(1, chosen.unsqueeze(-1).expand(-1, -1, row.shape[2])).mT for row in rows))


def _components(slices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular components of slices (g, s, c, k): scaled left vectors (g, s, j, c), values (g, s, j), right vectors (g, s, j, k).

    Where taps are few, eigenvectors of the second moment of the taps take half the time of an SVD on the CPU. CUDA decomposes small
    symmetric matrices all at once, but other matrices one after the other.
    """
    if slices.shape[2] < slices.shape[3]:
        left, values, right = torch.linalg.svd(slices, full_matrices=False)
        return (left * values.unsqueeze(-2)).mT, values, right
    right = torch.linalg.eigh(slices.mT @ slices)[1].flip(-1).mT
    scaled = right @ slices.mT
    return scaled, torch.linalg.vector_norm(scaled, dim=-1), right


def _sweep_until_stalled(tensor: Tensor, start: Terms, limit: int) -> Terms:
    """Extrapolated alternating least squares; the error of the result, with the penalty, is not above that of the start."""
    norm = float(tensor.square().sum())
    if norm == 0:
        return start
    terms, error = _search(tensor, norm, start, limit, PENALTY)
    return _search(tensor, norm, terms, limit, 0.0)[0] if error - PENALTY * _term_energy(terms) / norm < NEARLY_EXACT else terms


def _search(tensor: Tensor, norm: float, start: Terms, limit: int, penalty: float) -> tuple[Terms, float]:
    """The terms, and their error with the penalty, relative to the norm."""
    best = _in_precision(tensor, start)
    wide = tensor.numel() * start[1].shape[-1] > WIDE
    tensor = tensor.to(best[0].dtype)
    by_output, by_input = tensor.permute(0, 3, 1, 2).contiguous(), tensor.permute(0, 3, 2, 1).contiguous()  # g k o i, g k i o
    best_error = (_error(tensor, best) + penalty * _term_energy(best)) / norm
    point, momentum, history = best, MOMENTUM_START, [best_error]
    for _ in range(limit):
        terms, explained = _sweep(by_output, by_input, point, 1 if wide else 2, penalty)
        error = 1 - explained / norm
        if error < best_error:
            terms = _balanced(terms)
            point = tuple(new + momentum * (new - old) for new, old in zip(terms, best, strict=True))
            best, best_error = terms, error
            momentum = min(momentum * MOMENTUM_GROWTH, MOMENTUM_CAP)
        elif point is best:
            break  # a sweep without extrapolation does not help either: only rounding errors are left
        else:
            point, momentum = best, momentum / 2
        history.append(best_error)
        if len(history) > 10 and history[-11] - best_error < 10 * STALL * best_error:
            break
    return (tuple(factor.double() for factor in best) if best_error < history[0] else start), best_error


def _sweep(by_output: Tensor, by_input: Tensor, terms: Terms, repeats: int, penalty: float) -> tuple[Terms, float]:
    """Update every factor once; return the terms and the squared norm that they explain, less the penalty.

    `repeats`: how often taps and channels are updated for each large product; twice costs little in narrow layers.
    """
    outputs, inputs, *taps = terms
    inputs_gram = _gram(inputs)
    taps, outputs, outputs_gram, _ = _half_sweep(by_input, inputs, inputs_gram, outputs, _gram(outputs), taps, repeats, penalty)
    taps, inputs, inputs_gram, matched = _half_sweep(by_output, outputs, outputs_gram, inputs, inputs_gram, taps, repeats, penalty)
    product = (matched * inputs).sum(dtype=torch.float64)
    squares = outputs_gram * inputs_gram * _gram(_all_taps(taps))
    square = squares.sum(dtype=torch.float64) + penalty * squares.diagonal(dim1=-2, dim2=-1).sum(dtype=torch.float64)
    return (outputs, inputs, *taps), float(2 * product - square)


def _half_sweep(
    tensor: Tensor, fixed: Tensor, fixed_gram: Tensor, channels: Tensor, gram: Tensor, taps: list[Tensor], repeats: int, penalty: float
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Update the taps and one side's channels c (g, c, r) for the tensor (g, k, f, c), given the other side's, fixed (g, f, r).

    Returns the taps, the channels, their gram and the right side of the channels' equations.
    """
    products = fixed.mT.unsqueeze(1) @ tensor  # g k r c
    for _ in range(repeats):
        taps = _update_taps(taps, (products * channels.mT.unsqueeze(1)).sum(-1), gram * fixed_gram, penalty)
        all_taps = _all_taps(taps)
        matched = (products * all_taps.unsqueeze(-1)).sum(1).mT
        channels = _solve(matched, _gram(all_taps) * fixed_gram, channels, penalty)
        gram = _gram(channels)
    return taps, channels, gram, matched


def _update_taps(taps: Sequence[Tensor], matched: Tensor, gram: Tensor, penalty: float) -> list[Tensor]:
    if len(taps) == 1:
        return [_solve(matched, gram, taps[0], penalty)]
    height, width = taps
    matched = matched.unflatten(1, (height.shape[1], width.shape[1]))
    height = _solve(torch.einsum("gyxr,gxr->gyr", matched, width), gram * _gram(width), height, penalty)
    return [height, _solve(torch.einsum("gyxr,gyr->gxr", matched, height), gram * _gram(height), width, penalty)]


def _gram(factor: Tensor) -> Tensor:
    return factor.mT @ factor


def _solve(matched: Tensor, gram: Tensor, previous: Tensor, penalty: float) -> Tensor:
    """Solve `X gram = matched` for X (g, n, r), with the penalty on the terms and a ridge towards the previous X."""
    share = RIDGE if gram.dtype == torch.float64 else SINGLE_RIDGE
    ridge = share * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)[:, None, None]
    regular = gram + torch.diag_embed(ridge.squeeze(-1) + penalty * gram.diagonal(dim1=-2, dim2=-1))
    factor = torch.linalg.cholesky_ex(regular)[0]  # unchecked, as a check makes a GPU wait: a failed update raises the error, and is undone
    return torch.cholesky_solve((matched + ridge * previous).mT, factor).mT


def _exact(tensor: Tensor, tap_shape: tuple[int, ...], full_rank: int) -> Terms:
    """The exact terms: the factor of one mode (out, in or taps) holds the entries of the tensor, the others are one-hot."""
    tensor = tensor.unflatten(3, tap_shape)
    g, *sizes = tensor.shape
    long = next(mode for mode in (0, 1, len(sizes) - 1, 2) if sizes[mode] * full_rank == math.prod(sizes))
    others = sizes[:long] + sizes[long + 1 :]
    indices = torch.cartesian_prod(*(torch.arange(size, device=tensor.device) for size in others)).T  # the last index is fastest
    factors = [one_hot(index, size).to(tensor.dtype).T.expand(g, -1, -1) for index, size in zip(indices, others, strict=True)]
    return (*factors[:long], tensor.movedim(long + 1, 1).flatten(2), *factors[long:])
