"""Approximations on data: decompositions of a kernel in coordinates where its plain error is close to that of its outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsconv_surgery.network.geometry import ConvSpec
from dsconv_surgery.schemes import Objective, get_scheme
from dsconv_surgery.schemes.fitting import refine

SPEC = ConvSpec(10, 12, (3, 3), padding=(1, 1))
RANKS: dict[str, Any] = {"cp": 14, "cp_split": 16, "tucker": (5, 6), "spatial": 6, "pointwise_depthwise": 1}
EXACT = ("spatial", "pointwise_depthwise")  # their decompositions are optimal in these coordinates


def moment(size: int) -> Tensor:
    """A second moment with large and small eigenvalues, and a mean diagonal of one."""
    vectors = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    result = (vectors * torch.logspace(0, -2, size, dtype=torch.float64)) @ vectors.T
    return result / result.diagonal().mean()


def objective() -> Objective:
    """Patches whose second moment is a Kronecker product over channels, height and width."""
    gram = torch.kron(torch.kron(moment(10), moment(3)), moment(3))[None]
    weight = torch.randn(1, 12, 90, dtype=torch.float64)
    return Objective(weight, weight @ gram, gram, weight @ gram @ weight.mT)


def as_rows(plain: Objective, ridge: float) -> Objective:
    """The same objective, with the second moment stored as the rows of its root, and with a ridge."""
    return replace(plain, gram=torch.linalg.cholesky(plain.gram).mT, rows=True).ridged(ridge)


@pytest.mark.parametrize("scheme", RANKS)
def test_approximations_are_close_to_the_best(scheme: str) -> None:
    """A search from them gains little; and nothing, but for the ridge, where the decomposition is optimal."""
    plain = objective()
    approximation = get_scheme(scheme).approximate(SPEC, plain, RANKS[scheme])
    errors = [
        plain.value(get_scheme(scheme).kernel(SPEC, factors))
        for factors in (approximation, refine(get_scheme(scheme), SPEC, approximation, plain, 200), next(weights(scheme, plain)))
    ]
    assert errors[1] > (0.99 if scheme in EXACT else 0.7) * errors[0]
    assert errors[0] < 0.8 * errors[2]


def weights(scheme: str, plain: Objective) -> Any:
    return get_scheme(scheme).factorize(SPEC, plain.weight.unflatten(2, (10, 3, 3)), [RANKS[scheme]])


@pytest.mark.parametrize("scheme", RANKS)
def test_rows_stand_for_the_second_moment(scheme: str) -> None:
    """Approximations and searches with stored patches give the kernels of the second moment, and so does their ridge."""
    plain = objective()
    pair = [plain.ridged(0.05), as_rows(plain, 0.05)]
    factors = [get_scheme(scheme).approximate(SPEC, each, RANKS[scheme]) for each in pair]
    kernels = [get_scheme(scheme).kernel(SPEC, each) for each in factors]
    torch.testing.assert_close(kernels[0], kernels[1], rtol=1e-6, atol=1e-6)
    fitted = [get_scheme(scheme).kernel(SPEC, refine(get_scheme(scheme), SPEC, factors[0], each, 5)) for each in pair]
    torch.testing.assert_close(fitted[0], fitted[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", RANKS)
def test_a_search_leaves_zeros_as_with_stored_patches(scheme: str) -> None:
    """Factors that start at zero, as of an input channel that is not used, move where the targets need them."""
    plain = objective()
    unused = plain.weight.clone()
    unused[..., :9] = 0
    start = next(weights(scheme, replace(plain, weight=unused)))
    fitted = [get_scheme(scheme).kernel(SPEC, refine(get_scheme(scheme), SPEC, start, each, 5)) for each in (plain, as_rows(plain, 0.0))]
    torch.testing.assert_close(fitted[0], fitted[1], rtol=1e-5, atol=1e-5)
    assert float(fitted[0][:, :, 0].abs().max()) > 1e-3


def test_kronecker_factors_are_recovered() -> None:
    plain = objective()
    for sizes in ((10, 9), (10, 3, 3)):
        for each in (plain, replace(plain, gram=torch.linalg.cholesky(plain.gram).mT, rows=True)):
            first, *others = (factor[0] for factor in each.kronecker_factors(sizes))
            product = first
            for factor in others:
                product = torch.kron(product, factor)
            torch.testing.assert_close(product, plain.gram[0])


def test_inputs_of_zero_give_finite_moments() -> None:
    nothing = Objective(*(torch.zeros(1, *shape, dtype=torch.float64) for shape in ((12, 90), (12, 90), (90, 90), (12, 12))))
    assert all(bool(factor.isfinite().all()) for factor in nothing.kronecker_factors((10, 3, 3)))
