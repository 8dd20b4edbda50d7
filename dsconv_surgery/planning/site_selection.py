"""The layers that a plan may cut, and what a user must know of the rest of the network."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase

from dsconv_surgery.network.discovery import ConvSite, Skip, Survey
from dsconv_surgery.planning.settings import PlanSettings
from dsconv_surgery.support.formatting import count_reasons, did_you_mean

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
            warnings.warn(
                f"{100 * share:.0f} % of the network's {names[measure]} are outside of its layers (functional calls, attention, LSTMs, "
                "layers in plain lists). The budget counts the layers only; plan and report show the rest as 'outside layers'.",
                stacklevel=2,
            )


def select_sites(survey: Survey, settings: PlanSettings, calibrated: bool) -> tuple[list[ConvSite], list[Skip]]:
    """The sites that the patterns select, and a skip for every other layer."""
    all_names = {name for layer in survey.layers for name in (layer.name, *(layer.aliases if isinstance(layer, ConvSite) else ()))}
    if not any(isinstance(layer, ConvSite) for layer in survey.layers):
        raise ValueError(_explain_no_site(survey))
    for key in ("include", "exclude"):
        for pattern in getattr(settings, key) or ():
            if not any(fnmatchcase(name, pattern) for name in all_names):
                raise ValueError(f"{key}: no layer matches {pattern!r}.{did_you_mean(pattern, sorted(all_names))}")
    ends = () if calibrated or settings.exclude is not None else _dense_ends(survey, settings)
    sites: list[ConvSite] = []
    skips: list[Skip] = []
    for layer in survey.layers:
        if isinstance(layer, Skip):
            skips.append(layer)
            continue
        names = (layer.name, *layer.aliases)
        excluding = next((pattern for pattern in settings.exclude or () if any(fnmatchcase(name, pattern) for name in names)), None)
        if excluding is not None:
            skips.append(Skip(layer.name, f"excluded by {excluding!r}."))
        elif not any(fnmatchcase(name, pattern) for pattern in settings.include for name in names):
            skips.append(Skip(layer.name, "not among the included layers."))
        elif layer.name in ends:
            skips.append(Skip(layer.name, DENSE_END))
        else:
            sites.append(layer)
    return sites, skips


def _dense_ends(survey: Survey, settings: PlanSettings) -> tuple[str, ...]:
    """The layers that stay dense without images: the first convolution and the last layer, if the rest of the network can be cut."""
    names = {site.name: (site.name, *site.aliases) for site in survey.layers if isinstance(site, ConvSite)}
    inner = [alias for name, aliases in names.items() if name not in survey.ends for alias in aliases]
    if not any(fnmatchcase(name, pattern) for name in inner for pattern in settings.include):
        return ()
    named = {name for name, aliases in names.items() if not set(aliases).isdisjoint(settings.include)}
    measures = [m for m in ("macs", "params") if m in settings.measures] or ["macs"]
    shares = {name: max(getattr(survey.costs[name], m) / max(getattr(survey.total, m), 1) for m in measures) for name in survey.ends}
    return tuple(name for name, share in shares.items() if share <= SMALL_SHARE and name not in named)
