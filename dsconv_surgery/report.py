"""Compare a cut network with the dense one: costs, errors, outputs and latency, as numbers and as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from dsconv_surgery import schemes
from dsconv_surgery.budget import Budget
from dsconv_surgery.calibration.images import Calibration, Images, check_model_runs, drawn
from dsconv_surgery.network.batchnorm_folding import folded_for_timing, has_folded_batchnorm
from dsconv_surgery.network.discovery import Skip, survey_model
from dsconv_surgery.network.geometry import Cost, Rank
from dsconv_surgery.network.layers import check_network, check_not_quantized
from dsconv_surgery.plan import COST_COLUMNS, MEASURES, UNTIMED, Cut, Plan, cost_cells, percent
from dsconv_surgery.support.copies import evaluation_copy
from dsconv_surgery.support.fidelity import Fidelity, Recovery, measure_fidelity
from dsconv_surgery.support.formatting import TOTAL, Displayed, TableContent
from dsconv_surgery.support.inputs import as_inputs
from dsconv_surgery.support.latency import ROUNDS, Latency, measure_latency, timing_conditions
from dsconv_surgery.support.layer_times import measure_layer_times
from dsconv_surgery.support.modes import standard_modes
from dsconv_surgery.support.plotting import Bars, draw_bars
from dsconv_surgery.support.records import JsonRecord, record
from dsconv_surgery.support.runtimes import RUNTIME_NAMES, Runtime, RuntimeChoice, find_runtime
from dsconv_surgery.surgery import chain_factors, check_cut

COLUMNS = ("layer", "scheme", "rank", *COST_COLUMNS, "ms", "-> ms", "weight error", "output error", "degeneracy", "not cut because")
OPTIONAL = ("ms", "-> ms", "output error", "degeneracy")  # columns that are shown if they have something to show
OUTSIDE = "outside layers"
HIGH_DEGENERACY = 30  # above it, int8 loses points of accuracy (tests/benchmarks/degeneracy.py); cuts of this library reach 20


@record
class Row:
    """One layer: `error` is the squared relative error of its weights, `output_error` that of its outputs, each channel about its mean.

    The error of weights that were fitted to images can exceed 1: such weights are right on the images, not close to the old ones.
    If latency was measured, `before` and `after` hold the layer's milliseconds inside the network. They do not sum up to the network's.
    `degeneracy`, for the CP schemes, is `sum_r |term_r|^2 / |V|^2` for the kernel V; where it is far above one, terms cancel each other.
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

    def cells(self) -> tuple[str, ...]:
        """The texts below `COLUMNS`."""
        scheme = ("cut" if self.changed else "") if self.scheme is None else self.scheme
        rank = "" if self.rank is None else str(self.rank)
        errors = ("" if error is None else f"{error:.4f}" for error in (self.error, self.output_error))
        times = (f"{cost.latency:.3f}" if cost.latency else "" for cost in (self.before, self.after))
        degeneracy = f"{self.degeneracy:.0f}" if (self.degeneracy or 0) > HIGH_DEGENERACY else ""
        return (self.name, scheme, rank, *cost_cells(self.before, self.after), *times, *errors, degeneracy, self.skipped or "")

    @property
    def changed(self) -> bool:
        """Whether the layer was cut."""
        return bool(self.scheme) or any(getattr(self.before, m) != getattr(self.after, m) for m in MEASURES)


@record
class Try:
    """One budget that the search for `max_drop` tried: the cost and the score of its network, and whether the drop was small enough.

    The drop is `dense_score - score`, and `max_drop` the largest that is allowed.
    """

    budget: Budget
    cost: Cost
    score: float
    within: bool
    dense_score: float
    max_drop: float

    def __str__(self) -> str:
        drop = f"drop {self.dense_score - self.score:.4g} {'within' if self.within else 'beyond'} max_drop {self.max_drop:g}"
        costs = f"parameters {self.cost.params:,}, MACs {self.cost.macs:,}"
        return f"tried {self.budget}: {costs}, score {self.dense_score:g} -> {self.score:g}, {drop}"


@record
class Report(JsonRecord, Displayed):
    """Two networks compared: all parameters, and MACs of convolutions and linear layers for the whole example batch."""

    rows: tuple[Row, ...]
    before: Cost
    after: Cost
    # Parameters and MACs outside of layers, as of functional convolutions and attention; the MACs are not part of the totals.
    outside_before: Cost
    outside_after: Cost
    latency: Latency | None = None
    planned_latency: Latency | None = None  # as the planner measured it, with random weights
    fidelity: Fidelity | None = None
    tries: tuple[Try, ...] = ()
    synthetic: bool = False  # the cut network was calibrated on synthetic images
    recovery: Recovery | None = None  # if the cut network was to be trained on its calibration images

    @property
    def params_saved(self) -> float:
        return 1 - self.after.params / self.before.params

    @property
    def macs_saved(self) -> float:
        return 1 - self.after.macs / self.before.macs if self.before.macs else 0.0

    def __repr__(self) -> str:
        saved = ", ".join(f"{name} {percent(getattr(self.before, m), getattr(self.after, m))}" for m, name in MEASURES.items())
        time = f", {self.latency}" if self.latency else ""
        return f"<Report: {sum(row.changed for row in self.rows)} of {len(self.rows)} layers cut, {saved}{time}>"

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw parameters, MACs and, if it was measured, time of each layer before and after, coloured by scheme; skips are hatched.

        Args:
            path: an image file to write, such as "report.png".

        Returns:
            A matplotlib figure, which a notebook shows.

        Raises:
            ValueError: matplotlib is missing.

        Example:
            >>> compare(model, small.model, x, plan=small.plan, latency=True).plot("report.png")
        """
        rows = [row for row in self._all_rows() if row.before != Cost(0, 0)]
        groups = [row.scheme or "cut" if row.changed else None for row in rows]
        names = dict.fromkeys((*schemes.scheme_names(), *filter(None, groups)))
        bars: list[Bars] = []
        for measure, name, scale, unit in (*((m, text, 1, "") for m, text in MEASURES.items()), ("latency", "time in layers", 1e-3, "s")):
            before, after = (
                [scale * getattr(cost, measure) for cost in side] for side in zip(*((r.before, r.after) for r in rows), strict=True)
            )
            if any(before):
                bars.append(Bars(f"{name} {percent(sum(before), sum(after))}", before, after, unit))
        title = f"{sum(row.changed for row in self.rows)} of {len(self.rows)} layers cut"
        if self.latency:
            title += f", {self.latency}"
        return draw_bars(title, [row.name for row in rows], groups, {name: f"C{i % 10}" for i, name in enumerate(names)}, bars, path)

    def table(self) -> TableContent:
        """The layers and the totals; without output errors and times where none was measured."""
        cells = [row.cells() for row in (*self._all_rows(), Row(TOTAL, self.before, self.after, scheme=""))]
        shown = [index for index, name in enumerate(COLUMNS) if name not in OPTIONAL or any(row[index] for row in cells)]
        columns, *cells = (tuple(row[index] for index in shown) for row in (COLUMNS, *cells))
        return TableContent("", columns, tuple(cells), tuple(self._totals()))

    def _all_rows(self) -> list[Row]:
        """The layers, and what is outside of them."""
        rows = list(self.rows)
        if self.outside_before != Cost(0, 0) or self.outside_after != Cost(0, 0):
            rows.append(Row(OUTSIDE, self.outside_before, self.outside_after))
        return rows

    def _totals(self) -> list[str]:
        lines = []
        for measure, name in MEASURES.items():
            before, after = getattr(self.before, measure), getattr(self.after, measure)
            lines.append(f"{name} {before:,} -> {after:,} ({percent(before, after)})")
        if any(outside := (self.outside_before.macs, self.outside_after.macs)):
            lines.append("MACs outside layers {:,} -> {:,}, not part of the whole network's".format(*outside))
        if degeneracies := {row.name: row.degeneracy for row in self.rows if row.degeneracy is not None}:
            lines.append(_degeneracy_line(degeneracies))
        if self.synthetic:
            lines.append("calibrated on synthetic images: measure the accuracy on real ones")
        lines += [str(result) for result in (self.recovery, self.fidelity, *self.tries) if result]
        if self.latency:
            lines.append(self.latency.with_conditions())
        elif ms := self.planned_latency:
            lines.append(f"latency {ms} when it was planned, with random weights ({ms.conditions})")
        else:
            lines.append(UNTIMED)
        return lines


@standard_modes()
def compare(
    before: nn.Module,
    after: nn.Module,
    *example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    plan: Plan | None = None,
    latency: bool = False,
    runtime: RuntimeChoice | None = None,
    data: Calibration | Iterable[Any] | str | None = None,
    prepare: Callable[[Any], Any] | None = None,
    output: Callable[[Any], Any] | None = None,
) -> Report:
    """Compare a cut network with the dense one, layer by layer and as a whole.

    The costs of both networks are counted on fake tensors, not predicted. Neither network is changed.

    Args:
        before, after: the dense network and the cut one.
        example_inputs, example_kwargs: the arguments of both.
        plan: how `after` was cut. Adds schemes, ranks, errors of weights, and reasons for skips.
        latency: measure the latency of both, in turn, in evaluation mode, on the inputs' device and torch's current thread count. In copies
            of both, BatchNorms are folded, as by `fold_batchnorm`, if it can fold both networks.
        runtime: what executes both where latency is measured, as for `make_plan`; if not given, the one that the plan was timed in.
        data: batches of images; labels after them are ignored. Adds output errors of the cut layers and of the network.
        prepare, output: as for `make_plan`.

    Returns:
        A `Report`: print it, or use `to_markdown()` or `to_json()`.

    Raises:
        ValueError: a model does not run on the inputs, `after` was not cut by `plan`, or `runtime` is given without `latency`.

    Example:
        >>> print(compare(model, small, torch.rand(1, 3, 32, 32), plan=plan))
    """
    inputs = as_inputs(example_inputs, example_kwargs)
    executed_by = _runtime(plan, latency, runtime)
    for argument, model in (("before", before), ("after", after)):
        check_network(model, argument)
        check_not_quantized(model)
    dense, small = (survey_model(model, inputs, replaceable=False) for model in (before, after))
    if plan:
        check_cut(after, plan)
    cuts = {cut.name: cut for cut in plan.cuts} if plan else {}
    timing = fidelity = None
    if latency:
        networks = folded_for_timing([before, after], inputs)
        conditions = timing_conditions(inputs, executed_by, networks[0] is not before)
        predicted = plan.timing.after if plan and plan.timing and plan.timing.conditions.comparable(conditions) else None
        dense_ms, small_ms = measure_latency(networks, inputs, runtime=executed_by)
        timing = Latency(dense_ms, small_ms, conditions, 0 if executed_by.measures else ROUNDS, predicted)
        for model, survey in zip(networks, (dense, small), strict=True) if conditions.runtime == "eager" else ():
            for name, milliseconds in measure_layer_times(model, survey.costs, inputs).items():
                survey.costs[name] = replace(survey.costs[name], latency=milliseconds)
    if data is not None:
        images = Images(drawn(before, data, inputs), inputs, prepare, output, same=False, argument="data")
        check_model_runs(evaluation_copy(before), images)
        last_links = {cut.name: f"{cut.name}.{list(cut.chain)[-1]}".removeprefix(".") for cut in cuts.values()}
        fidelity = replace(measure_fidelity(before, after, images, images.select_outputs, last_links), synthetic=images.synthetic)
    reasons = {layer.name: layer.reason for layer in (*(plan.skips if plan else ()), *dense.layers) if isinstance(layer, Skip)}
    rows: list[Row] = []
    for name, cost in dense.costs.items():
        costs = cost, _cost_under(name, small.costs)
        if name in cuts:
            error, degeneracy = _weight_errors(before.get_submodule(name), after.get_submodule(name), cuts[name])
            output_error = fidelity.layer_errors.get(name) if fidelity else None
            rows.append(Row(name, *costs, cuts[name].scheme, cuts[name].rank, error, None, output_error, degeneracy))
        else:
            rows.append(Row(name, *costs, skipped=reasons.get(name)))
    synthetic = plan is not None and plan.calibrated == "synthetic"
    totals = dense.total, small.total, dense.outside, small.outside
    return Report(tuple(rows), *totals, timing, plan.timing if plan else None, fidelity, synthetic=synthetic)


def _degeneracy_line(degeneracies: dict[str, float]) -> str:
    """The largest degeneracy; where it is high, what this means and what to do."""
    name = max(degeneracies, key=degeneracies.__getitem__)
    text = f"largest CP degeneracy {degeneracies[name]:.2f}, in {name}: squared norms of terms / squared norm of the kernel"
    if degeneracies[name] <= HIGH_DEGENERACY:
        return text
    return (
        f"{text}. Above {HIGH_DEGENERACY}, terms cancel each other, so rounding to int8 may cost points of accuracy. Measure it in int8, "
        "or cut the layers with a degeneracy in the table again, with calibration images or another scheme."
    )


def _runtime(plan: Plan | None, latency: bool, choice: RuntimeChoice | None) -> Runtime:
    """What executes the networks where latency is measured."""
    if choice is not None and not latency:
        raise ValueError(f"runtime={choice!r}: no latency is measured. Pass latency=True (--measure-latency), or leave runtime out.")
    if choice is None and latency and plan and plan.timing:
        choice = plan.timing.conditions.runtime
        if choice not in RUNTIME_NAMES:
            raise ValueError(f"compare: the plan was timed by a function ({choice}). Pass it as runtime=, or name one of {RUNTIME_NAMES}.")
    return find_runtime("eager" if choice is None else choice)


def _weight_errors(layer: nn.Module, chain: nn.Module, cut: Cut) -> tuple[float | None, float | None]:
    """The error of the weights, and the degeneracy; None on the meta device."""
    if has_folded_batchnorm(layer) != has_folded_batchnorm(chain):
        raise ValueError(f"{cut.name}: a BatchNorm is folded into this layer in one network only. Fold both before the cut, or neither.")
    weight, factors, scheme = layer.get_parameter("weight"), chain_factors(cut, chain), schemes.get_scheme(cut.scheme)
    if any(tensor.is_meta for tensor in (weight, *factors.values())):
        return None, None
    error = schemes.relative_error(weight, schemes.kernel_of(scheme, cut.spec, factors))
    return error, schemes.degeneracy(scheme, cut.spec, factors)


def _cost_under(name: str, costs: dict[str, Cost]) -> Cost:
    """The cost of a layer, or of the links in its place."""
    prefix = f"{name}." if name else ""
    return sum((cost for other, cost in costs.items() if other == name or other.startswith(prefix)), Cost(0, 0))
