"""The solves that schemes share: factors that reproduce a layer's outputs on data."""

from __future__ import annotations

import torch
from torch import Tensor

from dsconv_surgery.network.geometry import ConvSpec, Rank
from dsconv_surgery.schemes.base import Factors, Scheme
from dsconv_surgery.schemes.chain import _block, factorize
from dsconv_surgery.schemes.objective import RIDGE, SINGLE_RIDGE, Objective

ROUND = 10  # iterations between two looks at whether it still pays
STALL = 5e-3  # stop when a round lowered the error by less than this share of it
ITERATIONS = 100  # at most,
WIDE_ITERATIONS = 16  # or this many where one takes long:
PRICE = 3e-4  # of a kernel's parts that cancel each other, in units of what such parts do to outputs on average
WIDE = 2**31  # multiply-accumulates of one product with the second moment


def refine(scheme: Scheme, spec: ConvSpec, factors: Factors, objective: Objective, iterations: int | None = None) -> Factors:
    """Factors of lower error under an objective, from some to start with.

    The last link given the others is one linear least-squares solve, so it is eliminated (variable projection, Golub & Pereyra
    1973) and L-BFGS moves the others. This asks of a scheme only that its kernel is linear in each link's weight.

    Args:
        factors: where to start, (g, out, in, height, width) each.
        iterations: of L-BFGS at most; 0 solves for the last link only.
    """
    dtype, device = objective.cross.dtype, objective.cross.device
    factors = {link: factor.to(device, dtype) for link, factor in factors.items()}
    *others, last = factors
    # A scale of its own for each link would only slow the search: the last link takes up what the others give away.
    free = {link: (factors[link] / factors[link].square().mean().sqrt().clamp(min=1e-30)).contiguous().requires_grad_() for link in others}
    if iterations is None:
        work = objective.cross.numel() * objective.gram.shape[1]
        iterations = WIDE_ITERATIONS if work > WIDE else ITERATIONS
    eliminate = _solve_shared if _last_is_shared(factors) else _solve_each

    def closure() -> float:
        for link in others:
            free[link].grad = None
        _, error = eliminate(scheme, spec, free, last, factors[last], objective)
        return error

    search = torch.optim.LBFGS(list(free.values()), max_iter=ROUND, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-12)
    before = float("inf")
    for done in range(0, iterations, ROUND):
        search.param_groups[0]["max_iter"] = min(ROUND, iterations - done)
        search.param_groups[0]["max_eval"] = min(ROUND, iterations - done) + 3  # a step too long costs a few
        now = float(search.step(closure))  # at the start of the round
        if not now < before * (1 - STALL):
            break
        before = now
    free = {link: factor.detach() for link, factor in free.items()}
    solved, _ = eliminate(scheme, spec, free, last, factors[last], objective)
    return _balanced({**free, last: solved})


def penalized_error(scheme: Scheme, spec: ConvSpec, factors: Factors, objective: Objective) -> float:
    """The error that `refine` lowers: the objective's, and the price of parts that cancel each other."""
    factors = {link: factor.to(objective.cross) for link, factor in factors.items()}
    error = objective.value(scheme.kernel(spec, factors))
    *_, last = factors
    if not _last_is_shared(factors) or objective.energy <= 0:
        return error
    features = scheme.kernel(spec, {**factors, last: _identity_like(factors[last])}).flatten(2)
    parts = (factors[last].flatten(2).square().sum(1) * features.square().sum(2)).sum(dtype=torch.float64)
    return error + PRICE * objective.size * float(parts) / objective.energy


def _last_is_shared(factors: Factors) -> bool:
    """Whether all outputs see the same features: not so where the last link is depthwise and has an input channel per filter."""
    *_, previous, last = factors.values()
    return last.shape[2] == previous.shape[1]


def _identity_like(last: Tensor) -> Tensor:
    """In the place of the last link's weight, what makes its inputs, tap by tap, the outputs."""
    width = last[0, 0].numel()
    eye = torch.eye(width, dtype=last.dtype, device=last.device).reshape(1, width, *last.shape[2:])
    return eye.expand(last.shape[0], *(-1,) * 4)


def _solve_shared(scheme: Scheme, spec: ConvSpec, free: Factors, last: str, like: Tensor, objective: Objective) -> tuple[Tensor, float]:
    """The last link's best weight, and the error, whose gradient goes to the links in `free`: all outputs sum the same features.

    Kept small besides is `sum_p |a_p|^2 |f_p|^2`, the squared norms of the features' parts in the kernel, which without it cancel
    each other in ever larger amounts (the degeneracy of CP; Phan et al. 2020 bound the same sum).
    """
    with torch.enable_grad():
        features = scheme.kernel(spec, {**free, last: _identity_like(like)}).flatten(2)  # g p n
    with torch.no_grad():
        seen = objective.product(features)
        gram, matched = seen @ features.mT, objective.cross @ features.mT
        price = PRICE * objective.size * features.square().sum(2)
        solved = _regular_solve(gram + torch.diag_embed(price), matched)
        off = ((solved @ gram - 2 * matched) * solved).sum(dtype=torch.float64)
        parts = solved.square().sum(1)
        error = objective.energy + float(off) + float((price * parts).sum(dtype=torch.float64))
        slope = solved.mT @ (solved @ seen - objective.cross) + PRICE * objective.size * parts.unsqueeze(2) * features
    if features.requires_grad:
        features.backward(2 * slope / max(objective.energy, 1e-300))
    return solved.reshape(like.shape), error / max(objective.energy, 1e-300)


def _solve_each(scheme: Scheme, spec: ConvSpec, free: Factors, last: str, like: Tensor, objective: Objective) -> tuple[Tensor, float]:
    """The same where the last link is depthwise: each output has features of its own."""
    with torch.no_grad():
        features, seen = [], []
        for at in range(like[0, 0].numel()):
            one = torch.zeros_like(like).flatten(2)
            one[..., at] = 1
            feature = scheme.kernel(spec, {**free, last: one.reshape(like.shape)}).flatten(2)  # g o n
            features.append(feature)
            seen.append(_sparse_product(objective, feature))
        feature, product = torch.stack(features, 2), torch.stack(seen, 2)  # g o p n
        gram, matched = product @ feature.mT, feature @ objective.cross.unsqueeze(-1)  # g o p p, g o p 1
        solved = _regular_solve(gram, matched.mT)  # g o 1 p
        off = (((solved @ gram).squeeze(2) - 2 * matched.squeeze(-1)) * solved.squeeze(2)).sum(-1)
        error = objective.energy + float(off.sum(dtype=torch.float64))
        slope = (solved @ product).squeeze(2) - objective.cross
    if any(factor.requires_grad for factor in free.values()) and torch.is_grad_enabled():
        scheme.kernel(spec, {**free, last: solved.reshape(like.shape)}).flatten(2).backward(2 * slope / max(objective.energy, 1e-300))
    return solved.reshape(like.shape), error / max(objective.energy, 1e-300)


def _sparse_product(objective: Objective, feature: Tensor) -> Tensor:
    """`feature @ S`, of which only the columns of a few taps are not zero."""
    if objective.rows:
        return objective.product(feature)
    columns = feature.abs().amax((0, 1)).nonzero().squeeze(1)
    return feature[..., columns] @ objective.gram[:, columns]


def _regular_solve(gram: Tensor, matched: Tensor) -> Tensor:
    """`X gram = matched`, with a ridge of a share of each feature's own energy."""
    share = RIDGE if gram.dtype == torch.float64 else SINGLE_RIDGE
    energies = gram.diagonal(dim1=-2, dim2=-1)
    floor = energies.amax(-1, keepdim=True).clamp(min=1e-30) * share
    regular = gram + torch.diag_embed(share * energies + 1e-3 * floor)
    factor, failed = torch.linalg.cholesky_ex(regular)
    if bool(failed.any()):  # rounding made it indefinite: a stronger ridge
        factor = torch.linalg.cholesky(gram + torch.diag_embed(1e3 * share * energies + floor))
    return torch.cholesky_solve(matched.mT, factor).mT


def _balanced(factors: Factors) -> Factors:
    """The same kernel, all links of one size, as half precision and fine-tuning like it."""
    sizes = {link: factor.square().mean().sqrt().clamp(min=1e-30) for link, factor in factors.items()}
    share = torch.stack(list(sizes.values())).log().mean().exp()
    return {link: factor * (share / sizes[link]) for link, factor in factors.items()}


def fit(
    scheme: Scheme,
    spec: ConvSpec,
    weight: Tensor,
    rank: Rank,
    objective: Objective,
    *,
    start: Factors | None = None,
    metric: Tensor | None = None,
    iterations: int | None = None,
) -> Factors:
    """Factors of a whole layer for data: of least `E |t - V p|^2` where a closed form or the search finds them.

    Args:
        objective: what the outputs should be.
        start: where to begin; the factors of the weights alone, if not given. The result is never of higher error, but where the
            start's is low by terms that cancel each other.
        metric: (groups, out, out); directions to keep are chosen by `|M (t - V p)|^2`, the last link then by `|t - V p|^2`.
        iterations: of the search at most; 0 for the last link's linear solve only.
    """
    block = _block(spec)
    if start is None:
        start = next(factorize(scheme, spec, weight, [rank], rough=True))
    if rank == scheme.full_rank(block):
        iterations = 0  # exact already, for any kernel
    links = list(scheme.chain(block, rank).values())
    seen = objective if metric is None or links[-1].groups > 1 else objective.weighted(metric.to(objective.cross))
    best = scheme.optimum(block, seen, rank) if iterations != 0 else None
    if best is None:
        best = refine(scheme, block, start, seen, iterations)
    if seen is not objective:
        best = refine(scheme, block, best, objective, 0)
    return best if penalized_error(scheme, block, best, objective) <= penalized_error(scheme, block, start, objective) else start
