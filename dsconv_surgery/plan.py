"""What to do to a network, as plain data: print it, edit it, commit it, replay it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from dsconv_surgery.budget import Budget
from dsconv_surgery.network.discovery import Skip
from dsconv_surgery.network.geometry import ConvSpec, Cost, Rank, Size, chain_cost
from dsconv_surgery.schemes import chain_of, check_rank, get_scheme
from dsconv_surgery.support.formatting import TOTAL, Displayed, TableContent, counted, did_you_mean
from dsconv_surgery.support.input_description import InputDescription
from dsconv_surgery.support.latency import Latency
from dsconv_surgery.support.patterns import PATTERNS, matches
from dsconv_surgery.support.records import JsonRecord, quoted, record, shortened

FORMAT_VERSION = 1
COST_COLUMNS = ("params", "-> params", "MACs", "-> MACs")
MEASURES = {"params": "parameters", "macs": "MACs"}
UNTIMED = "time was not measured, and fewer MACs do not always take less: see Budget(latency=...) and compare(latency=True)"
COLUMNS = ("layer", "geometry", "scheme", "rank", *COST_COLUMNS)  # then "weight error" or, with calibration images, "output error"


def _check_version(version: object) -> object:
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(f"found version {quoted(version)}, expected {FORMAT_VERSION}. Make the plan again with make_plan.")
    return version


@record
class Cut:
    """The replacement of one layer, and the geometry that it was chosen for, to notice a changed layer."""

    name: str
    scheme: str
    rank: Rank
    spec: ConvSpec
    sizes: tuple[Size, ...]
    # Squared relative error of the weights, or of outputs on calibration images (estimated, until a cut measures it). None: unknown.
    error: float | None = None
    # Predicted damage to the network's outputs, for classifiers in nats.
    damage: float | None = None

    def __post_init__(self) -> None:
        name = shortened(self.name)
        if problem := self.spec.problem():
            raise ValueError(f"{name}: {problem}")
        check_rank(name, get_scheme(self.scheme), self.spec, self.rank)

    @property
    def chain(self) -> dict[str, ConvSpec]:
        return chain_of(get_scheme(self.scheme), self.spec, self.rank)

    @property
    def cost_before(self) -> Cost:
        return chain_cost({"dense": self.spec}, self.sizes)

    @property
    def cost_after(self) -> Cost:
        return chain_cost(self.chain, self.sizes)


@record
class PlanDifference(Displayed):
    """The layers that two plans of one network treat differently."""

    before: Plan
    after: Plan

    @property
    def names(self) -> tuple[str, ...]:
        """The layers that differ in scheme or rank, by their order in the plans."""
        before, after = self._cuts()
        return tuple(name for name in {**before, **after} if _chain_text(before.get(name)) != _chain_text(after.get(name)))

    def _cuts(self) -> tuple[dict[str, Cut], dict[str, Cut]]:
        return {cut.name: cut for cut in self.before.cuts}, {cut.name: cut for cut in self.after.cuts}

    def __repr__(self) -> str:
        return f"<PlanDifference in {counted(len(self.names), 'layer')}>"

    def table(self) -> TableContent:
        before, after = self._cuts()
        rows = []
        for name in self.names:
            pair = before.get(name), after.get(name)
            dense = next(cut.cost_before for cut in pair if cut)
            costs = [cut.cost_after if cut else dense for cut in pair]
            rows.append((name, *map(_chain_text, pair), *cost_cells(costs[0], costs[1])))
        rows.append((TOTAL, "", "", *cost_cells(self.before.total_after, self.after.total_after)))
        title = f"{len(self.names)} of {len({**before, **after})} layers with a cut differ"
        return TableContent(title, ("layer", "before", "after", *COST_COLUMNS), tuple(rows))


def _chain_text(cut: Cut | None) -> str:
    return "dense" if cut is None else f"{cut.scheme} {cut.rank}"


@record
class Plan(JsonRecord, Displayed):
    """What to do to a network: its cuts, the layers that stay and why, and how this was decided."""

    cuts: tuple[Cut, ...]
    skips: tuple[Skip, ...]
    inputs: InputDescription
    rule: str
    budget: Budget | None
    total: Cost  # of the dense network
    outside: Cost  # parameters and MACs outside of layers; the MACs are not part of `total`
    # Whether errors are of outputs and apply_plan needs calibration images; "synthetic" if those were synthetic.
    calibrated: bool | Literal["synthetic"] = False
    timing: Latency | None = None  # if the budget limits latency
    format_version: Annotated[int, BeforeValidator(_check_version)] = FORMAT_VERSION  # checked on reading

    def __post_init__(self) -> None:
        names = sorted((cut.name for cut in self.cuts), key=lambda name: name.split("."))  # a layer stands before those inside it
        for first, second in pairwise(names):
            if first == second:
                raise ValueError(f"{shortened(first)}: cut twice. Remove one of the cuts.")
            if second.startswith(f"{first}."):
                raise ValueError(f"{shortened(second)}: inside {shortened(first)}, which is cut, too. Remove one of the cuts.")

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of all tensors in the example inputs."""
        return self.inputs.shapes

    @property
    def total_after(self) -> Cost:
        total = self.total
        for cut in self.cuts:
            total = total - cut.cost_before + cut.cost_after
        return total

    def replace(self, name: str, *, scheme: str | None = None, rank: Rank | None = None) -> Plan:
        """Return a plan in which one cut has another scheme, another rank or both.

        Args:
            name: the full name of a layer that the plan cuts.
            scheme: the new scheme. Without `rank`, the number of the old rank is kept, whatever it means for the new scheme.
            rank: the new rank; a pair for tucker.

        Raises:
            ValueError: there is no such cut or scheme, or the scheme does not have this rank for the layer.

        Example:
            >>> plan.replace("layer1.0.conv1", scheme="depthwise", rank=2)
        """
        names = [cut.name for cut in self.cuts]
        if name not in names:
            reason = next((f" It was skipped: {skip.reason}" for skip in self.skips if skip.name == name), "")
            raise ValueError(f"{name}: the plan has no such cut.{reason or did_you_mean(name, names)} See plan.cuts.")
        cuts = list(self.cuts)
        cut = cuts[index := names.index(name)]
        try:
            cuts[index] = replace(cut, scheme=scheme or cut.scheme, rank=cut.rank if rank is None else rank, error=None, damage=None)
        except ValueError as error:
            if rank is not None or scheme in (None, cut.scheme):
                raise
            raise ValueError(f"{error} rank= was not given, so the rank {cut.rank} of {cut.scheme} was kept. Pass rank=, too.") from None
        return self._edited(cuts=tuple(cuts))

    def without(self, *patterns: str) -> Plan:
        """Return a plan without the cuts that match one of some patterns.

        Args:
            patterns: a layer's name, which also means everything below it ("layer1"), or a name with a shell's wildcards ("*.conv2").

        Raises:
            ValueError: no cut matches one of the patterns.
            TypeError: a pattern is not a string.
        """
        names = [cut.name for cut in self.cuts]
        reasons: dict[str, str] = {}
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(f'without: found {type(pattern).__name__}, expected names, as in plan.without("layer1.*", "fc").')
            removed = [name for name in names if matches(pattern, (name,))]
            if not removed:
                raise ValueError(f"no cut matches the pattern {pattern!r}.{did_you_mean(pattern, names)} {PATTERNS}. See plan.cuts.")
            reasons |= dict.fromkeys(removed, f"removed from the plan by without({pattern!r}).")
        skips = tuple(Skip(name, reason) for name, reason in sorted(reasons.items()))
        return self._edited(cuts=tuple(cut for cut in self.cuts if cut.name not in reasons), skips=self.skips + skips)

    def diff(self, other: Plan) -> PlanDifference:
        """The layers that `other` treats differently: print the result, or use `names` or `to_markdown()`.

        Args:
            other: a plan of the same network.

        Raises:
            TypeError: `other` is not a plan.
            ValueError: the plans are of different networks or inputs.

        Example:
            >>> print(plan.diff(plan.replace("layer1.0.conv1", scheme="depthwise", rank=2)))
        """
        if not isinstance(other, Plan):
            raise TypeError(f"diff: found {type(other).__name__}, expected another Plan, as in plan.diff(other).")
        layers = [{cut.name for cut in plan.cuts} | {skip.name for skip in plan.skips} for plan in (self, other)]
        totals = [(plan.total.params, plan.total.macs) for plan in (self, other)]
        if layers[0] != layers[1] or totals[0] != totals[1]:
            only = ", ".join(sorted(layers[0] ^ layers[1])[:3])
            problem = f"only one of them has {only}" if only else f"parameters and MACs are {totals[0]} and {totals[1]}"
            raise ValueError(f"diff: the plans are of different networks or inputs: {problem}. Compare plans of one network.")
        return PlanDifference(self, other)

    def _edited(self, **changes: Any) -> Plan:
        return replace(self, rule=f"{self.rule.removesuffix(', edited')}, edited", timing=None, **changes)

    def __repr__(self) -> str:
        saved = ", ".join(f"{name} {percent(getattr(self.total, m), getattr(self.total_after, m))}" for m, name in MEASURES.items())
        decided = self.budget or f"rule {self.rule}"
        return f"<Plan: {counted(len(self.cuts), 'cut')}, {counted(len(self.skips), 'skip')}, {saved}, {decided}>"

    def table(self) -> TableContent:
        rows = []
        for cut in self.cuts:
            error = "-" if cut.error is None else f"{cut.error:.4f}"
            rows.append((cut.name, str(cut.spec), cut.scheme, str(cut.rank), *cost_cells(cut.cost_before, cut.cost_after), error))
        if self.outside.params or self.outside.macs:
            rows.append(("outside layers", "", "", "", *cost_cells(self.outside, self.outside), ""))
        rows.append((TOTAL, "", "", "", *cost_cells(self.total, self.total_after), ""))
        calibrated = {False: "", True: ", calibrated", "synthetic": ", calibrated on synthetic images"}[self.calibrated]
        title = f"rule {self.rule}, {self.budget or 'no budget'}{calibrated}"
        lines = [UNTIMED]
        if t := self.timing:
            lines = [f"latency {t} with random weights ({t.conditions})"]
        lines += [f"not cut: {skip.name} - {skip.reason}" for skip in self.skips]
        columns = (*COLUMNS, "output error" if self.calibrated else "weight error")
        return TableContent(title, columns, tuple(rows), tuple(lines))


def percent(before: float, after: float) -> str:
    """By how much a cost changed, as in "-52.3 %"."""
    return f"{100 * (after / before - 1) if before else 0.0:+.1f} %"


def cost_cells(before: Cost, after: Cost) -> tuple[str, ...]:
    """The texts below `COST_COLUMNS`."""
    return (f"{before.params:,}", f"{after.params:,}", f"{before.macs:,}", f"{after.macs:,}")
