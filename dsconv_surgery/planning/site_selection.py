"""The layers that a plan may cut, and what a user must know of the rest of the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dsconv_surgery.network.discovery import ConvSite, Skip, Survey
from dsconv_surgery.planning.settings import PlanSettings
from dsconv_surgery.support.formatting import count_reasons
from dsconv_surgery.support.patterns import check_patterns, matches
from dsconv_surgery.support.user_warning import warn_user

SMALL_SHARE = 0.25  # of a network's cost: the first and the last layer stay dense without images if they cost no more
DENSE_END = "without images, the first convolution and the last layer stay dense (exclude=() cuts them)."  # the reason of a skip
NOTABLE_SHARE = 0.1  # of a network's cost outside of layers: a budget on layers is then announced


def _explain_no_site(survey: Survey) -> str:
    """The message for a network without a layer that can be cut: the skips by reason, or the likely cause."""
    if survey.layers:
        return f"no layer of the network can be cut. {count_reasons([layer.reason for layer in survey.layers if isinstance(layer, Skip)])}"
    likely = "It may be exported, quantised or scripted: pass the network from before that step."
    if survey.outside.macs:
        likely = (
            f"It computes {survey.outside.macs:,} MACs outside of layers: by functional calls, in layers kept in plain lists, or exported."
        )
    return f"no convolution or linear layer was found in the network. {likely} Only modules nn.Conv2d and nn.Linear can be cut."


def warn_of_cost_outside(survey: Survey, measures: Sequence[str]) -> None:
    """Warn if a budget cannot mean the whole network, because much of its cost is outside of layers."""
    shares = {
        "macs": survey.outside.macs / max(survey.outside.macs + survey.total.macs, 1),
        "params": survey.unregistered_params / max(survey.unregistered_params + survey.total.params, 1),
    }
    names = {"macs": "MACs", "params": "parameters"}
    for measure, share in shares.items():
        if measure in measures and share > NOTABLE_SHARE:
            warn_user(
                f"{100 * share:.0f} % of the network's {names[measure]} are outside of its layers (functional calls, attention, LSTMs, "
                "layers in plain lists). The budget counts the layers only; plan and report show the rest as 'outside layers'.",
            )


def select_sites(survey: Survey, settings: PlanSettings, calibrated: bool) -> tuple[list[ConvSite], list[Skip]]:
    """The sites that the patterns select, and a skip for every other layer."""
    all_names = {name for layer in survey.layers for name in _names_of(layer)}
    if not any(isinstance(layer, ConvSite) for layer in survey.layers):
        raise ValueError(_explain_no_site(survey))
    all_types = {kind for kinds in survey.types.values() for kind in kinds}
    for key in ("include", "exclude", "schemes", "multiple", "ranks"):
        patterns = getattr(settings, key) or ()
        if key in ("include", "exclude") or isinstance(patterns, Mapping):
            check_patterns(key, [pattern for pattern in patterns if pattern not in all_types], all_names)
    ends = () if calibrated or settings.exclude is not None else _dense_ends(survey, settings)
    sites: list[ConvSite] = []
    skips: list[Skip] = []
    for layer in survey.layers:
        if isinstance(layer, Skip):
            skips.append(layer)
            continue
        reason = _exclusion(layer, survey, settings)
        if settings.preset_option(_names_of(layer)):
            if reason:
                raise ValueError(f"ranks: {layer.name} has a rank there, but it is {reason} Remove one of the two.")
            sites.append(layer)
        elif reason:
            skips.append(Skip(layer.name, reason))
        elif not settings.schemes_for(_names_of(layer)):
            skips.append(Skip(layer.name, "kept dense by schemes= (None for a pattern that matches it)."))
        elif layer.name in ends:
            skips.append(Skip(layer.name, DENSE_END))
        else:
            sites.append(layer)
    _check_ranks_meet_sites(sites, skips, settings)
    return sites, skips


def _names_of(layer: ConvSite | Skip) -> tuple[str, ...]:
    return (layer.name, *layer.aliases) if isinstance(layer, ConvSite) else (layer.name,)


def _exclusion(layer: ConvSite, survey: Survey, settings: PlanSettings) -> str | None:
    """Why the patterns keep a layer dense, or None."""
    names, types = _names_of(layer), survey.types[layer.name]
    for pattern in settings.exclude or ():
        if matches(pattern, names) or pattern in types:
            return f"excluded by {pattern!r}."
    if not any(matches(pattern, names) or pattern in types for pattern in settings.include):
        return "not among the included layers."
    return None


def _check_ranks_meet_sites(sites: Sequence[ConvSite], skips: Sequence[Skip], settings: PlanSettings) -> None:
    """Raise ValueError for a pattern of `ranks` that matches only layers that cannot be cut."""
    for pattern in settings.ranks or ():
        if not any(matches(pattern, _names_of(site)) for site in sites):
            skip = next(skip for skip in skips if matches(pattern, (skip.name,)))
            raise ValueError(f"ranks: {pattern!r} matches no layer that can be cut. {skip.name}: {skip.reason}")


def _dense_ends(survey: Survey, settings: PlanSettings) -> tuple[str, ...]:
    """The layers that stay dense without images: the first convolution and the last layer, if the rest of the network can be cut."""
    names = {site.name: (site.name, *site.aliases) for site in survey.layers if isinstance(site, ConvSite)}
    inner = [name for name in names if name not in survey.ends]
    if not any(matches(pattern, names[name]) or pattern in survey.types[name] for name in inner for pattern in settings.include):
        return ()
    named = {name for name, aliases in names.items() if not set(aliases).isdisjoint(settings.include)}
    measures = [m for m in ("macs", "params") if m in settings.measures] or ["macs"]
    shares = {name: max(getattr(survey.costs[name], m) / max(getattr(survey.total, m), 1) for m in measures) for name in survey.ends}
    return tuple(name for name, share in shares.items() if share <= SMALL_SHARE and name not in named)
