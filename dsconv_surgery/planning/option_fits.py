"""Fits of one layer's options to calibration images, with the factors that they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

from torch import Tensor, nn

from dsconv_surgery import schemes
from dsconv_surgery.calibration.moments import WIDE_LENGTH
from dsconv_surgery.network.discovery import ConvSite
from dsconv_surgery.network.geometry import Rank
from dsconv_surgery.planning.curves import TINY
from dsconv_surgery.planning.damage import DamageEstimator
from dsconv_surgery.schemes import Factors

ITERATIONS, WIDE_ITERATIONS = 10, 5  # of a fit, and of one in a wide layer
Sample = tuple[str, Rank]  # a scheme at a sampled rank


def is_wide(weight: Tensor) -> bool:
    """Whether a layer's patches are so long that fits take long."""
    return weight[0].numel() > WIDE_LENGTH


class OptionFits:
    """Fits of one layer's options. What does not come from the cache is computed, with the factors that it needs."""

    def __init__(self, site: ConvSite, layer: nn.Module, estimator: DamageEstimator) -> None:
        self._site, self._spec, self._layer, self._weight = site, site.spec, layer, layer.get_parameter("weight")
        self._estimator = estimator
        self._starts: dict[Sample, Factors] = {}  # factors of the weights
        self._errors: dict[Sample, float] = {}  # results of `output_error`
        self._factors: dict[Sample, Factors] = {}  # those whose error is `output_error`

    @cached_property
    def _objectives(self) -> tuple[schemes.Objective, schemes.Objective, Tensor]:
        return self._estimator.objectives(self._site.name)

    def factorize(self, name: str, rank: Rank) -> tuple[float, Factors]:
        """The error of factors of the weights, and the factors."""
        scheme = schemes.get_scheme(name)
        factors = next(schemes.factorize(scheme, self._spec, self._weight, [rank]))
        return schemes.relative_error(self._weight, schemes.kernel_of(scheme, self._spec, factors)), factors

    def fit(self, name: str, rank: Rank, start: Factors | None = None, iterations: int | None = None) -> tuple[float, Factors]:
        """The error of factors fitted to the images, and the factors."""
        if iterations is None:
            iterations = WIDE_ITERATIONS if is_wide(self._weight) else ITERATIONS
        scheme, (fit, judge, _) = schemes.get_scheme(name), self._objectives
        with schemes.naming_layer(self._site.name):
            factors = schemes.fit(scheme, self._spec, self._weight, rank, fit, start=start, iterations=iterations)
        return judge.value(scheme.kernel(self._spec.one_group(), factors)), factors

    def last_solve_is_slow(self, name: str, rank: Rank) -> bool:
        """In a wide layer: whether the last link combines more features than twice the input channels, or other ones for each output."""
        *_, last = schemes.chain_of(schemes.get_scheme(name), self._spec, rank).values()
        many = last.in_channels // last.groups > 2 * self._spec.in_channels // self._spec.groups
        return is_wide(self._weight) and (many or last.groups > self._spec.groups)

    def has_gain(self, name: str, rank: Rank) -> bool:
        """Whether a fit is taken to lower `output_error` by the scheme's gain: not where factors of the weights were judged as they are."""
        return schemes.can_approximate(schemes.get_scheme(name)) or not self.last_solve_is_slow(name, rank)

    def weight_errors(self, name: str, ranks: Sequence[Rank]) -> list[float]:
        """The errors of rough factors of the weights at a scheme's sampled ranks."""
        scheme = schemes.get_scheme(name)
        factors = schemes.factorize(scheme, self._spec, self._weight, ranks, rough=True)
        return [schemes.relative_error(self._weight, schemes.kernel_of(scheme, self._spec, each)) for each in factors]

    def output_error(self, name: str, rank: Rank, ranks: Sequence[Rank]) -> float:
        """The error of outputs at one of the sampled ranks, `ranks`, after a fit of the last link, or a short one of all links.

        Where that is slow, the factors to start from are judged as they are.
        """
        if (name, rank) in self._errors:
            return self._errors[name, rank]
        scheme, start, block = schemes.get_scheme(name), self.start(name, rank, ranks), self._spec.one_group()
        if self.last_solve_is_slow(name, rank):
            self._factors[name, rank] = start
            self._errors[name, rank] = self._objectives[1].value(scheme.kernel(block, start))
            return self._errors[name, rank]
        iterations = 1 if schemes.has_optimum(scheme) else 0 if is_wide(self._weight) or schemes.can_approximate(scheme) else ITERATIONS
        self._errors[name, rank], self._factors[name, rank] = self.fit(name, rank, start, iterations)
        return self._errors[name, rank]

    def start(self, name: str, rank: Rank, ranks: Sequence[Rank]) -> Factors:
        """Factors to start a fit from: on data where the scheme has an approximation, else those of the weights."""
        scheme, block = schemes.get_scheme(name), self._spec.one_group()
        if schemes.can_approximate(scheme) and rank != scheme.full_rank(block):
            with schemes.naming_layer(self._site.name):
                return scheme.approximate(block, self._objectives[0], rank, rough=True)
        if (name, rank) not in self._starts:  # the factors depend on the smaller ranks, so all are computed
            factors = schemes.factorize(scheme, self._spec, self._weight, ranks, rough=True)
            self._starts |= {(name, each): result for each, result in zip(ranks, factors, strict=True)}
        return self._starts[name, rank]

    def gain(self, name: str, rank: Rank, ranks: Sequence[Rank]) -> tuple[float, float]:
        """(c, s), where a fit of all links makes an error e of `output_error` `min(1, c e^s)` times as large.

        It is measured at one rank, except in wide layers if the scheme says what it is there.
        """
        scheme = schemes.get_scheme(name)
        if schemes.has_optimum(scheme):
            return 1.0, 0.0
        if is_wide(self._weight) and scheme.wide_search is not None:
            return scheme.wide_search, 0.0
        error = self.output_error(name, rank, ranks)
        fitted, _ = self.fit(name, rank, self._factors[name, rank])
        gain = min(1.0, max(fitted, TINY) / max(error, TINY))
        if is_wide(self._weight):
            return gain, 0.0
        whole, slope = (factor * math.log(gain) for factor in scheme.slow_search)
        return math.exp(whole + slope * math.log(max(error, TINY))), -slope

    def damage(self, name: str, rank: Rank, ranks: Sequence[Rank]) -> float:
        """The damage of the factors whose error is `output_error`, at one of the sampled ranks."""
        if (name, rank) not in self._factors:
            self.output_error(name, rank, ranks)
        scheme, factors, (_, judge, mean) = schemes.get_scheme(name), self._factors[name, rank], self._objectives
        links, shift = schemes.build(schemes.chain_of(scheme, self._spec, rank), self._layer, factors), None
        if judge.centred:  # a bias or a BatchNorm will take up the mean of the error
            kernel = scheme.kernel(self._spec.one_group(), factors).flatten(2)
            shift = ((judge.weight.double() - kernel.double()) @ mean.unsqueeze(2)).flatten()
        return self._estimator.divergence(self._site.name, links, shift)
