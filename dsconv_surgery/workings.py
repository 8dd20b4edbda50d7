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
from dsconv_surgery.budget import Offer, Unfolding
from dsconv_surgery.cache import Cache, digest
from dsconv_surgery.curves import along, smooth
from dsconv_surgery.geometry import Cost, Rank, chain_cost
from dsconv_surgery.graph import ConvSite
from dsconv_surgery.schemes import Factors
from dsconv_surgery.sensitivity import Study

ANCHORS = (0.05, 0.1, 0.18, 0.3, 0.5, 0.8)  # parts of a layer's MACs at which errors and times are measured; interpolated between
ITERATIONS, WIDE_ITERATIONS, WIDE_SIDE = 20, 5, 1024  # of a fit there, and where a patch is longer than
PROBES = tuple(np.geomspace(0.6, 0.006, 13))  # errors near which it is measured what they do to the network
AT_HAND = 0.1  # so much farther off, in log error, an option that was measured anyway may be
FAR = 2.0  # options whose error, roughly, is more than so many times that of cheaper ones are not looked into
NEAR = 1.3  # options whose error is at most so many times that of one that costs no more
TINY = 1e-9  # errors and damages below are not told apart


class Workings:
    """Measures a layer's options, each once, and keeps the factors that it had to find on the way."""

    def __init__(self, site: ConvSite, layer: nn.Module, names: Sequence[str], study: Study) -> None:
        self.site, self.layer, self.names, self.study = site, layer, names, study
        self.spec, self.weight = site.spec, layer.get_parameter("weight")
        # A registered scheme may be another one by the same name next time.
        ours = all(type(schemes.get_scheme(name)).__module__.startswith("dsconv_surgery.") for name in names)
        self._cache = study.cache if ours else Cache(False)
        self.made: dict[tuple[str, Rank], Factors] = {}
        self.begun: Callable[[], object] = lambda: None  # called when a layer's first option is measured
        self._errors: dict[tuple[str, Rank], float] = {}
        self._explained: dict[str, Tensor | None] = {}
        self._cheaper: dict[str, list[tuple[Rank, Cost]]] = {}
        self._anchors: dict[str, list[Rank]] = {}
        self._idle = True
        self._probed: list[tuple[str, Rank]] = []  # options with errors near `PROBES`
        self._known: list[tuple[float, float]] = []  # errors, and what they do to the network
        self.offers: Mapping[str, Sequence[Offer]] = {}  # as in the layer's table
        self._judged: dict[tuple[str, Rank], float] = {}  # errors at anchors, and of what is probed
        self._tried: dict[tuple[str, Rank], Factors] = {}  # their factors, until it is known what they do to the network
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
        """Errors at many ranks: exact where a spectrum tells them, else measured at a few and interpolated, log against log."""
        known = self.bounds(name, ranks)
        if known is not None and self.study.images is None:
            return known
        if self.study.images is None:
            anchors = self.anchors(name)
            errors = self._cache.get("errors", [digest(self.weight), *self._key, name, _plain(anchors)], lambda: self._rough(name))
            return self._between(name, dict(zip(anchors, errors, strict=True)), ranks)
        if not self._judged:
            self._judge()
        return self._between(name, {rank: error for (other, rank), error in self._judged.items() if other == name}, ranks)

    def _between(self, name: str, measured: Mapping[Rank, float], ranks: Sequence[Rank]) -> list[float]:
        """Errors at many ranks from those at some; of pairs, which do not all compare, the weights' errors tell the order."""
        bounds, asked = self.bounds(name, list(measured)), self.bounds(name, ranks)
        if bounds is None or asked is None:
            x, at = np.log(np.array(list(measured), dtype=float)), np.log(np.array(ranks, dtype=float))
        else:
            x, at = (-np.log(np.maximum(np.array(found), TINY)) for found in (bounds, asked))
        order = np.argsort(x, kind="stable")
        errors = np.minimum.accumulate(np.log(np.maximum(np.array(list(measured.values())), TINY))[order])
        return np.exp(along(x[order], errors, at)).clip(0.0, 1.0).tolist()

    def cheaper(self, name: str) -> list[tuple[Rank, Cost]]:
        """A scheme's ranks that take fewer MACs than the layer, with what they cost; at least one."""
        if name not in self._cheaper:
            scheme, found = schemes.get_scheme(name), list[tuple[Rank, Cost]]()
            for rank in scheme.ranks(replace(self.spec.one_group(), bias=False)):
                cost = chain_cost(schemes.chain_of(scheme, self.spec, rank), self.site.sizes)
                if cost.macs < self.site.cost.macs or not found:
                    found.append((rank, cost))
                elif isinstance(rank, int):
                    break
            self._cheaper[name] = found
        return self._cheaper[name]

    def anchors(self, name: str) -> list[Rank]:
        """The ranks at which a scheme's errors are measured: its cheapest, and those nearest below parts of the layer's MACs."""
        if name in self._anchors:
            return self._anchors[name]
        offers = self.cheaper(name)
        bounds = None if isinstance(offers[0][0], int) else self.bounds(name, [rank for rank, _ in offers])
        chosen: dict[Rank, None] = {offers[0][0]: None}
        for fraction in ANCHORS:
            within = [at for at, (_, cost) in enumerate(offers) if cost.macs <= fraction * self.site.cost.macs]
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
        harm = np.exp(smooth(x, y, at))
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

    def _judge(self) -> None:
        """Errors on data at the anchors of every scheme - all links fitted where that may pay, else the last one only - and near `PROBES`.

        An option is far off if, so far, others leave less than half of its error and cost no more, by each measure: fitting all
        links lowers errors by some tens of percent.
        """
        rough: dict[tuple[str, Rank], tuple[float, list[float]]] = {}
        for name in self._admissible():
            anchors = self.anchors(name)
            key = [self.study.digest, *self._key, name, _plain(anchors)]
            for rank, error in zip(anchors, self._cache.get("rough", key, partial(self._rough, name)), strict=True):
                rough[name, rank] = error, self._costs(name, rank)

        def far(error: float, costs: list[float]) -> bool:
            better = [its for other, its in rough.values() if other * FAR < error]
            return all(any(its[m] <= cost for its in better) for m, cost in enumerate(costs))

        found = {option: error if far(error, costs) else self._fitted(*option) for option, (error, costs) in rough.items()}
        self._probed = self._near_probes(found)
        self._judged = found | {option: self._fitted(*option) for option in self._probed if option not in found}

    def _admissible(self) -> list[str]:
        return [name for name in self.names if schemes.refusal(schemes.get_scheme(name), self.spec) is None]

    def _fitted(self, name: str, rank: Rank) -> float:
        """The error on data with all links fitted."""

        def fitted() -> float:
            self._begin()
            iterations = WIDE_ITERATIONS if self.weight[0].numel() > WIDE_SIDE else ITERATIONS
            error, factors = self._fit(name, rank, self._tried.get((name, rank)), iterations)
            self._tried[name, rank] = {link: factor.float() for link, factor in factors.items()}
            return error

        return float(self._cache.get("fitted", [self.study.digest, *self._key, name, _plain([rank])], fitted))

    def _near_probes(self, measured: Mapping[tuple[str, Rank], float]) -> list[tuple[str, Rank]]:
        """Options of about the least MACs, and of about the fewest parameters, for errors near `PROBES`."""
        every: list[tuple[str, Rank]] = []
        costs: list[Cost] = []
        errors: list[float] = []
        for name in self._admissible():
            ranks = [rank for rank, _ in self.cheaper(name)]
            every += [(name, rank) for rank in ranks]
            costs += [cost for _, cost in self.cheaper(name)]
            errors += self._between(name, {rank: error for (other, rank), error in measured.items() if other == name}, ranks)
        error = np.maximum(np.array(errors), TINY)
        farther = np.array([0.0 if option in measured else AT_HAND for option in every])
        chosen: dict[tuple[str, Rank], None] = {}
        for measure in ("macs", "params"):
            cost = np.array([float(getattr(its, measure)) for its in costs])
            order = np.argsort(cost, kind="stable")
            least = np.minimum.accumulate(error[order])[np.searchsorted(cost[order], cost, side="right") - 1]
            good = np.flatnonzero(error <= NEAR * least)  # of one error, schemes do different harm: those that may be chosen
            for probe in PROBES:
                off = np.abs(np.log(error[good] / probe)) + farther[good]
                chosen[every[int(good[off.argmin()])]] = None
        return list(chosen)

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

    def _probes(self) -> list[tuple[float, float]]:
        """Pairs of an error of this layer and what it does to the network."""
        if not self._known:
            if not self._judged:
                self._judge()
            key = [self.study.digest, *self._key, [[name, *_plain([rank])] for name, rank in self._probed]]
            harm = self._cache.get("damage", key, lambda: [self._effect(*option) for option in self._probed])
            self._known = [(self._judged[option], its) for option, its in zip(self._probed, harm, strict=True)]
            self._tried.clear()
        return self._known

    def _effect(self, name: str, rank: Rank) -> float:
        factors = self._tried[name, rank] if (name, rank) in self._tried else self._fit(name, rank, None, ITERATIONS)[1]
        links = schemes.build(schemes.chain_of(schemes.get_scheme(name), self.spec, rank), self.layer, factors)
        return self.study.divergence(self.site.name, links)

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
