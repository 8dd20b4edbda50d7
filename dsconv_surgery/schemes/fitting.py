"""Factors that reproduce a layer's outputs on data: a closed form if the scheme has one, else a search that all schemes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from dsconv_surgery.network.geometry import ConvSpec, Rank
from dsconv_surgery.schemes.base import Factors, Scheme, identity_like
from dsconv_surgery.schemes.chain import factorize
from dsconv_surgery.schemes.objective import RIDGE, SINGLE_RIDGE, LinAlgError, Objective, ridged_cholesky

ROUND = 10  # iterations between two checks of convergence
STALL = 1e-3  # stop when a round lowered the error by less than this share of it
ITERATIONS = 300  # limit
WIDE_ITERATIONS = 16  # limit in wide layers
HISTORY = 20  # pairs of steps and gradients that L-BFGS keeps
WIDE = 2**31  # a layer is wide if its product with the second moment needs more multiply-accumulates
PENALTY = 3e-4  # weight of the penalty on terms that cancel each other, relative to the average error of such terms


@contextmanager
def naming_layer(name: str) -> Iterator[None]:
    """Turn errors of linear algebra into a ValueError that names the layer."""
    try:
        yield
    except LinAlgError as error:
        raise ValueError(f"{name}: cannot be fitted to the calibration images: {error} Exclude it, or check its inputs.") from error


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
    """Fit the factors of a whole layer to data: least `E |t - V p|^2` by a closed form or a search.

    Args:
        objective: the target outputs.
        start: initial factors; by default the scheme's approximation on data, or the factors of the weights alone. The penalized error
            of the result is never above that of factors that are passed.
        metric: (groups, out, out). The directions to keep are chosen by `|M (t - V p)|^2`, then the last link by `|t - V p|^2`.
        iterations: limit of the search; 0 solves for the last link only.
    """
    block = spec.one_group()
    *_, last = scheme.chain(block, rank).values()
    weighted = objective.weighted(metric.to(objective.cross)) if metric is not None and last.groups == 1 else objective
    exact = rank == scheme.full_rank(block)
    approximation = scheme.approximate(block, weighted, rank) if start is None and not exact and can_approximate(scheme) else None
    start = start or approximation or next(factorize(scheme, spec, weight, [rank], rough=True))
    iterations = 0 if exact else iterations
    optimum = scheme.optimum(block, weighted, rank) if iterations != 0 else None
    best = optimum or refine(scheme, block, start, weighted, iterations)
    if weighted is not objective:
        best = refine(scheme, block, best, objective, 0)
    elif optimum is not None or iterations == 0:
        return best  # a solution in closed form, for all links or for the last
    if approximation is not None and weighted is not objective:  # its last link is of the weighted objective
        return best
    return best if penalized_error(scheme, block, best, objective) <= penalized_error(scheme, block, start, objective) else start


def refine(scheme: Scheme, spec: ConvSpec, factors: Factors, objective: Objective, iterations: int | None = None) -> Factors:
    """Lower the error of factors (g, out, in, height, width) by L-BFGS; `iterations` is its limit, and 0 solves for the last link only.

    The best last link is a linear least-squares solution for fixed others, so L-BFGS searches over those (variable projection,
    Golub & Pereyra 1973). The scheme's kernel must be linear in each link's weight.
    """
    from scipy.optimize import minimize

    factors = {link: factor.to(objective.cross) for link, factor in factors.items()}
    *others, last = factors
    # The last link absorbs the scale of the others, so they start at the same scale.
    start = {link: factors[link] / factors[link].square().mean().sqrt().clamp(min=1e-30) for link in others}
    if iterations is None:
        iterations = WIDE_ITERATIONS if objective.cross.numel() * objective.gram.shape[1] > WIDE else ITERATIONS
    eliminate: Callable[..., tuple[Tensor, float]] = _solve_each
    if last_is_shared(factors):
        eliminate = partial(_solve_shared, supports=_supports(scheme, spec, factors, objective))

    def unflattened(values: Tensor) -> Factors:
        parts = values.split([start[link].numel() for link in others])
        return {link: part.view(start[link].shape) for link, part in zip(others, parts, strict=True)}

    @torch.enable_grad()
    def evaluate(values: Any) -> tuple[float, Any]:
        """The error and its gradient, both in float64 on the CPU, where the search is."""
        flat = torch.from_numpy(values).to(objective.cross, copy=True).requires_grad_()
        _, error = eliminate(scheme, spec, unflattened(flat), last, factors[last], objective)
        return error, cast(Tensor, flat.grad).to("cpu", torch.float64).numpy()

    flat = torch.cat([factor.flatten() for factor in start.values()])
    if iterations:
        search = minimize(
            evaluate,
            flat.to("cpu", torch.float64).numpy(),
            jac=True,
            method="L-BFGS-B",
            callback=_until_stalled(),
            options={"maxcor": min(HISTORY, iterations), "maxiter": iterations, "maxfun": 2 * iterations, "ftol": 0.0, "gtol": 0.0},
        )
        flat = torch.from_numpy(search.x).to(flat)
    free = unflattened(flat)
    solved, _ = eliminate(scheme, spec, free, last, factors[last], objective)
    return _balanced({**free, last: solved})


def _until_stalled() -> Callable[..., None]:
    """A callback of scipy's `minimize` that stops the search when a round of iterations lowered the error too little."""
    errors: list[float] = []

    def check(intermediate_result: Any) -> None:
        errors.append(float(intermediate_result.fun))
        if len(errors) > ROUND and len(errors) % ROUND == 0 and not errors[-1] < errors[-1 - ROUND] * (1 - STALL):
            raise StopIteration

    return check


def has_optimum(scheme: Scheme) -> bool:
    """Whether a scheme has its factors of least error on data in closed form."""
    return type(scheme).optimum is not Scheme.optimum


def can_approximate(scheme: Scheme) -> bool:
    """Whether a scheme has factors near those of least error on data, without a search."""
    return type(scheme).approximate is not Scheme.approximate and not has_optimum(scheme)


def penalized_error(scheme: Scheme, spec: ConvSpec, factors: Factors, objective: Objective) -> float:
    """The error that `refine` lowers: the objective, and a penalty on terms that cancel each other."""
    factors = {link: factor.to(objective.cross) for link, factor in factors.items()}
    error = objective.value(scheme.kernel(spec, factors))
    *_, last = factors
    if not last_is_shared(factors):
        return error
    features = scheme.features(spec, factors).flatten(2)
    norms = (factors[last].flatten(2).square().sum(1) * features.square().sum(2)).sum(dtype=torch.float64)
    return error + PENALTY * objective.size * float(norms) / objective.unit


def last_is_shared(factors: Factors) -> bool:
    """Whether all outputs combine the same features, as the last link is not depthwise."""
    *_, previous, last = factors.values()
    return last.shape[2] == previous.shape[1]


def _supports(scheme: Scheme, spec: ConvSpec, factors: Factors, objective: Objective) -> list[Any]:
    """For each tap of the last link, the entries of a patch that the features at this tap read; products leave out the others."""
    *_, last = factors.values()
    taps = last[0, 0, 0].numel()
    if taps == 1 or objective.rows:
        return [slice(None)]
    generator = torch.Generator("cpu").manual_seed(0)
    values = {
        link: torch.rand(factor[:1].shape, generator=generator, dtype=torch.float64, device="cpu").to(factor)
        for link, factor in factors.items()
    }
    features = scheme.features(spec, values).flatten(2)
    return [features[:, tap::taps].abs().amax((0, 1)).nonzero().squeeze(1) for tap in range(taps)]


def _solve_shared(
    scheme: Scheme, spec: ConvSpec, free: Factors, last: str, initial: Tensor, objective: Objective, supports: list[Any]
) -> tuple[Tensor, float]:
    """The last link's best weight and the error, if all outputs combine the same features f; the gradient goes to `free`.

    The error includes a penalty on `sum_p |a_p|^2 |f_p|^2`, a being the weight: without it, the terms of a kernel cancel each other
    in growing amounts (the degeneracy of CP; Phan et al. 2020 bound the same sum).
    """
    with torch.enable_grad():
        features = scheme.features(spec, {**free, last: initial}).flatten(2)  # g p n
    with torch.no_grad():
        parts = [(features[:, tap :: len(supports)][..., columns], columns) for tap, columns in enumerate(supports)]
        projected = _joined([objective.projected(part, columns) for part, columns in parts], 1)
        gram = _joined([objective.moment(part, columns, projected) for part, columns in parts], 2)
        matched = _joined([objective.cross[..., columns] @ part.mT for part, columns in parts], 2)
        penalty = PENALTY * objective.size * features.square().sum(2)
        solved = _regular_solve(gram + torch.diag_embed(penalty), matched)
        change = ((solved @ gram - 2 * matched) * solved).sum(dtype=torch.float64)
        norms = solved.square().sum(1)
        error = objective.energy + float(change + (penalty * norms).sum(dtype=torch.float64))
    if features.requires_grad:
        slope, gradient = objective.slope(solved, features.detach(), projected), torch.zeros_like(features)
        for tap, columns in enumerate(supports):
            gradient[:, tap :: len(supports), columns] = solved[..., tap :: len(supports)].mT @ slope[..., columns]
        gradient += PENALTY * objective.size * norms.unsqueeze(2) * features.detach()
        features.backward(2 * gradient / objective.unit)
    return solved.reshape(initial.shape), error / objective.unit


def _joined(products: list[Tensor], dim: int) -> Tensor:
    """Products with the features of each tap, in the features' order along a dimension."""
    return torch.stack(products, dim + 1).flatten(dim, dim + 1)


def _solve_each(scheme: Scheme, spec: ConvSpec, free: Factors, last: str, initial: Tensor, objective: Objective) -> tuple[Tensor, float]:
    """The same if the last link is depthwise, so that each output combines other features."""
    with torch.no_grad():
        units = identity_like(initial).unsqueeze(2).expand(-1, -1, *initial.shape[1:])  # g p o ...
        features = [scheme.kernel(spec, {**free, last: unit}).flatten(2) for unit in units.unbind(1)]  # g o n
        feature, product = torch.stack(features, 2), torch.stack([_sparse_product(objective, f) for f in features], 2)  # g o p n
        gram, matched = product @ feature.mT, feature @ objective.cross.unsqueeze(-1)  # g o p p, g o p 1
        solved = _regular_solve(gram, matched.mT)  # g o 1 p
        change = (((solved @ gram).squeeze(2) - 2 * matched.squeeze(-1)) * solved.squeeze(2)).sum(-1)
        error = objective.energy + float(change.sum(dtype=torch.float64))
        slope = (solved @ product).squeeze(2) - objective.cross
    if any(factor.requires_grad for factor in free.values()) and torch.is_grad_enabled():
        scheme.kernel(spec, {**free, last: solved.reshape(initial.shape)}).flatten(2).backward(2 * slope / objective.unit)
    return solved.reshape(initial.shape), error / objective.unit


def _sparse_product(objective: Objective, feature: Tensor) -> Tensor:
    """`feature @ S`, without the columns of the feature that are zero."""
    if objective.rows:
        return objective.product(feature)
    columns = feature.abs().amax((0, 1)).nonzero().squeeze(1)
    return feature[..., columns] @ objective.gram[:, columns]


def _regular_solve(gram: Tensor, matched: Tensor) -> Tensor:
    """Solve `X gram = matched`, with a ridge relative to each feature's energy."""
    share = RIDGE if gram.dtype == torch.float64 else SINGLE_RIDGE
    energies = gram.diagonal(dim1=-2, dim2=-1).abs()
    floor = energies.amax(-1, keepdim=True).clamp(min=1e-30) * share
    return torch.cholesky_solve(matched.mT, ridged_cholesky(gram, share * energies + 1e-3 * floor)).mT


def _balanced(factors: Factors) -> Factors:
    """The same kernel with all links at the same scale, which half precision and fine-tuning need."""
    sizes = {link: factor.square().mean().sqrt().clamp(min=1e-30) for link, factor in factors.items()}
    target = torch.stack(list(sizes.values())).log().mean().exp()
    return {link: factor * (target / sizes[link]) for link, factor in factors.items()}
