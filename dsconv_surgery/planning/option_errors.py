"""Errors of one layer's options, and their damage to the network: measured at a few ranks and interpolated in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsconv_surgery import schemes
from dsconv_surgery.network.discovery import ConvSite
from dsconv_surgery.network.geometry import Rank
from dsconv_surgery.planning.curves import TINY, abscissa, damage_curve, interpolate, truncation_errors
from dsconv_surgery.planning.damage import DamageEstimator
from dsconv_surgery.planning.option_fits import OptionFits, Sample, is_wide
from dsconv_surgery.schemes import Factors
from dsconv_surgery.support.cache import Cache, digest

SAMPLE_FRACTIONS = (0.1, 0.3, 0.5, 0.7)  # of a layer's MACs: errors are measured at ranks near them, and at the cheapest rank
WIDE_SAMPLE_FRACTIONS = (0.1, 0.3, 0.7)  # the same in wide layers
CLOSED_FRACTIONS = tuple(k / 16 for k in range(1, 16))  # the same for closed forms in layers that are not wide: they cost little
# Damage is not measured for options whose error is this many times that of others that cost no more.
DAMAGE_SKIP_RATIO = 1.3
DAMAGE_ERRORS = (0.35, 0.1, 0.03, 0.01, 0.004)  # damage is measured for options with errors near these
Unfolding = tuple[list[float], tuple[int, int]]  # a matrix's singular values, and its shape


@dataclass(frozen=True)
class Curves:
    """What was measured of one layer's options."""

    errors: dict[Sample, float]
    damages: list[tuple[float, float]]  # pairs of error and damage; empty without calibration images


class OptionErrors:
    """Measures a layer's options, each once.

    Attributes:
        calibrated: whether there are calibration images.
        factors: of the options that `measure` was asked for.
        on_measure: called before the layer's options are measured.
        latencies: for each timed scheme, pairs of MACs and milliseconds, by rising MACs.
    """

    def __init__(self, site: ConvSite, layer: nn.Module, names: Sequence[str], estimator: DamageEstimator) -> None:
        self.factors: dict[Sample, Factors] = {}
        self.on_measure: Callable[[], object] = lambda: None
        self.latencies: dict[str, list[tuple[float, float]]] = {}
        self._site, self._layer, self._names, self._estimator = site, layer, names, estimator
        self._spec, self._weight, self.calibrated = site.spec, layer.get_parameter("weight"), estimator.images is not None
        self._errors: dict[Sample, float] = {}

    def measure(self, name: str, rank: Rank) -> float:
        """The error of an option: of the weights, or of outputs on calibration images."""
        if (name, rank) not in self._errors:
            self._require_weights()
            self.on_measure()
            fits = OptionFits(self._site, self._layer, self._estimator)
            self._errors[name, rank], factors = fits.fit(name, rank) if self.calibrated else fits.factorize(name, rank)
            self.factors[name, rank] = {link: factor.to(self._weight.dtype) for link, factor in factors.items()}
        return self._errors[name, rank]

    def bounds(self, name: str, ranks: Sequence[Rank]) -> list[float] | None:
        """Errors of the weights from the scheme's spectrum, upper bounds where it is not exact; None where the scheme has none.

        With calibration they only order pairs of ranks, so the result is None for single ranks.
        """
        if self.calibrated and isinstance(ranks[0], int):
            return None
        self._require_weights()
        errors = self._truncation_errors.get(name)
        if errors is None:
            return None
        return [float(errors[rank - 1] if isinstance(rank, int) else errors[rank[0] - 1, rank[1] - 1]) for rank in ranks]

    def estimate(self, name: str, ranks: Sequence[Rank]) -> list[float]:
        """Errors at many ranks: exact where a spectrum gives them, else interpolated between sampled ranks."""
        bounds = self.bounds(name, ranks)
        if bounds is not None and not self.calibrated:
            return bounds
        measured, samples = self._curves.errors, self._sample_ranks[name]
        errors = np.log([max(measured[name, rank], TINY) for rank in samples])
        # pairs of ranks are ordered by the weights' errors
        x, targets = (abscissa(*pair) for pair in ((samples, self.bounds(name, samples)), (ranks, bounds)))
        return np.exp(interpolate(x, errors, targets)).clip(0.0, 1.0).tolist()

    @property
    def sampled(self) -> bool:
        """Whether errors were measured at sampled ranks, so that estimates cost nothing more."""
        return "_curves" in vars(self)

    def damage(self, errors: Sequence[float]) -> list[float]:
        """How far errors move the network's outputs; without calibration images, the errors themselves."""
        points = self._curves.damages if self.calibrated else []
        return damage_curve(points, errors) if points else list(errors)

    def unfoldings(self) -> list[Unfolding]:
        """The unfoldings of the kernel by input and by output channel; of groups, those with the largest singular values."""
        self._require_weights()
        tensor = schemes.kernel_tensor(self._spec, self._weight).flatten(3)
        result: list[Unfolding] = []
        for matrix in (tensor.transpose(1, 2).flatten(2), tensor.flatten(2)):
            values = torch.linalg.svdvals(matrix)
            result.append((values[int(values.sum(1).argmax())].tolist(), (matrix.shape[1], matrix.shape[2])))
        return result

    @cached_property
    def _truncation_errors(self) -> dict[str, Tensor]:
        """Errors of the weights at all ranks, for schemes with a spectrum; with calibration, for pairs of ranks alone."""
        result: dict[str, Tensor] = {}
        for name in self._applicable:
            scheme = schemes.get_scheme(name)
            if not self.calibrated or isinstance(scheme.full_rank(self._spec.one_group()), tuple):
                spectrum = schemes.spectrum(scheme, self._spec, self._weight)
                if spectrum is not None:
                    result[name] = truncation_errors(spectrum.cpu())
        return result

    @cached_property
    def _applicable(self) -> list[str]:
        return [name for name in self._names if schemes.refusal(schemes.get_scheme(name), self._spec) is None]

    @cached_property
    def _sample_ranks(self) -> dict[str, list[Rank]]:
        """The ranks at which errors are measured: the cheapest, and the best below some fractions of the layer's MACs."""
        result: dict[str, list[Rank]] = {}
        wide = is_wide(self._weight)
        for name in self._applicable:
            scheme = schemes.get_scheme(name)
            ranks: list[tuple[Rank, float]] = []
            for rank in scheme.ranks(self._spec.one_group()):
                fraction = schemes.option_cost(scheme, self._spec, rank, self._site.sizes).macs / max(self._site.cost.macs, 1)
                if fraction < 1 or not ranks:
                    ranks.append((rank, fraction))
                elif isinstance(rank, int):
                    break
            bounds = None if isinstance(ranks[0][0], int) else self.bounds(name, [rank for rank, _ in ranks])
            samples = {ranks[0][0]}
            for limit in WIDE_SAMPLE_FRACTIONS if wide else CLOSED_FRACTIONS if schemes.has_optimum(scheme) else SAMPLE_FRACTIONS:
                within = [k for k, (_, fraction) in enumerate(ranks) if fraction <= limit]
                if within:
                    samples.add(ranks[within[-1] if bounds is None else min(within, key=bounds.__getitem__)][0])
            result[name] = sorted(samples)
        return result

    @cached_property
    def _costs(self) -> dict[Sample, list[float]]:
        """All sampled options: MACs, parameters and, if options were timed, interpolated milliseconds."""
        costs: dict[Sample, list[float]] = {}
        for name, ranks in self._sample_ranks.items():
            for rank in ranks:
                cost = schemes.option_cost(schemes.get_scheme(name), self._spec, rank, self._site.sizes)
                costs[name, rank] = [float(cost.macs), float(cost.params)]
                if self.latencies:
                    timed = self.latencies.get(name)
                    costs[name, rank].append(float(np.interp(cost.macs, *np.array(timed).T)) if timed else np.inf)
        return costs

    @cached_property
    def _curves(self) -> Curves:
        """Errors and damages of sampled options, from the cache where it has them.

        Without calibration images, the errors of factors of the weights. With them, those of `OptionFits.output_error`, times the gain
        of a whole fit. Damage is measured for options with errors near DAMAGE_ERRORS, of those only that a plan may choose: options with
        the same error differ in damage by a third.
        """
        self._require_weights()
        self.on_measure()
        fits, ranks = OptionFits(self._site, self._layer, self._estimator), self._sample_ranks
        if not self.calibrated:
            errors: dict[Sample, float] = {}
            for name, group in ranks.items():
                if name not in self._truncation_errors:  # otherwise known at all ranks
                    values = self._cached("weights", name, group, partial(fits.weight_errors, name, group))
                    errors |= {(name, rank): value for rank, value in zip(group, values, strict=True)}
            return Curves(errors, [])
        samples = [(name, rank) for name, group in ranks.items() for rank in group]
        rough = {s: self._cached("outputs", s[0], [s[1]], partial(fits.output_error, *s, ranks[s[0]])) for s in samples}
        errors = dict(rough)
        for name, group in ranks.items():
            if fitted := [rank for rank in group if fits.has_gain(name, rank)]:
                middle = fitted[len(fitted) // 2]
                factor, power = self._cached("gain", name, [middle], partial(fits.gain, name, middle, group))
                errors |= {(name, rank): rough[name, rank] * min(1.0, factor * rough[name, rank] ** power) for rank in fitted}
        candidates = [sample for sample in samples if not self._is_beaten(sample, errors)]
        chosen = {min(candidates, key=lambda s: abs(np.log(max(rough[s], TINY) / target))): None for target in DAMAGE_ERRORS}
        damages = [self._cached("damage", s[0], [s[1]], partial(fits.damage, *s, ranks[s[0]])) for s in chosen]
        return Curves(errors, [(rough[sample], damage) for sample, damage in zip(chosen, damages, strict=True)])

    def _is_beaten(self, sample: Sample, errors: dict[Sample, float]) -> bool:
        """Whether in each measure another option has a much smaller error, at no more cost."""
        better = [self._costs[other] for other, error in errors.items() if error * DAMAGE_SKIP_RATIO < errors[sample]]
        return all(any(costs[m] <= cost for costs in better) for m, cost in enumerate(self._costs[sample]))

    def _cached(self, kind: str, name: str, ranks: Sequence[Rank], compute: Callable[[], Any]) -> Any:
        built_in = all(schemes.is_built_in(schemes.get_scheme(name)) for name in self._names)
        cache = self._estimator.cache if built_in else Cache(False)
        source = self._estimator.digest if self.calibrated else digest(self._weight)
        key = [source, self._site.name, str(self._spec), [list(size) for size in self._site.sizes], name]
        return cache.get(kind, [*key, [list(rank) if isinstance(rank, tuple) else rank for rank in ranks]], compute)

    def _require_weights(self) -> None:
        if self._weight.is_meta:
            raise ValueError(
                f"{self._site.name}: its weights are on the meta device, so errors of options cannot be measured. Plan on a model with "
                "weights; the plan also fits this one, with apply_plan(model, plan, init='empty')."
            )
