"""A layer's options: what each scheme would cost at each rank, and how far off its kernel would be, measured when asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dsconv_surgery import schemes
from dsconv_surgery.budget import Table
from dsconv_surgery.geometry import ConvSpec, Cost, Rank, chain_cost
from dsconv_surgery.graph import ConvSite, Skip
from dsconv_surgery.schemes import Factors, Objective

PULL = 0.1  # ridge towards the weights, in units of the inputs' mean square, when options are judged on data


class Workings:
    """Measures a layer's options, each once, and keeps the factors that it had to find on the way."""

    def __init__(self, layer: str, spec: ConvSpec, weight: Tensor, seen: Callable[[str], Objective] | None = None) -> None:
        self.layer, self.spec, self.weight, self.seen = layer, spec, weight, seen
        self.made: dict[tuple[str, Rank], Factors] = {}
        self.begun: Callable[[], object] = lambda: None  # called when a layer's first option is measured
        self._errors: dict[tuple[str, Rank], float] = {}
        self._explained: dict[str, Tensor | None] = {}

    def bounds(self, name: str, ranks: Sequence[Rank]) -> list[float] | None:
        """Errors of the weights from the scheme's spectrum, upper bounds where that is not exact.

        With calibration, they still tell pairs of ranks apart; where there is one rank, nothing is said about it.
        """
        if self.seen is not None and isinstance(ranks[0], int):
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
            self._refuse_meta()
            if not self._errors:
                self.begun()
            scheme = schemes.get_scheme(name)
            if self.seen is None:
                factors = next(schemes.factorize(scheme, self.spec, self.weight, [rank]))
                self._errors[name, rank] = schemes.relative_error(self.weight, schemes.kernel_of(scheme, self.spec, factors))
            else:
                objective = self.seen(self.layer)
                factors = schemes.fit(scheme, self.spec, self.weight, rank, objective.ridged(PULL * max(objective.scale, 1e-12)))
                self._errors[name, rank] = objective.value(scheme.kernel(replace(self.spec.one_group(), bias=False), factors))
            self.made[name, rank] = {link: factor.to(self.weight.dtype) for link, factor in factors.items()}
        return self._errors[name, rank]

    def _refuse_meta(self) -> None:
        if self.weight.is_meta:
            raise ValueError(
                f"{self.layer}: its weights are on the meta device: there is nothing to measure an option's error on. Plan on a model "
                "that has its weights; that plan then fits this one too, with apply_plan(model, plan, init='empty')."
            )


def options_of(
    site: ConvSite,
    module: nn.Module,
    names: Sequence[str],
    measures: Sequence[str],
    seen: Callable[[str], Objective] | None = None,
) -> tuple[Table, Workings] | Skip:
    """The options of a layer, judged by its outputs on data where `seen` has the objective for it; or why it has none."""
    weight = module.get_parameter("weight")
    if not weight.is_meta:
        check_finite(site.name, weight)
    offers: dict[str, list[tuple[Rank, Cost]]] = {}
    refusals: dict[str, str] = {}
    least: tuple[Cost, str, Rank] | None = None
    for name in names:
        scheme = schemes.get_scheme(name)
        why = schemes.refusal(scheme, site.spec)
        if why:
            refusals[name] = why
            continue
        block = replace(site.spec.one_group(), bias=False)
        cheaper: list[tuple[Rank, Cost]] = []
        for rank in scheme.ranks(block):
            cost = chain_cost(schemes.chain_of(scheme, site.spec, rank), site.sizes)
            if least is None or cost.macs < least[0].macs:
                least = (cost, name, rank)
            if all(getattr(cost, m) < getattr(site.cost, m) for m in measures):
                cheaper.append((rank, cost))
            elif isinstance(rank, int):
                break  # cost grows with rank
        if cheaper:
            offers[name] = sorted(cheaper, key=lambda offer: (offer[1].macs, offer[1].params))
    if not offers:
        if least is None:
            return Skip(site.name, "left dense - " + "; ".join(f"{name}: {why}" for name, why in refusals.items()))
        cost, name, rank = least
        costs_text = f"costs {cost.macs:,} MACs and {cost.params:,} parameters, the layer {site.cost.macs:,} and {site.cost.params:,}."
        return Skip(site.name, f"left dense - {name} at rank {rank} already {costs_text}")
    workings = Workings(site.name, site.spec, weight, seen)
    return Table(site.name, site.cost, offers, workings.measure, workings.bounds), workings


def check_finite(name: str, weight: Tensor) -> None:
    """Raise ValueError unless all entries of a layer's weight are finite."""
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise ValueError(
            f"{name}: {bad} of {weight.numel()} weights are NaN or infinite, expected finite ones. Repair them, or exclude the layer."
        )
