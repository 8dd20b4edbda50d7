"""Before and after, as numbers; text is a function of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from dsconv_surgery import schemes
from dsconv_surgery.budget import Budget
from dsconv_surgery.calibration.images import Calibration, Images, check_model_runs, input_shapes
from dsconv_surgery.network.discovery import Skip, survey_model
from dsconv_surgery.network.geometry import Cost, Rank
from dsconv_surgery.plan import Plan
from dsconv_surgery.support.copies import evaluation_copy
from dsconv_surgery.support.fidelity import Fidelity, measure_fidelity
from dsconv_surgery.support.formatting import text_table
from dsconv_surgery.support.latency import Latency, measure_latency, timing_conditions
from dsconv_surgery.support.records import JsonRecord
from dsconv_surgery.surgery import chain_kernel, check_cut, degeneracy

COLUMNS = ("layer", "scheme", "rank", "params", "-> params", "MACs", "-> MACs", "error", "output error", "left dense because")


@dataclass(frozen=True)
class Row:
    """One layer: `error` is the squared relative error of its weights, None where no plan says how it was cut.

    `output_error` is that of its outputs in the running networks, each channel about its mean, on the images given. `degeneracy`
    is, for the CP schemes, `sum_r |term_r|^2 / |V|^2`: around one, or below, where terms do not cancel each other.
    """

    name: str
    before: Cost
    after: Cost
    scheme: str | None = None
    rank: Rank | None = None
    error: float | None = None
    skipped: str | None = None
    output_error: float | None = None
    degeneracy: float | None = None

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}


@dataclass(frozen=True)
class Try:
    """A budget on the way to the smallest network within a drop, what that network cost, and its score."""

    budget: Budget
    cost: Cost
    score: float
    within: bool

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}


@dataclass(frozen=True)
class Report(JsonRecord):
    """Two networks compared: parameters (all), MACs (convolutions and linear layers as called, for the whole example batch)."""

    rows: tuple[Row, ...]
    before: Cost
    after: Cost
    remainder_macs_before: int  # functional matrix products, as in attention: not part of the totals
    remainder_macs_after: int
    latency: Latency | None = None
    fidelity: Fidelity | None = None
    tries: tuple[Try, ...] = ()

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    @property
    def params_saved(self) -> float:
        return 1 - self.after.params / self.before.params

    @property
    def macs_saved(self) -> float:
        return 1 - self.after.macs / self.before.macs if self.before.macs else 0.0

    def to_markdown(self) -> str:
        """The table and the totals for a README or an issue."""
        lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
        lines += [f"| {' | '.join(cells).replace('->', '→')} |" for cells in self._cells()]
        return "\n".join(lines) + "\n\n" + "\n".join(f"- {line}" for line in self._totals()) + "\n"

    def __str__(self) -> str:
        return text_table("", COLUMNS, self._cells()) + "\n" + "\n".join(self._totals())

    def _cells(self) -> list[tuple[str, ...]]:
        body = [
            (
                row.name,
                row.scheme or ("cut" if row.after != row.before else ""),
                "" if row.rank is None else str(row.rank),
                f"{row.before.params:,}",
                f"{row.after.params:,}",
                f"{row.before.macs:,}",
                f"{row.after.macs:,}",
                "" if row.error is None else f"{row.error:.4f}",
                "" if row.output_error is None else f"{row.output_error:.4f}",
                row.skipped or "",
            )
            for row in self.rows
        ]
        ends = (self.before.params, self.after.params, self.before.macs, self.after.macs)
        return [*body, ("whole network", "", "", *(f"{n:,}" for n in ends), "", "", "")]

    def _totals(self) -> list[str]:
        lines = [
            f"parameters {self.before.params:,} -> {self.after.params:,} ({-100 * self.params_saved:+.1f} %)",
            f"MACs {self.before.macs:,} -> {self.after.macs:,} ({-100 * self.macs_saved:+.1f} %)",
        ]
        if self.remainder_macs_before or self.remainder_macs_after:
            lines.append(f"outside of layers (functional products) MACs {self.remainder_macs_before:,} -> {self.remainder_macs_after:,}")
        most = max((row for row in self.rows if row.degeneracy is not None), key=lambda row: row.degeneracy or 0.0, default=None)
        if most is not None and most.degeneracy is not None:
            lines.append(f"most terms cancelling in {most.name}: squared norms of CP's terms sum to {most.degeneracy:.2f} of the kernel's")
        if self.fidelity:
            f = self.fidelity
            same = f", same top class {100 * f.agreement:.2f} %" if f.agreement is not None else ""
            nats = f", divergence {f.divergence:.4f} nats" if f.divergence is not None else ""
            lines.append(f"outputs on {f.images:,} images: squared relative error {f.error:.4f}{same}{nats}")
        for one in self.tries:
            within = "within the drop" if one.within else "too low"
            lines.append(f"tried {one.budget}: parameters {one.cost.params:,}, MACs {one.cost.macs:,}, score {one.score:g}, {within}")
        if self.latency:
            t = self.latency
            foreseen = "" if t.predicted is None else f"; predicted {t.predicted:.2f} ms"
            settings = f"{t.conditions}, median of {t.rounds}"
            lines.append(f"latency {t.before:.2f} -> {t.after:.2f} ms ({t.before / t.after:.2f}x faster{foreseen}; {settings})")
        return lines


def compare(
    before: nn.Module,
    after: nn.Module,
    *example_inputs: Any,
    plan: Plan | None = None,
    latency: bool = False,
    data: Calibration | Iterable[Any] | None = None,
) -> Report:
    """What a cut saved and what it cost, layer by layer and in all.

    Both networks are looked at on fake tensors, so their state stays as it is; the cut one is counted anew, not predicted.

    Args:
        before, after: the dense network and the one made from it.
        example_inputs: what both take.
        plan: how `after` was cut; adds schemes, ranks, the weights' relative errors and reasons for skips.
        data: batches of images (labels after them are ignored): adds every cut layer's output error, and how near the network's
            outputs are to the dense one's.
        latency: time both, in turn, in evaluation mode, on the inputs' device with torch's current thread count.

    Returns:
        A `Report`; print it, or see `to_markdown()` and `to_json()`.

    Raises:
        ValueError: a model does not run on the inputs, or `after` was not cut by `plan`.

    Example:
        >>> print(compare(model, small, torch.rand(1, 3, 32, 32), plan=plan))
    """
    dense, cut = survey_model(before, *example_inputs), survey_model(after, *example_inputs)
    timing = _timed(before, after, example_inputs, plan) if latency else None
    cuts = {c.name: c for c in plan.cuts} if plan else {}
    if plan:
        check_cut(after, plan)
    images = None if data is None else Images(data, input_shapes(example_inputs), same=False)
    near = None
    if images is not None:
        check_model_runs(evaluation_copy(before), images)
        near = measure_fidelity(before, after, (inputs for _, inputs in images), list(cuts))
    reasons = {skip.name: skip.reason for skip in (*(plan.skips if plan else ()), *(s for s in dense.layers if isinstance(s, Skip)))}
    rows: list[Row] = []
    for layer in dense.layers:
        name = layer.name
        now = _cost_under(name, cut.costs)
        if name not in cuts:
            rows.append(Row(name, dense.costs[name], now, skipped=reasons.get(name)))
            continue
        chosen = cuts[name]
        chain = after.get_submodule(name)
        weight = before.get_submodule(name).get_parameter("weight")
        known = not weight.is_meta and not next(chain.parameters()).is_meta
        error = schemes.relative_error(weight, chain_kernel(chosen, chain)) if known else None
        output_error = near.layer_errors.get(name) if near else None
        terms = degeneracy(chosen, chain) if known else None
        rows.append(Row(name, dense.costs[name], now, chosen.scheme, chosen.rank, error, None, output_error, terms))
    return Report(tuple(rows), dense.total, cut.total, dense.remainder_macs, cut.remainder_macs, timing, near)


def _timed(before: nn.Module, after: nn.Module, inputs: Sequence[Any], plan: Plan | None, rounds: int = 15) -> Latency:
    dense, cut = measure_latency([before, after], inputs, rounds)
    return Latency(dense, cut, timing_conditions(inputs), rounds, plan.timing.after if plan and plan.timing else None)


def _cost_under(name: str, costs: dict[str, Cost]) -> Cost:
    """A layer's cost, or that of the links that took its place."""
    links: Sequence[Cost] = [cost for other, cost in costs.items() if other == name or other.startswith(f"{name}." if name else "")]
    return sum(links, Cost(0, 0))
