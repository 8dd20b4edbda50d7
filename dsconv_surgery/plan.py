"""Decide: which layers to cut, with which scheme, at which rank - as plain data that can be read, edited and replayed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from dsconv_surgery import budget as rules
from dsconv_surgery import graph
from dsconv_surgery.budget import Budget, Table
from dsconv_surgery.geometry import ConvSpec, Cost, Rank, Size, chain_cost
from dsconv_surgery.graph import ConvSite, Skip, Survey
from dsconv_surgery.options import Workings, options_of
from dsconv_surgery.schemes import Factors, chain_of, check_rank, get_scheme, scheme_names
from dsconv_surgery.text import nearest, parse_json, text_table

FORMAT_VERSION = 1
Made = dict[str, Factors]  # layer -> factors found while deciding, so that cutting need not find them again


@dataclass(frozen=True)
class Cut:
    """One layer's replacement, with the geometry that it was decided for, so that a changed layer is noticed."""

    name: str
    scheme: str
    rank: Rank
    spec: ConvSpec
    sizes: tuple[Size, ...]
    error: float | None = None  # squared relative error of the weights; None: edited by hand, known once cut

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        check_rank(self.name, get_scheme(self.scheme), self.spec, self.rank)

    @property
    def chain(self) -> dict[str, ConvSpec]:
        return chain_of(get_scheme(self.scheme), self.spec, self.rank)

    @property
    def cost_before(self) -> Cost:
        return chain_cost({"dense": self.spec}, self.sizes)

    @property
    def cost_after(self) -> Cost:
        return chain_cost(self.chain, self.sizes)


@dataclass(frozen=True)
class Plan:
    """What is to be done to a network: cuts, layers left as they are with the reason, and how it was decided."""

    cuts: tuple[Cut, ...]
    skips: tuple[Skip, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    rule: str
    budget: Budget | None
    total: Cost  # of the dense network
    format_version: int = FORMAT_VERSION

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    @property
    def total_after(self) -> Cost:
        spent = self.total
        for cut in self.cuts:
            spent = spent - cut.cost_before + cut.cost_after
        return spent

    def replace(self, name: str, *, scheme: str | None = None, rank: Rank | None = None) -> Plan:
        """A plan in which one cut has another scheme, another rank or both.

        Raises:
            ValueError: no such cut, unknown scheme, or a rank that the scheme does not have there.

        Example:
            >>> plan.replace("layer1.0.conv1", scheme="depthwise", rank=2)
        """
        if name not in [cut.name for cut in self.cuts]:
            raise ValueError(f"{name}: no cut of this name.{nearest(name, [cut.name for cut in self.cuts])} {_why_left(self, name)}")
        cuts = tuple(
            replace(cut, scheme=scheme or cut.scheme, rank=cut.rank if rank is None else rank, error=None) if cut.name == name else cut
            for cut in self.cuts
        )
        return replace(self, cuts=cuts, rule=_edited(self.rule))

    def without(self, pattern: str) -> Plan:
        """A plan that leaves alone the layers whose name matches a shell-style pattern, such as "layer1.*".

        Raises:
            ValueError: no cut matches.
        """
        out = {cut.name for cut in self.cuts if fnmatchcase(cut.name, pattern)}
        if not out:
            raise ValueError(f"no cut matches {pattern!r}.{nearest(pattern, [cut.name for cut in self.cuts])}")
        skips = tuple(Skip(name, f"taken out by hand ({pattern!r}).") for name in sorted(out))
        return replace(self, cuts=tuple(c for c in self.cuts if c.name not in out), skips=self.skips + skips, rule=_edited(self.rule))

    def to_json(self) -> str:
        return _ADAPTER.dump_json(self, indent=1).decode() + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Read what `to_json` wrote; ValueError says what is wrong and where."""
        return parse_json(_ADAPTER, text, "plan")

    def __str__(self) -> str:
        rows = [
            (
                cut.name,
                str(cut.spec),
                cut.scheme,
                str(cut.rank),
                f"{cut.cost_before.params:,}",
                f"{cut.cost_after.params:,}",
                f"{cut.cost_before.macs:,}",
                f"{cut.cost_after.macs:,}",
                "-" if cut.error is None else f"{cut.error:.4f}",
            )
            for cut in self.cuts
        ]
        after = self.total_after
        rows.append(
            ("whole network", "", "", "", f"{self.total.params:,}", f"{after.params:,}", f"{self.total.macs:,}", f"{after.macs:,}", "")
        )
        columns = ("layer", "geometry", "scheme", "rank", "params", "-> params", "MACs", "-> MACs", "error")
        left = "".join(f"\nleft dense: {skip.name} - {skip.reason}" for skip in self.skips)
        return text_table(f"rule {self.rule}, {self.budget or 'no budget'}", columns, rows) + left


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
    progress: bool = False,
) -> Plan:
    """Choose for every layer whether to cut it, with which scheme and at which rank.

    `error = sum_oiyx (W - V)^2 / sum_oiyx W^2` for a kernel W and its replacement V. Nothing of the model changes.

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
        progress: show a bar over layers.

    Returns:
        A `Plan`, which `apply_plan` carries out.

    Raises:
        ValueError: settings that do not fit each other, a pattern that matches nothing, a budget out of reach (the smallest
            reachable one is named), weights that are not finite or not there.
        TypeError: the model is compiled, scripted or wrapped for data parallelism.

    Example:
        >>> plan = make_plan(model, torch.rand(1, 3, 224, 224), budget=Budget(params=0.4), schemes=["cp"], exclude="conv1")
        >>> print(plan)
    """
    settings = Settings(budget, schemes, rule, energy, rank, include, exclude)
    return decide(model, example_inputs, settings, progress)[0]


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


def decide(model: nn.Module, inputs: Sequence[Any], settings: Settings, progress: bool) -> tuple[Plan, Made]:
    """`make_plan`, with the factors that it came across for what it chose."""
    seen = graph.survey(model, *inputs)
    sites, skips = _select(seen, settings)
    measures = tuple(settings.budget.limits()) if settings.budget else ("macs",)
    tables: dict[str, Table] = {}
    workings: dict[str, Workings] = {}
    for site in sites:
        found = options_of(site, model.get_submodule(site.name), settings.names, measures)
        if isinstance(found, Skip):
            skips.append(found)
        else:
            tables[site.name], workings[site.name] = found
    with tqdm(total=len(tables), desc="factorise", unit="layer", disable=not progress) as bar:
        for working in workings.values():
            working.begun = bar.update  # rules measure what they need, layer by layer
        choice = _choose(tables, seen, settings)
    cuts: list[Cut] = []
    made: Made = {}
    by_name = {site.name: site for site in sites}
    for name, option in choice.items():
        if option is None:
            skips.append(Skip(name, f"left dense - the rule ({settings.rule_text}) found nothing better within its terms."))
            continue
        site = by_name[name]
        cuts.append(Cut(name, option.scheme, option.rank, site.spec, site.sizes, option.error))
        if (option.scheme, option.rank) in workings[name].made:
            made[name] = workings[name].made[option.scheme, option.rank]
    order = {layer.name: at for at, layer in enumerate(seen.layers)}
    skips.sort(key=lambda skip: order[skip.name])
    shapes = tuple(tuple(t.shape) for t in pytree.tree_leaves(tuple(inputs)) if isinstance(t, Tensor))
    return Plan(tuple(cuts), tuple(skips), shapes, settings.rule_text, settings.budget, seen.total), made


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


def _why_left(plan: Plan, name: str) -> str:
    return next((f"It was skipped: {skip.reason}" for skip in plan.skips if skip.name == name), "See plan.cuts.")


def _edited(rule: str) -> str:
    return rule if rule.endswith(", edited") else f"{rule}, edited"


_ADAPTER = TypeAdapter(Plan)
