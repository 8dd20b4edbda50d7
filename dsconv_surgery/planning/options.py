"""A layer's options: what each scheme would cost at each rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from dsconv_surgery import schemes
from dsconv_surgery.network.discovery import ConvSite, Skip
from dsconv_surgery.network.geometry import Cost, Rank, chain_cost
from dsconv_surgery.network.layers import check_finite
from dsconv_surgery.planning.damage import DamageEstimator
from dsconv_surgery.planning.layer_latency import LayerTimer
from dsconv_surgery.planning.option_errors import ANCHORS, OptionErrors
from dsconv_surgery.planning.tables import Table

FASTER = 0.95  # of a layer's time, which an option has to stay below: timings of the same thing differ by as much


def layer_options(
    site: ConvSite,
    module: nn.Module,
    names: Sequence[str],
    measures: Sequence[str],
    study: DamageEstimator,
    clock: LayerTimer | None = None,
    multiple: int = 1,
) -> tuple[Table, OptionErrors] | Skip:
    """The options of a layer that cost less than it does by all measures; or why it has none.

    Args:
        names: schemes to offer.
        measures: "macs", "params" and, with a clock, "latency".
        study: what is known of the network, and of data.
        clock: to time options with; they are timed at the anchors, and between those by their MACs.
        multiple: offer only ranks at which every link but the last has a multiple of so many channels.
    """
    weight = module.get_parameter("weight")
    if not weight.is_meta:
        check_finite(site.name, weight)
    workings = OptionErrors(site, module, names, study)
    dense = site.cost if clock is None else replace(site.cost, latency=clock.time({"dense": site.spec}, site.sizes))
    offers: dict[str, list[tuple[Rank, Cost]]] = {}
    refusals: dict[str, str] = {}
    least: tuple[Cost, str, Rank] | None = None
    cheaper = rounded = 0  # options by cost, and those of them with the channels asked for
    for name in names:
        scheme = schemes.get_scheme(name)
        why = schemes.refusal(scheme, site.spec)
        if why:
            refusals[name] = why
            continue
        block = replace(site.spec.one_group(), bias=False)
        every: list[tuple[Rank, Cost]] = []
        for rank in scheme.ranks(block):
            chain = schemes.chain_of(scheme, site.spec, rank)
            cost = chain_cost(chain, site.sizes)
            if least is None or cost.macs < least[0].macs:
                least = (cost, name, rank)
            if any(getattr(cost, m) >= getattr(dense, m) for m in measures if m != "latency"):
                if isinstance(rank, int):
                    break  # cost grows with rank
                continue
            cheaper += 1
            if all(link.out_channels % multiple == 0 for link in list(chain.values())[:-1]):
                rounded += 1
                every.append((rank, cost))
        if clock is not None:
            every = [(rank, cost) for rank, cost in _timed(name, every, site, workings, clock) if cost.latency < FASTER * dense.latency]
        if every:
            offers[name] = sorted(every, key=lambda offer: (offer[1].macs, offer[1].params))
    if not offers:
        if least is None:
            return Skip(site.name, "left dense - " + "; ".join(f"{name}: {why}" for name, why in refusals.items()))
        cost, name, rank = least
        if cheaper and not rounded:
            return Skip(
                site.name, f"left dense - no rank that saves anything gives all links a multiple of {multiple} channels (multiple=)."
            )
        if clock is not None and all(getattr(cost, m) < getattr(dense, m) for m in measures if m != "latency"):
            return Skip(site.name, f"left dense - nothing was faster than the layer itself ({dense.latency:.3f} ms) on this machine.")
        costs_text = f"costs {cost.macs:,} MACs and {cost.params:,} parameters, the layer {site.cost.macs:,} and {site.cost.params:,}."
        return Skip(site.name, f"left dense - {name} at rank {rank} already {costs_text}")
    workings.offers = offers
    return Table(site.name, dense, offers, workings), workings


def _timed(
    name: str, offers: list[tuple[Rank, Cost]], site: ConvSite, workings: OptionErrors, clock: LayerTimer
) -> list[tuple[Rank, Cost]]:
    """Offers with their milliseconds: measured for those nearest the anchors, in between by MACs."""
    if not offers:
        return []
    offers = sorted(offers, key=lambda offer: offer[1].macs)
    bounds = None if isinstance(offers[0][0], int) else workings.bounds(name, [rank for rank, _ in offers])
    if bounds is not None:  # of pairs, those that nothing cheaper is better than
        best = np.minimum.accumulate(np.append(np.inf, bounds))[:-1]
        offers = [offer for offer, bound, before in zip(offers, bounds, best, strict=True) if bound < before]
    macs = np.array([float(cost.macs) for _, cost in offers])
    chosen = sorted({0, len(offers) - 1, *(int(np.abs(macs - part * site.cost.macs).argmin()) for part in ANCHORS)})
    scheme = schemes.get_scheme(name)
    times = [clock.time(schemes.chain_of(scheme, site.spec, offers[at][0]), site.sizes) for at in chosen]
    return [(rank, replace(cost, latency=float(ms))) for (rank, cost), ms in zip(offers, np.interp(macs, macs[chosen], times), strict=True)]
