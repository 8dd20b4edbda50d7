"""The table of one layer's options: the cost of each scheme at each rank, without the options that save nothing."""

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
from dsconv_surgery.planning.option_errors import OptionErrors
from dsconv_surgery.planning.tables import Option, Table

TIMED_FRACTIONS = (0.05, 0.1, 0.18, 0.3, 0.5, 0.8)  # of a layer's MACs: options near them are timed
# A special case of another scheme must cost this much less at the same rank. In layers of ResNets and SqueezeNet, errors of cp_split are
# 0.3 to 4 % larger than cp's at a tenth of the MACs and 11 to 25 % at six tenths, which is more than smaller savings are worth.
SPECIAL_SAVING = 0.03
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
    refusals = {name: schemes.refusal(schemes.get_scheme(name), site.spec) for name in names}
    names = [name for name in names if not _is_superseded(name, [other for other in names if not refusals[other]], site)]
    errors = OptionErrors(site, module, names, estimator)
    tried = {name: _options_up_to_dense(name, site, site.cost, measures) for name in names if not refusals[name]}
    dense, options = site.cost, dict[str, list[Option]]()
    for name, candidates in tried.items():
        if group := [option for option in candidates if _saves(option, dense, measures) and _has_multiple(option, site, multiple)]:
            options[name] = sorted(group, key=lambda option: (option.cost.macs, option.cost.params))
    if timer is not None and options:
        dense, options = _faster(options, site, errors, timer)
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
            reason = f"no option is faster than the layer ({dense.latency:.3f} ms in {timer.conditions.runtime})."
    return Skip(site.name, reason)


def preset_option(
    site: ConvSite, module: nn.Module, option: tuple[str, Rank], estimator: DamageEstimator, timer: LayerTimer | None = None
) -> tuple[Table, OptionErrors]:
    """A table with a scheme and a rank that the user chose, whatever they cost."""
    name, rank = option
    schemes.check_rank(f"ranks: {site.name}", schemes.get_scheme(name), site.spec, rank)
    weight = module.get_parameter("weight")
    if not weight.is_meta:
        check_finite(site.name, weight)
    chain = schemes.chain_of(schemes.get_scheme(name), site.spec, rank)
    dense, cost = site.cost, chain_cost(chain, site.sizes)
    if timer is not None:
        milliseconds = timer.time([{"dense": site.spec}, chain], site.sizes)
        dense, cost = (replace(c, latency=ms) for c, ms in zip((dense, cost), milliseconds, strict=True))
    errors = OptionErrors(site, module, [name], estimator)
    return Table(site.name, dense, {name: [Option(name, rank, cost)]}, errors), errors


def _is_superseded(name: str, others: Sequence[str], site: ConvSite) -> bool:
    """Whether a scheme is a special case of another on offer, and costs hardly less at the same rank."""
    general = schemes.get_scheme(name).general
    if general is None or not {name, general} <= set(others):
        return False
    special, whole = (schemes.option_cost(schemes.get_scheme(s), site.spec, 1, site.sizes) for s in (name, general))
    return all(getattr(whole, m) < (1 + SPECIAL_SAVING) * getattr(special, m) for m in ("macs", "params"))


def _options_up_to_dense(name: str, site: ConvSite, dense: Cost, measures: Sequence[str]) -> list[Option]:
    """A scheme's options by rising rank; single ranks end with the first that saves nothing, because cost grows with rank."""
    scheme = schemes.get_scheme(name)
    result: list[Option] = []
    for rank in scheme.ranks(site.spec.one_group()):
        result.append(Option(name, rank, schemes.option_cost(scheme, site.spec, rank, site.sizes)))
        if isinstance(rank, int) and not _saves(result[-1], dense, measures):
            break
    return result


def _saves(option: Option, dense: Cost, measures: Sequence[str]) -> bool:
    """Whether an option costs less than the layer in all measures but latency."""
    return all(getattr(option.cost, m) < getattr(dense, m) for m in measures if m != "latency")


def _has_multiple(option: Option, site: ConvSite, multiple: int) -> bool:
    links = [] if multiple == 1 else list(schemes.chain_of(schemes.get_scheme(option.scheme), site.spec, option.rank).values())
    return all(link.out_channels % multiple == 0 for link in links[:-1])


def _faster(
    options: dict[str, list[Option]], site: ConvSite, errors: OptionErrors, timer: LayerTimer
) -> tuple[Cost, dict[str, list[Option]]]:
    """The layer's cost and its faster options with their milliseconds; of pairs, only the best.

    The layer and the options near TIMED_FRACTIONS are measured in turn; times in between are interpolated by MACs.
    """
    samples: dict[str, list[int]] = {}
    for name, group in options.items():
        options = {**options, name: (group := _best_pairs(group, errors))}
        macs = np.array([float(option.cost.macs) for option in group])
        nearest = (int(np.abs(macs - part * site.cost.macs).argmin()) for part in TIMED_FRACTIONS)
        samples[name] = sorted({0, len(group) - 1, *nearest})
    sampled = [options[name][index] for name, indices in samples.items() for index in indices]
    chains = [schemes.chain_of(schemes.get_scheme(option.scheme), site.spec, option.rank) for option in sampled]
    milliseconds, *times = timer.time([{"dense": site.spec}, *chains], site.sizes)
    faster: dict[str, list[Option]] = {}
    for name, group in options.items():
        points = [(float(o.cost.macs), ms) for o, ms in zip(sampled, times, strict=True) if o.scheme == name]
        latencies = np.interp([float(option.cost.macs) for option in group], *np.array(points).T)
        timed = [replace(o, cost=replace(o.cost, latency=float(ms))) for o, ms in zip(group, latencies, strict=True)]
        if timed := [option for option in timed if option.cost.latency < FASTER * milliseconds]:
            faster[name] = timed
    return replace(site.cost, latency=milliseconds), faster


def _best_pairs(options: list[Option], errors: OptionErrors) -> list[Option]:
    """Of options with pairs of ranks, cheapest first, those with a lower bound on the error than all cheaper ones."""
    ranks = [option.rank for option in options]
    bounds = None if isinstance(ranks[0], int) else errors.bounds(options[0].scheme, ranks)
    if bounds is None:
        return options
    lowest = np.minimum.accumulate(np.append(np.inf, bounds))[:-1]
    return [option for option, bound, limit in zip(options, bounds, lowest, strict=True) if bound < limit]
