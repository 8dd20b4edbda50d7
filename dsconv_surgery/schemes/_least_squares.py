"""The solves that schemes share: factors that reproduce a layer's outputs on data."""

from __future__ import annotations

import torch
from torch import Tensor

from dsconv_surgery.geometry import ConvSpec
from dsconv_surgery.schemes._objective import RIDGE, SINGLE_RIDGE, Objective
from dsconv_surgery.schemes._protocol import Factors, Scheme

ROUND = 10  # iterations between two looks at whether it still pays
STALL = 5e-3  # stop when a round lowered the error by less than this share of it
ITERATIONS = 100  # at most,
WIDE_ITERATIONS = 20  # or this many where one takes long:
WIDE = 2**31  # multiply-accumulates of one product with the second moment


def refine(scheme: Scheme, spec: ConvSpec, factors: Factors, objective: Objective, iterations: int | None = None) -> Factors:
    """Factors of lower error under an objective, from some to start with; never of higher.

    The last link given the others is one linear least-squares solve, so it is eliminated (variable projection, Golub & Pereyra
    1973) and L-BFGS moves the others. This asks of a scheme only that its kernel is linear in each link's weight.

    Args:
        factors: where to start, (g, out, in, height, width) each.
        iterations: of L-BFGS at most; 0 solves for the last link only.
    """
    dtype, device = objective.cross.dtype, objective.cross.device
    factors = {link: factor.to(device, dtype) for link, factor in factors.items()}
    start = objective.value(scheme.kernel(spec, factors))
    *others, last = factors
    # A scale of its own for each link would only slow the search: the last link takes up what the others give away.
    free = {link: (factors[link] / factors[link].square().mean().sqrt().clamp(min=1e-30)).contiguous().requires_grad_() for link in others}
    if iterations is None:
        work = objective.cross.numel() * objective.gram.shape[1]
        iterations = WIDE_ITERATIONS if work > WIDE else ITERATIONS
    # Depthwise last links hold one input channel per filter, fewer than the link before gives.
    eliminate = _solve_shared if factors[last].shape[2] == factors[others[-1]].shape[1] else _solve_each

    def closure() -> float:
        for link in others:
            free[link].grad = None
        with torch.no_grad():
            solved, product, error = eliminate(scheme, spec, free, last, factors[last], objective)
        with torch.enable_grad():
            kernel = scheme.kernel(spec, {**free, last: solved}).flatten(2)
            kernel.backward(2 * (product - objective.cross) / max(objective.energy, 1e-300))
        return error

    search = torch.optim.LBFGS(list(free.values()), max_iter=ROUND, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-12)
    before = float("inf")
    for done in range(0, iterations, ROUND):
        search.param_groups[0]["max_iter"] = min(ROUND, iterations - done)
        now = float(search.step(closure))  # at the start of the round
        if not now < before * (1 - STALL):
            break
        before = now
    with torch.no_grad():
        solved, _, _ = eliminate(scheme, spec, free, last, factors[last], objective)
        found = _balanced({**{link: factor.detach() for link, factor in free.items()}, last: solved})
    return found if objective.value(scheme.kernel(spec, found)) < start else factors


def _solve_shared(
    scheme: Scheme, spec: ConvSpec, free: Factors, last: str, like: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, float]:
    """The last link's best weight, the kernel times S, and the error: all outputs are sums of the same features."""
    width = like[0, 0].numel()
    eye = torch.eye(width, dtype=like.dtype, device=like.device).reshape(1, width, *like.shape[2:]).expand(like.shape[0], *(-1,) * 4)
    features = scheme.kernel(spec, {**free, last: eye}).flatten(2)  # g p n
    seen = objective.product(features)
    gram, matched = seen @ features.mT, objective.cross @ features.mT
    solved = _regular_solve(gram, matched)
    error = objective.energy + float(((solved @ gram - 2 * matched) * solved).sum(dtype=torch.float64))
    return solved.reshape(like.shape), solved @ seen, error / max(objective.energy, 1e-300)


def _solve_each(
    scheme: Scheme, spec: ConvSpec, free: Factors, last: str, like: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, float]:
    """The same where the last link is depthwise: each output has features of its own."""
    width = like[0, 0].numel()
    features, seen = [], []
    for at in range(width):
        one = torch.zeros_like(like).flatten(2)
        one[..., at] = 1
        feature = scheme.kernel(spec, {**free, last: one.reshape(like.shape)}).flatten(2)  # g o n
        features.append(feature)
        seen.append(_sparse_product(objective, feature))
    feature, product = torch.stack(features, 2), torch.stack(seen, 2)  # g o p n
    gram, matched = product @ feature.mT, feature @ objective.cross.unsqueeze(-1)  # g o p p, g o p 1
    solved = _regular_solve(gram, matched.mT)  # g o 1 p
    measured = (((solved @ gram).squeeze(2) - 2 * matched.squeeze(-1)) * solved.squeeze(2)).sum(-1)
    error = objective.energy + float(measured.sum(dtype=torch.float64))
    return solved.reshape(like.shape), (solved @ product).squeeze(2), error / max(objective.energy, 1e-300)


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
