"""What there is to know of one layer's options: how far off each would be, and what that would do to the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsconv_surgery import schemes
from dsconv_surgery.network.discovery import ConvSite
from dsconv_surgery.network.geometry import Cost, Rank, chain_cost
from dsconv_surgery.planning.damage import WIDTH, DamageEstimator, interpolate, smooth_curve
from dsconv_surgery.planning.tables import Offer, Unfolding
from dsconv_surgery.schemes import Factors
from dsconv_surgery.support.cache import Cache, digest

ANCHORS = (0.05, 0.1, 0.18, 0.3, 0.5, 0.8)  # parts of a layer's MACs at which errors and times are measured; interpolated between
ITERATIONS, WIDE_ITERATIONS, WIDE_SIDE = 20, 5, 1024  # of a fit there, and where a patch is longer than
PROBES = tuple(np.geomspace(0.6, 0.01, 10))  # errors near which it is measured what they do to the network
FAR = 2.0  # options whose error, roughly, is more than so many times that of cheaper ones are not looked into
NEAR = 1.3  # options whose error is at most so many times that of one that costs no more
TINY = 1e-9  # errors and damages below are not told apart


class OptionErrors:
    """Measures a layer's options, each once, and keeps the factors that it had to find on the way."""

    def __init__(self, site: ConvSite, layer: nn.Module, names: Sequence[str], study: DamageEstimator) -> None:
        self.site, self.layer, self.names, self.study = site, layer, names, study
        self.spec, self.weight = site.spec, layer.get_parameter("weight")
        # A registered scheme may be another one by the same name next time.
        ours = all(type(schemes.get_scheme(name)).__module__.startswith("dsconv_surgery.") for name in names)
        self._cache = study.cache if ours else Cache(False)
        self.made: dict[tuple[str, Rank], Factors] = {}
        self.begun: Callable[[], object] = lambda: None  # called when a layer's first option is measured
        self._errors: dict[tuple[str, Rank], float] = {}
        self._explained: dict[str, Tensor | None] = {}
        self._anchors: dict[str, list[Rank]] = {}
        self._idle = True
        self._known: list[tuple[float, float]] = []  # errors, and what they do to the network
        self.offers: Mapping[str, Sequence[Offer]] = {}  # as in the layer's table
        self._judged: dict[tuple[str, Rank], float] = {}  # errors at anchors
        self._tried: dict[tuple[str, Rank], Factors] = {}  # factors at anchors, until it is known what they do to the network
        self._key: list[Any] = [site.name, str(site.spec), [list(size) for size in site.sizes]]

    def bounds(self, name: str, ranks: Sequence[Rank]) -> list[float] | None:
        """Errors of the weights from the scheme's spectrum, upper bounds where that is not exact.

        With calibration, they still tell pairs of ranks apart; where there is one rank, nothing is said about it.
        """
        if self.study.images is not None and isinstance(ranks[0], int):
            return None
        self._refuse_meta()
        if name not in self._explained:
            spectrum = schemes.spectrum(schemes.get_scheme(name), self.spec, self.weight)
            if spectrum is not None:
                # What is left out, summed from the small end: small errors keep their digits.
                total = spectrum.sum()
                if spectrum.ndim == 1:
                    spectrum = torch.cat([spectrum.flip(0).cumsum(0).flip(0)[1:], spectrum.new_zeros(1)])
                else:
                    spectrum = total - spectrum.cumsum(0).cumsum(1)
                spectrum = (spectrum / total).clamp(min=0) if total > 0 else torch.zeros_like(spectrum)
            self._explained[name] = spectrum
        left = self._explained[name]
        if left is None:
            return None
        return [float(left[rank - 1] if isinstance(rank, int) else left[rank[0] - 1, rank[1] - 1]) for rank in ranks]

    def measure(self, name: str, rank: Rank) -> float:
        if (name, rank) not in self._errors:
            self._begin()
            if self.study.images is None:
                scheme = schemes.get_scheme(name)
                factors = next(schemes.factorize(scheme, self.spec, self.weight, [rank]))
                self._errors[name, rank] = schemes.relative_error(self.weight, schemes.kernel_of(scheme, self.spec, factors))
            else:
                self._errors[name, rank], factors = self._fit(name, rank, None, None)
            self.made[name, rank] = {link: factor.to(self.weight.dtype) for link, factor in factors.items()}
        return self._errors[name, rank]

    def estimate(self, name: str, ranks: Sequence[Rank]) -> list[float]:
        """Errors at many ranks: exact where a spectrum tells them, else measured at `anchors` and interpolated, log against log."""
        known = self.bounds(name, ranks)
        if known is not None and self.study.images is None:
            return known
        anchors = self.anchors(name)
        found = self._errors_at(name, anchors)
        at_anchors = self.bounds(name, anchors)  # of pairs, which do not all compare, the weights' errors tell the order
        x = [float(rank) if isinstance(rank, int) else 0.0 for rank in anchors] if at_anchors is None else [-e for e in at_anchors]
        asked = [float(rank) if isinstance(rank, int) else 0.0 for rank in ranks] if known is None else [-e for e in known]
        scale = np.log if at_anchors is None else _log_of_error
        order = np.argsort(x)
        errors = np.minimum.accumulate(np.log(np.maximum(np.array(found)[order], TINY)))
        return np.exp(interpolate(scale(np.array(x)[order]), errors, scale(np.array(asked)))).clip(0.0, 1.0).tolist()

    def anchors(self, name: str) -> list[Rank]:
        """The ranks at which a scheme's errors are measured: its cheapest, and those nearest below parts of the layer's MACs."""
        if name in self._anchors:
            return self._anchors[name]
        scheme = schemes.get_scheme(name)
        block = replace(self.spec.one_group(), bias=False)
        offers: list[tuple[Rank, float]] = []
        for rank in scheme.ranks(block):
            part = chain_cost(schemes.chain_of(scheme, self.spec, rank), self.site.sizes).macs / max(self.site.cost.macs, 1)
            if part < 1 or not offers:
                offers.append((rank, part))
            elif isinstance(rank, int):
                break
        bounds = None if isinstance(offers[0][0], int) else self.bounds(name, [rank for rank, _ in offers])
        chosen: dict[Rank, None] = {offers[0][0]: None}
        for fraction in ANCHORS:
            within = [at for at, (_, part) in enumerate(offers) if part <= fraction]
            if within:  # of pairs the one that the weights like best
                chosen[offers[within[-1] if bounds is None else min(within, key=bounds.__getitem__)][0]] = None
        self._anchors[name] = sorted(chosen)
        return self._anchors[name]

    def damage(self, errors: Sequence[float]) -> list[float]:
        """What errors do to the network's outputs, log against log between errors at which that was measured."""
        if self.study.images is None:
            return list(errors)
        found = self._probes()
        if len(found) < 2:
            return list(errors)
        at = np.log(np.maximum(np.array(errors), TINY))
        x, y = np.log(np.maximum(np.array(found), TINY)).T
        harm = np.exp(smooth_curve(x, y, at))
        return [float(h) if error > TINY else 0.0 for h, error in zip(harm, errors, strict=True)]

    def unfoldings(self, name: str) -> list[Unfolding]:
        """For tucker: of the kernel by input channel and by output channel; of groups, the one whose values are largest."""
        if name != "tucker":
            raise ValueError(f"{self.site.name}: unfoldings are known for tucker, not for {name!r}.")
        self._refuse_meta()
        tensor = schemes.kernel_tensor(self.spec, self.weight).flatten(3)
        found: list[Unfolding] = []
        for matrix in (tensor.transpose(1, 2).flatten(2), tensor.flatten(2)):
            values = torch.linalg.svdvals(matrix)
            found.append((values[int(values.sum(1).argmax())].tolist(), (matrix.shape[1], matrix.shape[2])))
        return found

    def _errors_at(self, name: str, anchors: list[Rank]) -> list[float]:
        if self.study.images is None:
            return list(self._cache.get("errors", [digest(self.weight), *self._key, name, _plain(anchors)], lambda: self._rough(name)))
        if not self._judged:
            self._judge()
        return [self._judged[name, rank] for rank in anchors]

    def _judge(self) -> None:
        """Errors on data at the anchors of every scheme: all links fitted where that may pay, elsewhere the last one only.

        An option is far off if, so far, others leave less than half of its error and cost no more, by each measure: fitting all
        links lowers errors by some tens of percent.
        """
        rough: dict[tuple[str, Rank], tuple[float, list[float]]] = {}
        for name in self.names:
            if schemes.refusal(schemes.get_scheme(name), self.spec) is None:
                anchors = self.anchors(name)
                key = [self.study.digest, *self._key, name, _plain(anchors)]
                for rank, error in zip(anchors, self._cache.get("rough", key, partial(self._rough, name)), strict=True):
                    rough[name, rank] = error, self._costs(name, rank)

        def far(error: float, costs: list[float]) -> bool:
            better = [its for other, its in rough.values() if other * FAR < error]
            return all(any(its[m] <= cost for its in better) for m, cost in enumerate(costs))

        wide = self.weight[0].numel() > WIDE_SIDE
        for (name, rank), (error, costs) in rough.items():

            def fitted(name: str = name, rank: Rank = rank) -> float:
                self._begin()
                error, factors = self._fit(name, rank, self._tried.get((name, rank)), WIDE_ITERATIONS if wide else ITERATIONS)
                self._tried[name, rank] = {link: factor.float() for link, factor in factors.items()}
                return error

            key = [self.study.digest, *self._key, name, _plain([rank])]
            self._judged[name, rank] = error if far(error, costs) else self._cache.get("fitted", key, fitted)

    def _costs(self, name: str, rank: Rank) -> list[float]:
        """MACs, parameters and, where options were timed, milliseconds between those of the nearest offers."""
        cost = chain_cost(schemes.chain_of(schemes.get_scheme(name), self.spec, rank), self.site.sizes)
        found = [float(cost.macs), float(cost.params)]
        timed = [(float(its.macs), its.latency) for _, its in self.offers.get(name, ())]
        if any(its.latency for offers in self.offers.values() for _, its in offers):
            found.append(float(np.interp(cost.macs, *np.array(timed).T)) if timed else np.inf)
        return found

    def _rough(self, name: str) -> list[float]:
        """At each anchor, the error of the factors of the weights alone, with data of those with the last link fitted."""
        self._begin()
        scheme, anchors = schemes.get_scheme(name), self.anchors(name)
        errors: list[float] = []
        for rank, start in zip(anchors, schemes.factorize(scheme, self.spec, self.weight, anchors, rough=True), strict=True):
            if self.study.images is None:
                errors.append(schemes.relative_error(self.weight, schemes.kernel_of(scheme, self.spec, start)))
                continue
            error, factors = self._fit(name, rank, start, 0)
            errors.append(error)
            self._tried[name, rank] = {link: factor.float() for link, factor in factors.items()}
        return errors

    def _fit(self, name: str, rank: Rank, start: Factors | None, iterations: int | None) -> tuple[float, Factors]:
        scheme, (objective, ridged) = schemes.get_scheme(name), self.study.objectives(self.site.name)
        factors = schemes.fit(scheme, self.spec, self.weight, rank, ridged, start=start, iterations=iterations)
        return objective.value(scheme.kernel(replace(self.spec.one_group(), bias=False), factors)), factors

    def look_closer(self, name: str, rank: Rank) -> bool:
        """Measure what an option does to the network, unless that is known of one with nearly its error; whether it was not."""
        if self.study.images is None:
            return False
        (error,) = self.estimate(name, [rank])
        if any(abs(np.log(max(error, TINY) / max(known, TINY))) < WIDTH / 4 for known, _ in self._probes()):
            return False
        key = [self.study.digest, *self._key, name, *_plain([rank])]
        self._known.append(tuple(self._cache.get("effect", key, lambda: [error, self._effect(name, rank)])))
        return True

    def _probes(self) -> list[tuple[float, float]]:
        """Pairs of an error of this layer and what it does to the network."""
        if not self._known:
            found = self._cache.get("damage", [self.study.digest, *self._key, sorted(self.names)], self._damages)
            self._known = [(error, harm) for error, harm in found]
            self._tried.clear()
        return self._known

    def _effect(self, name: str, rank: Rank) -> float:
        factors = self._tried[name, rank] if (name, rank) in self._tried else self._fit(name, rank, None, ITERATIONS)[1]
        links = schemes.build(schemes.chain_of(schemes.get_scheme(name), self.spec, rank), self.layer, factors)
        return self.study.divergence(self.site.name, links)

    def _damages(self) -> list[tuple[float, float]]:
        """The same, first of all for options with errors near `PROBES` that cost about the least for them."""
        every: list[tuple[float, str, Rank, Cost]] = []
        for name in self.names:
            scheme = schemes.get_scheme(name)
            if schemes.refusal(scheme, self.spec) is None:
                anchors = self.anchors(name)
                for rank, error in zip(anchors, self._errors_at(name, anchors), strict=True):
                    every.append((error, name, rank, chain_cost(schemes.chain_of(scheme, self.spec, rank), self.site.sizes)))

        def beaten(option: tuple[float, str, Rank, Cost], measure: str) -> bool:
            cost = getattr(option[3], measure)
            return any(other[0] * NEAR < option[0] and getattr(other[3], measure) <= cost for other in every)

        # Of one error, schemes do different harm: look at those that may be chosen.
        every = [option for option in every if not (beaten(option, "macs") and beaten(option, "params"))]
        chosen = {min(every, key=lambda option: abs(np.log(max(option[0], TINY) / probe))): None for probe in PROBES}
        return [(error, self._effect(name, rank)) for error, name, rank, _ in chosen]

    def _begin(self) -> None:
        self._refuse_meta()
        if self._idle:
            self._idle = False
            self.begun()

    def _refuse_meta(self) -> None:
        if self.weight.is_meta:
            raise ValueError(
                f"{self.site.name}: its weights are on the meta device: there is nothing to measure an option's error on. Plan on a model "
                "that has its weights; that plan then fits this one too, with apply_plan(model, plan, init='empty')."
            )


def _plain(ranks: Sequence[Rank]) -> list[Any]:
    """Ranks as JSON has them."""
    return [list(rank) if isinstance(rank, tuple) else rank for rank in ranks]


def _log_of_error(negative: Any) -> Any:
    """Errors, given as their negatives so that they rise with quality, on a logarithmic scale."""
    return -np.log(np.maximum(-negative, TINY))
