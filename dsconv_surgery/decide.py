"""Decide: which layers to cut, with which scheme, at which rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from tqdm import tqdm

from dsconv_surgery import budget as rules
from dsconv_surgery import graph
from dsconv_surgery.budget import Budget, Table
from dsconv_surgery.geometry import Rank
from dsconv_surgery.graph import ConvSite, Skip, Survey
from dsconv_surgery.moments import Calibration, Images, input_shapes
from dsconv_surgery.options import Workings, options_of
from dsconv_surgery.plan import Cut, Plan
from dsconv_surgery.schemes import Factors, get_scheme, scheme_names
from dsconv_surgery.text import nearest
from dsconv_surgery.walk import layer_moments

Made = dict[str, Factors]  # layer -> factors found while deciding, so that cutting need not find them again


def make_plan(
    model: nn.Module,
    *example_inputs: Any,
    budget: Budget | None = None,
    schemes: Sequence[str] | str | None = None,
    rule: str | rules.Rule = "uniform",
    energy: float | None = None,
    rank: Rank | None = None,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    calibration: Calibration | Iterable[Any] | None = None,
    progress: bool = False,
) -> Plan:
    """Choose for every layer whether to cut it, with which scheme and at which rank.

    `error = sum_oiyx (W - V)^2 / sum_oiyx W^2` for a kernel W and its replacement V, or `E |(W - V) p|^2 / E |W p|^2` over patches p
    of the layer's input on calibration images. Nothing of the model changes.

    Args:
        model: any nn.Module.
        example_inputs: what `model(*example_inputs)` takes; MACs are counted for them, the whole batch.
        budget: fractions of the whole network's cost to keep, for `uniform` and callables; half the MACs if not given.
        schemes: names to choose among; None for all.
        rule: "uniform" (the same cost fraction for every layer, least error within it), "energy" (for each layer the cheapest
            option that keeps `energy` of its weights' squared norm), "fixed" (`rank` everywhere), or a callable
            `(tables, allowed) -> choice` on option tables, see `dsconv_surgery.budget`.
        energy: in (0, 1), for rule "energy".
        rank: for rule "fixed".
        include, exclude: shell-style patterns of layer names.
        calibration: batches of unlabelled images, or a `Calibration`: options are judged by the outputs that they give on them.
        progress: show a bar over layers.

    Returns:
        A `Plan`, which `apply_plan` carries out.

    Raises:
        ValueError: settings that do not fit each other, a pattern that matches nothing, a budget out of reach (the smallest
            reachable one is named), weights that are not finite or not there, calibration images that do not fit or are none.
        TypeError: the model is compiled, scripted or wrapped for data parallelism.

    Example:
        >>> plan = make_plan(model, torch.rand(1, 3, 224, 224), budget=Budget(params=0.4), schemes=["cp"], exclude="conv1")
        >>> print(plan)
    """
    settings = Settings(budget, schemes, rule, energy, rank, include, exclude)
    images = None if calibration is None else Images(calibration, input_shapes(example_inputs))
    return decide(model, example_inputs, settings, progress, images)[0]


class Settings:
    """`make_plan`'s keywords, checked and brought into one form."""

    def __init__(
        self,
        budget: Budget | None = None,
        schemes: Sequence[str] | str | None = None,
        rule: str | rules.Rule = "uniform",
        energy: float | None = None,
        rank: Rank | None = None,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
    ) -> None:
        self.names = scheme_names() if schemes is None else _as_tuple(schemes)
        if not self.names:
            raise ValueError("schemes: none given. Pass None for all, or names.")
        for name in self.names:
            get_scheme(name)
        rules.check_settings(rule, budget, energy, rank)
        self.rule, self.energy, self.rank = rule, energy, tuple(rank) if isinstance(rank, list) else rank
        self.budget = None if rule in ("energy", "fixed") else budget or Budget(macs=0.5)
        self.include, self.exclude = _as_tuple(include), _as_tuple(exclude)

    @property
    def rule_text(self) -> str:
        if callable(self.rule):
            return f"callable {getattr(self.rule, '__name__', type(self.rule).__name__)}"
        return {"energy": f"energy={self.energy}", "fixed": f"fixed rank={self.rank}"}.get(self.rule, self.rule)


def decide(
    model: nn.Module, inputs: Sequence[Any], settings: Settings, progress: bool, images: Images | None = None, later: bool = False
) -> tuple[Plan, Made]:
    """`make_plan`, with the factors that it came across for what it chose; `later`: leave errors open that no choice depended on."""
    seen = graph.survey(model, *inputs)
    sites, skips = _select(seen, settings)
    measures = tuple(settings.budget.limits()) if settings.budget else ("macs",)
    tables: dict[str, Table] = {}
    workings: dict[str, Workings] = {}
    calibrated = None if images is None else layer_moments(model, images, sites)
    for site in sites:
        found = options_of(site, model.get_submodule(site.name), settings.names, measures, calibrated)
        if isinstance(found, Skip):
            skips.append(found)
        else:
            tables[site.name], workings[site.name] = found
    cuts: list[Cut] = []
    made: Made = {}
    by_name = {site.name: site for site in sites}
    with tqdm(total=len(tables), desc="factorise", unit="layer", disable=not progress) as bar:
        for working in workings.values():
            working.begun = bar.update  # rules measure what they need, layer by layer
        for name, option in _choose(tables, seen, settings).items():
            if option is None:
                skips.append(Skip(name, f"left dense - the rule ({settings.rule_text}) found nothing better within its terms."))
                continue
            site = by_name[name]
            if option.error is None and not later:
                option = replace(option, error=workings[name].measure(option.scheme, option.rank))
            cuts.append(Cut(name, option.scheme, option.rank, site.spec, site.sizes, option.error))
            if (option.scheme, option.rank) in workings[name].made:
                made[name] = workings[name].made[option.scheme, option.rank]
    order = {layer.name: at for at, layer in enumerate(seen.layers)}
    skips.sort(key=lambda skip: order[skip.name])
    shapes = input_shapes(inputs)
    plan = Plan(tuple(cuts), tuple(skips), shapes, settings.rule_text, settings.budget, seen.total, images is not None)
    return plan, made


def _select(seen: Survey, settings: Settings) -> tuple[list[ConvSite], list[Skip]]:
    """Sites that the patterns ask for; skips for the rest."""
    names = {name for layer in seen.layers for name in (layer.name, *(layer.aliases if isinstance(layer, ConvSite) else ()))}
    for key in ("include", "exclude"):
        for pattern in getattr(settings, key):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"{key}: no layer matches {pattern!r}.{nearest(pattern, sorted(names))}")
    sites: list[ConvSite] = []
    skips: list[Skip] = []
    for layer in seen.layers:
        if isinstance(layer, Skip):
            skips.append(layer)
            continue
        its_names = (layer.name, *layer.aliases)
        out = next((p for p in settings.exclude if any(fnmatchcase(name, p) for name in its_names)), None)
        if out is not None:
            skips.append(Skip(layer.name, f"excluded by {out!r}."))
        elif not any(fnmatchcase(name, p) for p in settings.include for name in its_names):
            skips.append(Skip(layer.name, "not among the included layers."))
        else:
            sites.append(layer)
    return sites, skips


def _choose(tables: dict[str, Table], seen: Survey, settings: Settings) -> rules.Choice:
    if settings.rule == "energy":
        return rules.energy(tables, settings.energy or 0.0)
    if settings.rule == "fixed":
        return rules.fixed(tables, settings.rank or 0)
    allowed = rules.allowance(tables, seen.total, settings.budget or Budget(macs=0.5))
    chosen = (settings.rule if callable(settings.rule) else rules.uniform)(tables, allowed)
    for name in chosen:
        if name not in tables:
            raise ValueError(f"{settings.rule_text} chose for {name!r}, which has no option table.{nearest(name, list(tables))}")
    return {name: chosen.get(name) for name in tables}


def _as_tuple(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
