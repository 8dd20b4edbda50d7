"""What to do to a network, as plain data: print it, edit it, commit it, replay it."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from dsconv_surgery.budget import Budget
from dsconv_surgery.network.discovery import Skip
from dsconv_surgery.network.geometry import ConvSpec, Cost, Rank, Size, chain_cost
from dsconv_surgery.schemes import chain_of, check_rank, get_scheme
from dsconv_surgery.support.formatting import did_you_mean, text_table
from dsconv_surgery.support.input_description import InputDescription
from dsconv_surgery.support.latency import Latency
from dsconv_surgery.support.records import JsonRecord, quoted, record, shortened

FORMAT_VERSION = 1
COST_COLUMNS = ("params", "-> params", "MACs", "-> MACs")
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
class Plan(JsonRecord):
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
        cuts[index] = replace(cut, scheme=scheme or cut.scheme, rank=cut.rank if rank is None else rank, error=None, damage=None)
        return self._edited(cuts=tuple(cuts))

    def without(self, *patterns: str) -> Plan:
        """Return a plan without the cuts whose name matches one of some shell-style patterns, such as "layer1.*".

        Raises:
            ValueError: no cut matches one of the patterns.
            TypeError: a pattern is not a string.
        """
        names = [cut.name for cut in self.cuts]
        reasons: dict[str, str] = {}
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(f'without: found {type(pattern).__name__}, expected names, as in plan.without("layer1.*", "fc").')
            removed = [name for name in names if fnmatchcase(name, pattern)]
            if not removed:
                raise ValueError(f"no cut matches the pattern {pattern!r}.{did_you_mean(pattern, names)} See plan.cuts.")
            reasons |= dict.fromkeys(removed, f"removed from the plan by without({pattern!r}).")
        skips = tuple(Skip(name, reason) for name, reason in sorted(reasons.items()))
        return self._edited(cuts=tuple(cut for cut in self.cuts if cut.name not in reasons), skips=self.skips + skips)

    def _edited(self, **changes: Any) -> Plan:
        return replace(self, rule=f"{self.rule.removesuffix(', edited')}, edited", timing=None, **changes)

    def __str__(self) -> str:
        rows = []
        for cut in self.cuts:
            error = "-" if cut.error is None else f"{cut.error:.4f}"
            rows.append((cut.name, str(cut.spec), cut.scheme, str(cut.rank), *cost_cells(cut.cost_before, cut.cost_after), error))
        if self.outside.params or self.outside.macs:
            rows.append(("outside layers", "", "", "", *cost_cells(self.outside, self.outside), ""))
        rows.append(("whole network", "", "", "", *cost_cells(self.total, self.total_after), ""))
        calibrated = {False: "", True: ", calibrated", "synthetic": ", calibrated on synthetic images"}[self.calibrated]
        title = f"rule {self.rule}, {self.budget or 'no budget'}{calibrated}"
        lines = [text_table(title, (*COLUMNS, "output error" if self.calibrated else "weight error"), rows)]
        if t := self.timing:
            lines.append(f"latency {t.before:.2f} -> {t.after:.2f} ms with random weights ({t.conditions})")
        return "\n".join([*lines, *(f"not cut: {skip.name} - {skip.reason}" for skip in self.skips)])


def cost_cells(before: Cost, after: Cost) -> tuple[str, ...]:
    """The texts below `COST_COLUMNS`."""
    return (f"{before.params:,}", f"{after.params:,}", f"{before.macs:,}", f"{after.macs:,}")
