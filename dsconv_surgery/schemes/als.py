"""Alternating least squares for the CP schemes: batched over groups, warm-started along ascending ranks.

Written here and not with tensorly's `parafac`, which takes several times as long to the same error (tests/benchmarks/factorize.py):
we start at an SVD of the depthwise slices, which is close already; one large product serves the updates of two factors; steps
are extrapolated (Ang & Gillis 2019); and all groups of a layer go at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SWEEPS = 200  # at most,
ROUGH_SWEEPS = 10  # to start a search for data with, which ends lower from here than from where more sweeps lead
WIDE_SWEEPS = 40  # or this many in wide layers, in float32, where a sweep takes long:
WIDE = 2 * 10**7  # multiply-accumulates of one of its two large products
STALL = 3e-4  # stop when the last ten sweeps lowered the squared error by less than this share of it per sweep
COMMON = 0.1  # part of the inputs' second moment that all channels share
RIDGE = 1e-9  # of the mean diagonal; pulls towards the previous iterate, so that a solve never makes matters worse
SINGLE_RIDGE = 1e-5  # the same in float32
MOMENTUM_START, MOMENTUM_GROWTH, MOMENTUM_CAP = 0.5, 1.05, 2.0


@dataclass(frozen=True)
class Terms:
    """`V[g,o,i,k] = sum_r outputs[g,o,r] inputs[g,i,r] taps[g,k,r]`; taps as one factor, or as two whose outer product they are."""

    outputs: Tensor
    inputs: Tensor
    taps: tuple[Tensor, ...]

    @property
    def all_taps(self) -> Tensor:
        return self.taps[0] if len(self.taps) == 1 else torch.einsum("gyr,gxr->gyxr", *self.taps).flatten(1, 2)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return (self.outputs, self.inputs, *self.taps)

    def kernel(self) -> Tensor:
        return (self.outputs @ torch.einsum("gir,gkr->grik", self.inputs, self.all_taps).flatten(2)).unflatten(
            2, (self.inputs.shape[1], -1)
        )

    def balanced(self) -> Terms:
        """The same sum, each term's norm shared evenly by its factors."""
        norms = [torch.linalg.vector_norm(factor, dim=1, keepdim=True).clamp(min=1e-30) for factor in self.factors]
        share = torch.stack(norms).log().mean(0).exp()
        return _terms(factor * (share / norm) for factor, norm in zip(self.factors, norms, strict=True))


def decompose(tensor: Tensor, tap_shape: tuple[int, ...], ranks: list[int], full_rank: int, rough: bool = False) -> Iterator[Terms]:
    """CP terms of (g, o, i, k) for each of the ascending ranks, never worse than those of the rank before.

    The squared error is taken under `E[x_i x_j] = (1 - c) [i = j] + c` (c = COMMON), not under the identity: after a ReLU all
    channels are positive and so have a mean in common, which a replacement had better get right. This costs three percent of
    plain weight error and keeps up to four points of accuracy (tests/benchmarks/data_free.py).

    Args:
        tensor: float64 kernels, taps merged into one dimension.
        tap_shape: (k,) for one factor of taps, (height, width) for two.
        ranks: terms per group.
        full_rank: from here on the exact, unfactored form is written down.
        rough: stop after a few sweeps.
    """
    found: Terms | None = None
    strength = (1 + tensor.shape[2] * COMMON / (1 - COMMON)) ** 0.5
    emphasised = _scale_mean(tensor, 2, strength)
    for rank in ranks:
        if rank >= full_rank:
            yield _exact(tensor, tap_shape, full_rank)
            continue
        if found is not None and rank == found.inputs.shape[-1]:
            yield found
            continue
        if found is None:
            start = _slice_terms(tensor, tap_shape, rank)
        else:  # what is there already, and the strongest of what it leaves
            further = _slice_terms(tensor - found.kernel(), tap_shape, rank - found.inputs.shape[-1])
            start = _terms(torch.cat(both, -1) for both in zip(found.factors, further.factors, strict=True))
        better = _common_mean(_sweep_until_stalled(emphasised, _common_mean(start, strength).balanced(), rough), 1 / strength).balanced()
        if found is not None and _error(tensor, better) > _error(tensor, found):
            better = _sweep_until_stalled(tensor, start.balanced(), rough)  # plain error, which is what is reported, must never grow
        found = better
        yield found


def _scale_mean(tensor: Tensor, dim: int, by: float) -> Tensor:
    """Multiply the mean along a dimension, leaving what deviates from it: the root of `(1 - c) identity + c`, up to a factor."""
    return tensor + (by - 1) * tensor.mean(dim, keepdim=True)


def _common_mean(terms: Terms, by: float) -> Terms:
    return Terms(terms.outputs, _scale_mean(terms.inputs, 1, by), terms.taps)


def _error(tensor: Tensor, terms: Terms) -> float:
    return float((tensor - terms.kernel()).square().sum())


def _terms(factors: Iterator[Tensor]) -> Terms:
    outputs, inputs, *taps = factors
    return Terms(outputs, inputs, tuple(taps))


def _slice_terms(tensor: Tensor, tap_shape: tuple[int, ...], count: int) -> Terms:
    """The `count` strongest singular components among all depthwise slices: by input channel or by output channel, the better."""
    by_input = _strongest(tensor.transpose(1, 2), tap_shape, count)
    by_output = _strongest(tensor, tap_shape, count)
    if by_input[0] >= by_output[0]:
        _, inputs, outputs, taps = by_input
    else:
        _, outputs, inputs, taps = by_output
    return Terms(outputs, inputs, taps)


def _strongest(slices: Tensor, tap_shape: tuple[int, ...], count: int) -> tuple[float, Tensor, Tensor, tuple[Tensor, ...]]:
    """Of slices (g, s, c, k): energy explained, one-hot (g, s, r), scaled left vectors (g, c, r), taps."""
    left, values, right = torch.linalg.svd(slices, full_matrices=False)  # g s c j, g s j, g s j k
    slice_count = values.shape[1]
    scaled = (left * values.unsqueeze(-2)).mT  # g s j c
    taps: tuple[Tensor, ...] = (right,)
    if len(tap_shape) == 2:  # each tap vector as a sum of outer products, a term each
        u, s, v = torch.linalg.svd(right.unflatten(-1, tap_shape), full_matrices=False)  # g s j y t, g s j t, g s j t x
        scaled = scaled.unsqueeze(3).expand(*s.shape, -1).flatten(2, 3)
        taps = ((u * s.unsqueeze(-2)).mT.flatten(2, 3), v.flatten(2, 3))
        values = (values.unsqueeze(-1) * s).flatten(2)
    chosen = values.flatten(1).topk(count).indices  # g r, counting through s and j
    energy = float(values.flatten(1).gather(1, chosen).square().sum())
    one_hot = torch.nn.functional.one_hot(chosen // values.shape[2], slice_count).to(slices.dtype)
    return energy, one_hot.mT, _pick(scaled.flatten(1, 2), chosen), tuple(_pick(tap.flatten(1, 2), chosen) for tap in taps)


def _pick(rows: Tensor, chosen: Tensor) -> Tensor:
    """(g, n, c) rows at (g, r) -> columns (g, c, r)."""
    return rows.gather(1, chosen.unsqueeze(-1).expand(-1, -1, rows.shape[2])).mT


def _sweep_until_stalled(tensor: Tensor, start: Terms, rough: bool) -> Terms:
    """Extrapolated alternating least squares; what is returned explains the tensor at least as well as the start."""
    norm = float(tensor.square().sum())
    if norm == 0:
        return start
    work = tensor.numel() * start.inputs.shape[-1]
    wide = work > WIDE
    tensor = tensor.float() if wide and 1e-12 < norm < 1e12 else tensor
    by_output, by_input = tensor.permute(0, 3, 1, 2).contiguous(), tensor.permute(0, 3, 2, 1).contiguous()  # g k o i, g k i o
    best = _terms(factor.to(tensor.dtype) for factor in start.factors)
    best_error = _error(tensor, best) / norm
    point, momentum, history = best, MOMENTUM_START, [best_error]
    for _ in range(ROUGH_SWEEPS if rough else WIDE_SWEEPS if wide else SWEEPS):
        found, explained = _sweep(by_output, by_input, point, 1 if wide else 2)
        error = 1 - explained / norm
        if error < best_error:
            found = found.balanced()
            point = _terms(new + momentum * (new - old) for new, old in zip(found.factors, best.factors, strict=True))
            best, best_error = found, error
            momentum = min(momentum * MOMENTUM_GROWTH, MOMENTUM_CAP)
        elif point is best:
            break  # not even a plain sweep helps: rounding is all that is left
        else:
            point, momentum = best, momentum / 2
        history.append(best_error)
        if len(history) > 10 and history[-11] - best_error < 10 * STALL * best_error:
            break
    return _terms(factor.double() for factor in best.factors) if best_error < history[0] else start


def _sweep(by_output: Tensor, by_input: Tensor, terms: Terms, repeats: int) -> tuple[Terms, float]:
    """One round over all factors, and the part of the squared norm that the result explains.

    `repeats`: how often taps and channels take turns on one large product; a second time costs little in narrow layers.
    """
    outputs, inputs, taps = terms.outputs, terms.inputs, terms.taps
    seen = inputs.mT.unsqueeze(1) @ by_input  # g k r o
    for _ in range(repeats):
        taps = _update_taps(taps, (seen * outputs.mT.unsqueeze(1)).sum(-1), _gram(outputs) * _gram(inputs))
        every = Terms(outputs, inputs, taps).all_taps
        outputs = _solve((seen * every.unsqueeze(-1)).sum(1).mT, _gram(every) * _gram(inputs), outputs)
    seen = outputs.mT.unsqueeze(1) @ by_output  # g k r i
    for _ in range(repeats):
        taps = _update_taps(taps, (seen * inputs.mT.unsqueeze(1)).sum(-1), _gram(outputs) * _gram(inputs))
        every = Terms(outputs, inputs, taps).all_taps
        matched = (seen * every.unsqueeze(-1)).sum(1).mT
        inputs = _solve(matched, _gram(every) * _gram(outputs), inputs)
    product = float((matched * inputs).sum(dtype=torch.float64))
    square = float((_gram(outputs) * _gram(inputs) * _gram(every)).sum(dtype=torch.float64))
    return Terms(outputs, inputs, taps), 2 * product - square


def _update_taps(taps: tuple[Tensor, ...], matched: Tensor, gram: Tensor) -> tuple[Tensor, ...]:
    if len(taps) == 1:
        return (_solve(matched, gram, taps[0]),)
    along_height, along_width = taps
    matched = matched.unflatten(1, (along_height.shape[1], along_width.shape[1]))
    along_height = _solve(torch.einsum("gyxr,gxr->gyr", matched, along_width), gram * _gram(along_width), along_height)
    along_width = _solve(torch.einsum("gyxr,gyr->gxr", matched, along_height), gram * _gram(along_height), along_width)
    return along_height, along_width


def _gram(factor: Tensor) -> Tensor:
    return factor.mT @ factor


def _solve(matched: Tensor, gram: Tensor, previous: Tensor) -> Tensor:
    """`X gram = matched`, with a ridge towards the previous X: (g, n, r)."""
    share = RIDGE if gram.dtype == torch.float64 else SINGLE_RIDGE
    ridge = share * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)[:, None, None]
    regular = gram + ridge * _identity(gram.shape[-1], gram)
    return torch.cholesky_solve((matched + ridge * previous).mT, torch.linalg.cholesky(regular)).mT


def _identity(side: int, like: Tensor) -> Tensor:
    return torch.eye(side, dtype=like.dtype, device=like.device)


def _exact(tensor: Tensor, tap_shape: tuple[int, ...], full_rank: int) -> Terms:
    """The tensor itself, written as one-hot factors and its own entries along the dimension that makes fewest terms."""
    g, o, i, k = tensor.shape

    def one_hots(first: int, second: int) -> tuple[Tensor, Tensor]:
        """Columns that count through (first, second), the second fastest."""
        return (
            _identity(first, tensor).repeat_interleave(second, 1).expand(g, -1, -1),
            _identity(second, tensor).repeat(1, first).expand(g, -1, -1),
        )

    if full_rank in (k * i, k * o):
        channels = i if full_rank == k * i else o
        side, every = one_hots(channels, k)
        taps: tuple[Tensor, ...] = (every,)
        if len(tap_shape) == 2:
            height, width = one_hots(*tap_shape)
            taps = (height.repeat(1, 1, channels), width.repeat(1, 1, channels))
        if full_rank == k * i:
            return Terms(tensor.flatten(2), side, taps)
        return Terms(side, tensor.permute(0, 2, 1, 3).flatten(2), taps)
    outputs, inputs = one_hots(o, i)
    if len(tap_shape) == 1:
        return Terms(outputs, inputs, (tensor.flatten(1, 2).mT,))
    upright = tap_shape[0] > tap_shape[1]
    short = min(tap_shape)
    grid = tensor.unflatten(3, tap_shape)
    rows = (grid.transpose(3, 4) if upright else grid).flatten(1, 3).mT  # g, long side, (o i short)
    hot = _identity(short, tensor).repeat(1, o * i).expand(g, -1, -1)
    pair = (rows, hot) if upright else (hot, rows)
    return Terms(outputs.repeat_interleave(short, 2), inputs.repeat_interleave(short, 2), pair)
