"""Errors of one layer's options, and their damage to the network: measured at a few ranks and interpolated in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsconv_surgery import schemes
from dsconv_surgery.network.discovery import ConvSite
from dsconv_surgery.network.geometry import Rank, chain_cost
from dsconv_surgery.planning.damage import BANDWIDTH, DamageEstimator, interpolate, smooth_curve
from dsconv_surgery.schemes import Factors
from dsconv_surgery.support.cache import Cache, digest

SAMPLE_FRACTIONS = (0.05, 0.1, 0.18, 0.3, 0.5, 0.8)  # of a layer's MACs: errors and times are measured at ranks near them
# Iterations of a fit at a sampled rank, and for layers with more weights per output channel than WIDE.
ITERATIONS, WIDE_ITERATIONS, WIDE = 20, 5, 1024
DAMAGE_ERRORS = tuple(np.geomspace(0.6, 0.01, 10))  # damage is measured for options with errors near these
SKIP_RATIO = 2.0  # options with this many times the initial error of cheaper ones are not fitted further
DAMAGE_SKIP_RATIO = 1.3  # the same for measurements of damage
TINY = 1e-9  # smaller errors and damages count as equal
Sample = tuple[str, Rank]  # a scheme at a sampled rank
Unfolding = tuple[list[float], tuple[int, int]]  # a matrix's singular values, and its shape


class OptionErrors:
    """Measures a layer's options, each once.

    Attributes:
        factors: of the options whose exact errors were measured.
        on_start: called when the layer's first option is measured.
        latencies: for each timed scheme, pairs of MACs and milliseconds, by rising MACs.
    """

    def __init__(self, site: ConvSite, layer: nn.Module, names: Sequence[str], estimator: DamageEstimator) -> None:
        self.factors: dict[Sample, Factors] = {}
        self.on_start: Callable[[], object] = lambda: None
        self.latencies: dict[str, list[tuple[float, float]]] = {}
        self._site, self._layer, self._names, self._estimator = site, layer, names, estimator
        self._spec, self._weight, self._calibrated = site.spec, layer.get_parameter("weight"), estimator.images is not None
        # Results of registered schemes are not cached: another scheme may have the same name in the next run.
        built_in = all(type(schemes.get_scheme(name)).__module__.startswith("dsconv_surgery.") for name in names)
        self._cache = estimator.cache if built_in else Cache(False)
        self._key: list[Any] = [site.name, str(site.spec), [list(size) for size in site.sizes]]
        self._started = False
        self._errors: dict[Sample, float] = {}
        self._bounds: dict[str, Tensor | None] = {}
        self._sampled_ranks: dict[str, list[Rank]] = {}
        self._starts: dict[Sample, Factors] = {}  # of fits at sampled ranks; like the next, until their damage is measured
        self._fits: dict[Sample, Factors] = {}  # at sampled ranks
        self._damages: dict[Sample, float] = {}  # measured by `refine_damage`
        self._refined: list[tuple[float, float]] = []  # pairs of error and damage that the current plan uses beside the sampled ones

    def measure(self, name: str, rank: Rank) -> float:
        """The exact error: of the weights, or of outputs on calibration images."""
        if (name, rank) not in self._errors:
            self._start()
            if self._calibrated:
                self._errors[name, rank], factors = self._fit(name, rank, None, None)
            else:
                scheme = schemes.get_scheme(name)
                factors = next(schemes.factorize(scheme, self._spec, self._weight, [rank]))
                self._errors[name, rank] = schemes.relative_error(self._weight, schemes.kernel_of(scheme, self._spec, factors))
            self.factors[name, rank] = {link: factor.to(self._weight.dtype) for link, factor in factors.items()}
        return self._errors[name, rank]

    def bounds(self, name: str, ranks: Sequence[Rank]) -> list[float] | None:
        """Errors of the weights from the scheme's spectrum, upper bounds where it is not exact; None where the scheme has none.

        With calibration they only order pairs of ranks, so the result is None for single ranks.
        """
        if self._calibrated and isinstance(ranks[0], int):
            return None
        self._require_weights()
        if name not in self._bounds:
            spectrum = schemes.spectrum(schemes.get_scheme(name), self._spec, self._weight)
            self._bounds[name] = None if spectrum is None else _truncation_errors(spectrum.cpu())  # read number by number
        errors = self._bounds[name]
        if errors is None:
            return None
        return [float(errors[rank - 1] if isinstance(rank, int) else errors[rank[0] - 1, rank[1] - 1]) for rank in ranks]

    def estimate(self, name: str, ranks: Sequence[Rank]) -> list[float]:
        """Errors at many ranks: exact where a spectrum gives them, else interpolated between sampled ranks, log against log."""
        bounds = self.bounds(name, ranks)
        if bounds is not None and not self._calibrated:
            return bounds
        samples = self.sample_ranks(name)
        sample_errors = self._sample_errors(name, samples)
        sample_bounds = self.bounds(name, samples)  # pairs of ranks are ordered by the weights' errors
        scale = np.log if sample_bounds is None else _log_of_error
        x, targets = (
            np.array([float(rank) if isinstance(rank, int) else 0.0 for rank in group] if errors is None else [-e for e in errors])
            for group, errors in ((samples, sample_bounds), (ranks, bounds))
        )
        order = np.argsort(x)
        log_errors = np.minimum.accumulate(np.log(np.maximum(np.array(sample_errors)[order], TINY)))
        return np.exp(interpolate(scale(x[order]), log_errors, scale(targets))).clip(0.0, 1.0).tolist()

    def damage(self, errors: Sequence[float]) -> list[float]:
        """How far errors move the network's outputs, log against log between errors at which that was measured."""
        points = self._sampled_damage + self._refined if self._calibrated else []
        if len(points) < 2:
            return list(errors)
        x, y = np.log(np.maximum(np.array(points), TINY)).T
        damages = np.exp(smooth_curve(x, y, np.log(np.maximum(np.array(errors), TINY))))
        return [float(damage) if error > TINY else 0.0 for damage, error in zip(damages, errors, strict=True)]

    def refine_damage(self, name: str, rank: Rank) -> bool:
        """Measure an option's damage unless it was measured at nearly the same error; whether it was measured now."""
        if not self._calibrated:
            return False
        (error,) = self.estimate(name, [rank])
        if any(abs(np.log(max(error, TINY) / max(other, TINY))) < BANDWIDTH / 4 for other, _ in self._sampled_damage + self._refined):
            return False
        if (name, rank) not in self._damages:
            self._damages[name, rank] = self._cached("damage_at", name, [rank], partial(self._damage_at, name, rank))
        self._refined.append((error, self._damages[name, rank]))
        return True

    def start_plan(self) -> None:
        """Forget refinements, so that a plan does not depend on earlier ones."""
        self._refined.clear()

    def unfoldings(self) -> list[Unfolding]:
        """The unfoldings of the kernel by input and by output channel; of groups, those with the largest singular values."""
        self._require_weights()
        tensor = schemes.kernel_tensor(self._spec, self._weight).flatten(3)
        result: list[Unfolding] = []
        for matrix in (tensor.transpose(1, 2).flatten(2), tensor.flatten(2)):
            values = torch.linalg.svdvals(matrix)
            result.append((values[int(values.sum(1).argmax())].tolist(), (matrix.shape[1], matrix.shape[2])))
        return result

    def sample_ranks(self, name: str) -> list[Rank]:
        """The ranks at which errors are measured: the cheapest, and the best below each of SAMPLE_FRACTIONS of the layer's MACs."""
        if name not in self._sampled_ranks:
            scheme = schemes.get_scheme(name)
            ranks: list[tuple[Rank, float]] = []
            for rank in scheme.ranks(self._spec.one_group()):
                fraction = chain_cost(schemes.chain_of(scheme, self._spec, rank), self._site.sizes).macs / max(self._site.cost.macs, 1)
                if fraction < 1 or not ranks:
                    ranks.append((rank, fraction))
                elif isinstance(rank, int):
                    break
            bounds = None if isinstance(ranks[0][0], int) else self.bounds(name, [rank for rank, _ in ranks])
            samples = {ranks[0][0]}
            for limit in SAMPLE_FRACTIONS:
                within = [k for k, (_, fraction) in enumerate(ranks) if fraction <= limit]
                if within:
                    samples.add(ranks[within[-1] if bounds is None else min(within, key=bounds.__getitem__)][0])
            self._sampled_ranks[name] = sorted(samples)
        return self._sampled_ranks[name]

    def _sample_errors(self, name: str, ranks: list[Rank]) -> list[float]:
        if self._calibrated:
            return [self._fitted_errors[name, rank] for rank in ranks]
        return list(self._cached("errors", name, ranks, partial(self._initial_errors, name)))

    def _cached(self, kind: str, name: str, ranks: Sequence[Rank], compute: Callable[[], Any]) -> Any:
        """The result of `compute`, which must depend on nothing but the layer, the scheme, the ranks and, with images, the network."""
        source = self._estimator.digest if self._calibrated else digest(self._weight)
        return self._cache.get(kind, [source, *self._key, name, _as_json(ranks)], compute)

    @cached_property
    def _samples(self) -> dict[Sample, list[float]]:
        """All schemes that apply at their sampled ranks: MACs, parameters and, if options were timed, interpolated milliseconds."""
        samples: dict[Sample, list[float]] = {}
        for name in self._names:
            scheme = schemes.get_scheme(name)
            for rank in self.sample_ranks(name) if schemes.refusal(scheme, self._spec) is None else ():
                cost = chain_cost(schemes.chain_of(scheme, self._spec, rank), self._site.sizes)
                samples[name, rank] = [float(cost.macs), float(cost.params)]
                if self.latencies:
                    timed = self.latencies.get(name)
                    samples[name, rank].append(float(np.interp(cost.macs, *np.array(timed).T)) if timed else np.inf)
        return samples

    @cached_property
    def _fitted_errors(self) -> dict[Sample, float]:
        """Errors on calibration images at the sampled ranks: of fits of all links for promising options, else of the last link alone.

        An option is not promising if, in each measure, another option has less than half of its error and costs no more. Fitting all
        links lowers errors by some tens of percent.
        """
        initial: dict[Sample, float] = {}
        for name in dict.fromkeys(name for name, _ in self._samples):
            ranks = self.sample_ranks(name)
            errors = self._cached("initial", name, ranks, partial(self._initial_errors, name))
            initial |= {(name, rank): error for rank, error in zip(ranks, errors, strict=True)}
        fitted: dict[Sample, float] = {}
        for (name, rank), error in initial.items():
            better = [self._samples[sample] for sample, other in initial.items() if other * SKIP_RATIO < error]
            skip = all(any(costs[m] <= cost for costs in better) for m, cost in enumerate(self._samples[name, rank]))
            fitted[name, rank] = error if skip else self._cached("fitted", name, [rank], partial(self._fitted_error, name, rank))
        return fitted

    def _initial_errors(self, name: str) -> list[float]:
        """At each sampled rank, the error of factors of the weights; with calibration, after the last link is fitted."""
        self._start()
        scheme, ranks = schemes.get_scheme(name), self.sample_ranks(name)
        errors: list[float] = []
        for rank, start in zip(ranks, schemes.factorize(scheme, self._spec, self._weight, ranks, rough=True), strict=True):
            if self._calibrated:
                error, factors = self._fit(name, rank, start, 0)
                self._starts[name, rank] = {link: factor.float() for link, factor in factors.items()}
            else:
                error = schemes.relative_error(self._weight, schemes.kernel_of(scheme, self._spec, start))
            errors.append(error)
        return errors

    def _fitted_error(self, name: str, rank: Rank) -> float:
        """The error at a sampled rank. The start must not depend on what the cache holds, so it is computed again if it is absent."""
        self._start()
        if (name, rank) not in self._starts:
            self._initial_errors(name)
        iterations = WIDE_ITERATIONS if self._weight[0].numel() > WIDE else ITERATIONS
        error, factors = self._fit(name, rank, self._starts.pop((name, rank)), iterations)
        self._fits[name, rank] = {link: factor.float() for link, factor in factors.items()}
        return error

    def _fit(self, name: str, rank: Rank, start: Factors | None, iterations: int | None) -> tuple[float, Factors]:
        scheme, (objective, regularised) = schemes.get_scheme(name), self._estimator.objectives(self._site.name)
        with schemes.naming_layer(self._site.name):
            factors = schemes.fit(scheme, self._spec, self._weight, rank, regularised, start=start, iterations=iterations)
        return objective.value(scheme.kernel(self._spec.one_group(), factors)), factors

    @cached_property
    def _sampled_damage(self) -> list[tuple[float, float]]:
        """Pairs of error and damage of sampled options with errors near DAMAGE_ERRORS, of those only that a plan may choose.

        Schemes with the same error differ in damage, so options are left out that others beat in MACs and in parameters.
        """
        errors = {(name, rank): self._sample_errors(name, [rank])[0] for name, rank in self._samples}

        def is_beaten(sample: Sample, measure: int) -> bool:
            cost = self._samples[sample][measure]
            return any(
                error * DAMAGE_SKIP_RATIO < errors[sample] and self._samples[other][measure] <= cost for other, error in errors.items()
            )

        candidates = [sample for sample in errors if not (is_beaten(sample, 0) and is_beaten(sample, 1))]
        chosen = {min(candidates, key=lambda s: abs(np.log(max(errors[s], TINY) / target))): None for target in DAMAGE_ERRORS}
        points = [(errors[s], self._cached("damage", s[0], [s[1]], partial(self._damage_of_fit, *s))) for s in chosen]
        self._starts.clear()
        self._fits.clear()
        return points

    def _damage_at(self, name: str, rank: Rank) -> float:
        return self._divergence(name, rank, self._fit(name, rank, None, ITERATIONS)[1])

    def _damage_of_fit(self, name: str, rank: Rank) -> float:
        if (name, rank) not in self._fits:
            self._fitted_error(name, rank)
        return self._divergence(name, rank, self._fits[name, rank])

    def _divergence(self, name: str, rank: Rank, factors: Factors) -> float:
        links = schemes.build(schemes.chain_of(schemes.get_scheme(name), self._spec, rank), self._layer, factors)
        return self._estimator.divergence(self._site.name, links)

    def _start(self) -> None:
        self._require_weights()
        if not self._started:
            self._started = True
            self.on_start()

    def _require_weights(self) -> None:
        if self._weight.is_meta:
            raise ValueError(
                f"{self._site.name}: its weights are on the meta device, so errors of options cannot be measured. Plan on a model with "
                "weights; the plan also fits this one, with apply_plan(model, plan, init='empty')."
            )


def _truncation_errors(spectrum: Tensor) -> Tensor:
    """Relative squared errors of keeping the first r (or r, q) components of a spectrum."""
    total = spectrum.sum()
    if spectrum.ndim == 1:  # summed from the small end, so that small errors keep their digits
        errors = torch.cat([spectrum.flip(0).cumsum(0).flip(0)[1:], spectrum.new_zeros(1)])
    else:
        errors = total - spectrum.cumsum(0).cumsum(1)
    return (errors / total).clamp(min=0) if total > 0 else torch.zeros_like(spectrum)


def _as_json(ranks: Sequence[Rank]) -> list[Any]:
    return [list(rank) if isinstance(rank, tuple) else rank for rank in ranks]


def _log_of_error(negative: Any) -> Any:
    """The logarithm of quality: of errors, passed as their negatives so that they rise with quality."""
    return -np.log(np.maximum(-negative, TINY))
