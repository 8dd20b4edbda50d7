"""The table of one layer's options: the cost of each scheme at each rank, without the options that save nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from dsconv_surgery import schemes
from dsconv_surgery.network.discovery import ConvSite, Skip
from dsconv_surgery.network.geometry import Cost, chain_cost
from dsconv_surgery.network.layers import check_finite
from dsconv_surgery.planning.damage import DamageEstimator
from dsconv_surgery.planning.layer_latency import LayerTimer
from dsconv_surgery.planning.option_errors import SAMPLE_FRACTIONS, OptionErrors
from dsconv_surgery.planning.tables import Option, Table

FASTER = 0.95  # an option must take less than this fraction of the layer's time: timings vary as much


def layer_options(
    site: ConvSite,
    module: nn.Module,
    names: Sequence[str],
    measures: Sequence[str],
    estimator: DamageEstimator,
    timer: LayerTimer | None = None,
    multiple: int = 1,
) -> tuple[Table, OptionErrors] | Skip:
    """The options that cost less than the layer in all measures; a skip with the reason if there are none.

    Args:
        names: schemes to offer.
        measures: "macs", "params" and, with a timer, "latency".
        estimator: estimates damage of the options' errors.
        timer: times options at sampled ranks; times in between are interpolated by MACs.
        multiple: offer only ranks at which all links but the last have a multiple of this number of output channels.
    """
    weight = module.get_parameter("weight")
    if not weight.is_meta:
        check_finite(site.name, weight)
    errors = OptionErrors(site, module, names, estimator)
    dense = site.cost if timer is None else replace(site.cost, latency=timer.time({"dense": site.spec}, site.sizes))
    refusals = {name: schemes.refusal(schemes.get_scheme(name), site.spec) for name in names}
    tried = {name: _options_up_to_dense(name, site, dense, measures) for name, refusal in refusals.items() if not refusal}
    options: dict[str, list[Option]] = {}
    for name, candidates in tried.items():
        group = [option for option in candidates if _saves(option, dense, measures) and _has_multiple(option, site, multiple)]
        if timer is not None and group:
            group = [option for option in _timed(group, site, errors, timer) if option.cost.latency < FASTER * dense.latency]
        if group:
            options[name] = sorted(group, key=lambda option: (option.cost.macs, option.cost.params))
    if options:
        if timer is not None:
            errors.latencies = {name: [(float(o.cost.macs), o.cost.latency) for o in group] for name, group in options.items()}
        return Table(site.name, dense, options, errors), errors
    all_options = [option for candidates in tried.values() for option in candidates]
    saving = [option for option in all_options if _saves(option, dense, measures)]
    if not all_options:
        reason = "; ".join(f"{name}: {refusal}" for name, refusal in refusals.items())
    elif saving and not any(_has_multiple(option, site, multiple) for option in saving):
        reason = f"no rank that saves anything gives all links a multiple of {multiple} channels (multiple=)."
    else:
        least = min(all_options, key=lambda option: option.cost.macs)
        costs = f"costs {least.cost.macs:,} MACs and {least.cost.params:,} parameters, the layer {dense.macs:,} and {dense.params:,}."
        depthwise = "it is already depthwise: " if site.spec.groups == site.spec.in_channels > 1 else ""
        reason = f"{depthwise}{least.scheme} at rank {least.rank} already {costs}"
        if timer is not None and _saves(least, dense, measures):
            reason = f"no option is faster than the layer ({dense.latency:.3f} ms) on this machine."
    return Skip(site.name, reason)


def _options_up_to_dense(name: str, site: ConvSite, dense: Cost, measures: Sequence[str]) -> list[Option]:
    """A scheme's options by rising rank; single ranks end with the first that saves nothing, because cost grows with rank."""
    scheme = schemes.get_scheme(name)
    result: list[Option] = []
    for rank in scheme.ranks(site.spec.one_group()):
        result.append(Option(name, rank, chain_cost(schemes.chain_of(scheme, site.spec, rank), site.sizes)))
        if isinstance(rank, int) and not _saves(result[-1], dense, measures):
            break
    return result


def _saves(option: Option, dense: Cost, measures: Sequence[str]) -> bool:
    """Whether an option costs less than the layer in all measures but latency."""
    return all(getattr(option.cost, m) < getattr(dense, m) for m in measures if m != "latency")


def _has_multiple(option: Option, site: ConvSite, multiple: int) -> bool:
    links = list(schemes.chain_of(schemes.get_scheme(option.scheme), site.spec, option.rank).values())
    return all(link.out_channels % multiple == 0 for link in links[:-1])


def _timed(options: list[Option], site: ConvSite, errors: OptionErrors, timer: LayerTimer) -> list[Option]:
    """Options of one scheme with their milliseconds, measured near SAMPLE_FRACTIONS and interpolated by MACs; of pairs, only the best."""
    options = sorted(options, key=lambda option: option.cost.macs)
    scheme, ranks = schemes.get_scheme(options[0].scheme), [option.rank for option in options]
    bounds = None if isinstance(ranks[0], int) else errors.bounds(scheme.name, ranks)
    if bounds is not None:  # keep pairs with a lower bound than all cheaper pairs
        lowest = np.minimum.accumulate(np.append(np.inf, bounds))[:-1]
        options = [option for option, bound, limit in zip(options, bounds, lowest, strict=True) if bound < limit]
    macs = np.array([float(option.cost.macs) for option in options])
    samples = sorted({0, len(options) - 1, *(int(np.abs(macs - part * site.cost.macs).argmin()) for part in SAMPLE_FRACTIONS)})
    times = [timer.time(schemes.chain_of(scheme, site.spec, options[k].rank), site.sizes) for k in samples]
    latencies = np.interp(macs, macs[samples], times)
    return [replace(option, cost=replace(option.cost, latency=float(ms))) for option, ms in zip(options, latencies, strict=True)]
