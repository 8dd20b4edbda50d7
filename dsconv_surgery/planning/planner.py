"""Decide: which layers to cut, with which scheme, at which rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from dsconv_surgery.budget import Budget, BudgetError
from dsconv_surgery.calibration.images import Calibration, Images, input_shapes
from dsconv_surgery.network.discovery import ConvSite, Skip, Survey, survey_model
from dsconv_surgery.network.geometry import Rank
from dsconv_surgery.plan import Cut, Plan
from dsconv_surgery.planning.damage import DamageEstimator
from dsconv_surgery.planning.layer_latency import LayerTimer
from dsconv_surgery.planning.option_errors import OptionErrors
from dsconv_surgery.planning.options import layer_options
from dsconv_surgery.planning.rules import RULES
from dsconv_surgery.planning.settings import PlanSettings
from dsconv_surgery.planning.tables import Choice, Rule, Table, allowed_costs, smallest_total
from dsconv_surgery.schemes import Factors
from dsconv_surgery.support import distributed
from dsconv_surgery.support.cache import Cache
from dsconv_surgery.support.formatting import did_you_mean
from dsconv_surgery.support.latency import Latency, measure_latency, timing_conditions
from dsconv_surgery.support.random_state import preserve_random_state
from dsconv_surgery.surgery import build_cut_model

LOOKS = 1  # at what was chosen, before the last choice
SETTLING, SLACK = 4, 1.02  # tries to meet a limit of time, and by how much it may be missed
ROUNDS = 31  # forward passes to time a whole network
Made = dict[str, Factors]  # layer -> factors found while deciding, so that cutting need not find them again


def make_plan(
    model: nn.Module,
    *example_inputs: Any,
    budget: Budget | None = None,
    schemes: Sequence[str] | str | None = None,
    rule: str | Rule = "budget",
    energy: float | None = None,
    rank: Rank | None = None,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    calibration: Calibration | Iterable[Any] | None = None,
    multiple: int | None = None,
    cache: bool | str | Path = True,
    progress: bool = False,
) -> Plan:
    """Choose for every layer whether to cut it, with which scheme and at which rank.

    `error = sum_oiyx (W - V)^2 / sum_oiyx W^2` for a kernel W and its replacement V, or `E |(W - V) p|^2 / E |W p|^2` over patches p
    of the layer's input on calibration images. Nothing of the model changes.

    Args:
        model: any nn.Module.
        example_inputs: what `model(*example_inputs)` takes; MACs are counted for them, the whole batch.
        budget: fractions of the whole network's MACs, parameters or measured latency to keep, several at once if you like; half
            the MACs if not given. Latency is measured on the inputs' device with torch's current thread count.
        schemes: names to choose among; None for all.
        rule: "budget" (least damage to the network's outputs within the budget), "uniform" (the same cost fraction for every
            layer, least error within it), "equal_error" (the same error for every layer), "energy" (for each layer the cheapest
            option that keeps `energy` of its weights' squared norm), "fixed" (`rank` everywhere), "evbmf" (Tucker at the ranks
            that variational Bayes finds), or a callable `(tables, allowed) -> choice` on option tables, see
            `dsconv_surgery.budget`.
        energy: in (0, 1), for rule "energy".
        rank: for rule "fixed".
        include, exclude: shell-style patterns of layer names.
        calibration: batches of unlabelled images, or a `Calibration`: options are judged by the outputs that they give on them,
            and layers by how far their errors move the network's outputs.
        multiple: offer only ranks that give links a multiple of so many channels; 8 where latency is limited, else 1.
        cache: keep what is found out about options for the next plan: True for the user's cache folder (or the one in the
            environment variable DSCONV_SURGERY_CACHE), a folder, or False.
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
    settings = PlanSettings(budget, schemes, rule, energy, rank, include, exclude, multiple, cache)
    images = None if calibration is None else Images(calibration, input_shapes(example_inputs))
    return Planner(model, example_inputs, settings, images, progress).plan(settings.budget)[0]


class Planner:
    """A network's option tables, from which plans for one budget after the other are made."""

    def __init__(self, model: nn.Module, inputs: Sequence[Any], settings: PlanSettings, images: Images | None, progress: bool) -> None:
        self.model, self.inputs, self.settings, self.images, self.progress = model, inputs, settings, images, progress
        self._seen = survey_model(model, *inputs)
        self._sites, self._skips = _select(self._seen, settings)
        self.total = self._seen.total
        # Processes that share the images have to find out the same at the same time, whatever each has in its cache.
        cache, clock = Cache(settings.cache if distributed.process_and_world_size()[1] == 1 else False), None
        if "latency" in settings.measures:
            clock = LayerTimer(model, inputs, cache)
            self.total = replace(self.total, latency=distributed.all_reduce_mean(measure_latency([model], inputs)[0]))
        study = DamageEstimator(model, self._sites, images, cache)
        self._tables: dict[str, Table] = {}
        self._workings: dict[str, OptionErrors] = {}
        for site in tqdm(self._sites, desc="time", unit="layer", disable=not progress or clock is None):
            found = layer_options(site, model.get_submodule(site.name), settings.names, settings.measures, study, clock, settings.multiple)
            if isinstance(found, Skip):
                self._skips.append(found)
            else:
                self._tables[site.name], self._workings[site.name] = found

    def check(self, budget: Budget) -> None:
        """Raise ValueError if not even the cheapest options come down to a budget."""
        allowed_costs(self._tables, self.total, budget)

    def smallest(self, measure: str) -> float:
        """The fraction of the whole network's cost that the cheapest options leave."""
        if not self._tables:
            return 1.0
        saved = sum(getattr(t.dense, measure) for t in self._tables.values()) - smallest_total(self._tables, (measure,))[measure]
        return float(1 - saved / getattr(self.total, measure))

    def plan(self, budget: Budget | None, later: bool = False) -> tuple[Plan, Made]:
        """A plan for a budget, with the factors that came across for what it chose; `later`: leave errors open that nothing depended on."""
        with tqdm(total=len(self._tables), desc="judge options", unit="layer", disable=not self.progress) as bar:
            for working in self._workings.values():
                working.on_start = bar.update  # rules measure what they need, layer by layer
            if budget is None:
                return self._written(budget, self._chosen({}), later)
            allowed = allowed_costs(self._tables, self.total, budget)
            if budget.latency is None:
                return self._written(budget, self._chosen(allowed), later)
            return self._settled(budget, allowed, later)

    def _chosen(self, allowed: Mapping[str, float]) -> Choice:
        rule, tables = self.settings.rule, self._tables
        if rule == "budget":  # measure the damage of the chosen options, then choose again
            for _ in range(LOOKS):
                chosen = RULES[rule].choose(tables, allowed)
                looks = [self._workings[name].refine_damage(o.scheme, o.rank) for name, o in chosen.items() if o]
                if not any(looks):
                    break
        chosen = rule(tables, allowed) if callable(rule) else RULES[rule](tables, allowed, vars(self.settings))
        for name in chosen:
            if name not in tables:
                raise ValueError(
                    f"{self.settings.rule_text} chose for {name!r}, which has no option table.{did_you_mean(name, list(tables))}"
                )
        spent = {m: sum(getattr(o.cost if (o := chosen.get(name)) else t.dense, m) for name, t in tables.items()) for m in allowed}
        if not callable(rule) and any(spent[m] > allowed[m] * (1 + 1e-9) for m in allowed):
            raise BudgetError(
                f"rule {rule!r} finds nothing within {' and '.join(allowed)} at once. Raise one of them, or use rule='budget'."
            )
        return {name: chosen.get(name) for name in tables}

    def _settled(self, budget: Budget, allowed: dict[str, float], later: bool) -> tuple[Plan, Made]:
        """A plan whose stand-in - the cut network with any weights - keeps the time: layers timed alone do not sum up to a network's."""
        target = (budget.latency or 1.0) * self.total.latency
        least = smallest_total(self._tables, tuple(allowed))["latency"]
        tried: list[tuple[float, tuple[Plan, Made]]] = []
        for _ in range(SETTLING):
            try:
                choice = self._chosen(allowed)
            except BudgetError:  # of a tighter limit: the best plan so far
                if not tried:
                    raise
                break
            plan, made = self._written(budget, choice, later)
            tables_say = self.total.latency + sum(
                option.cost.latency - self._tables[name].dense.latency for name, option in choice.items() if option
            )
            with preserve_random_state():
                stand_in = _stand_in(self.model, plan)
            dense, after = map(distributed.all_reduce_mean, measure_latency([self.model, stand_in], self.inputs, rounds=ROUNDS))
            after *= self.total.latency / dense  # the machine may be busier than when the budget was set
            timing = Latency(self.total.latency, after, timing_conditions(self.inputs), ROUNDS, tables_say)
            off = abs(after - target) + (target if after > SLACK * target else 0.0)
            tried.append((off, (replace(plan, timing=timing), made)))
            if target * (2 - SLACK) <= after <= SLACK * target or not plan.cuts:
                break
            allowed = {**allowed, "latency": max(allowed["latency"] + target - after, least)}
        return min(tried, key=lambda one: one[0])[1]

    def _written(self, budget: Budget | None, choice: Choice, later: bool) -> tuple[Plan, Made]:
        cuts: list[Cut] = []
        skips = list(self._skips)
        made: Made = {}
        by_name = {site.name: site for site in self._sites}
        for name, option in choice.items():
            if option is None:
                skips.append(Skip(name, f"left dense - the rule ({self.settings.rule_text}) found nothing better within its terms."))
                continue
            site, working = by_name[name], self._workings[name]
            if option.error is None and not later:
                option = replace(option, error=working.measure(option.scheme, option.rank))
            cuts.append(Cut(name, option.scheme, option.rank, site.spec, site.sizes, option.error, option.damage))
            if (option.scheme, option.rank) in working.factors:
                made[name] = working.factors[option.scheme, option.rank]
        order = {layer.name: at for at, layer in enumerate(self._seen.layers)}
        skips.sort(key=lambda skip: order[skip.name])
        shapes, rule = input_shapes(self.inputs), self.settings.rule_text
        return Plan(tuple(cuts), tuple(skips), shapes, rule, budget, self.total, self.images is not None), made


def _stand_in(model: nn.Module, plan: Plan) -> nn.Module:
    """A network cut as planned whose new links have random weights."""
    cut = build_cut_model(model, plan, "empty", {}, progress=False)
    for name in (c.name for c in plan.cuts):
        for link in cut.get_submodule(name).children():
            weight = link.get_parameter("weight")
            with torch.no_grad():
                weight.normal_(std=weight[0].numel() ** -0.5)
    return cut


def _select(seen: Survey, settings: PlanSettings) -> tuple[list[ConvSite], list[Skip]]:
    """Sites that the patterns ask for; skips for the rest."""
    names = {name for layer in seen.layers for name in (layer.name, *(layer.aliases if isinstance(layer, ConvSite) else ()))}
    for key in ("include", "exclude"):
        for pattern in getattr(settings, key):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"{key}: no layer matches {pattern!r}.{did_you_mean(pattern, sorted(names))}")
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
