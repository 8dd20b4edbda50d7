"""How results show themselves: short representations, tables as text and HTML, and pictures of numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dsconv_surgery import Budget, Plan, compare, compress, find_convs, make_plan, pareto
from dsconv_surgery.finetuning.history import Epoch, History
from dsconv_surgery.network.geometry import Cost
from dsconv_surgery.report import Report, Row
from dsconv_surgery.support.latency import Conditions, Latency
from dsconv_surgery.sweep import Point, Sweep

X = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
CONDITIONS = Conditions(1, 2, "float32", "cpu", "contiguous")
EPOCHS = tuple(Epoch(number, 5 * number, 2.0 / number, None, None, 0.5 + 0.1 * number, 3.0) for number in (1, 2, 3))
ROWS = (
    Row("conv1", Cost(100, 1000, 1.0), Cost(100, 1000, 1.1), skipped="excluded."),
    Row("conv2", Cost(300, 3000, 2.0), Cost(150, 900, 3.0), "cp", 4, 0.1),
    Row("fc", Cost(200, 200, 0.0), Cost(100, 100, 0.0), "bottleneck", 2, 0.2),
)
REPORT = Report(ROWS, Cost(650, 4200), Cost(400, 2000), Cost(50, 0), Cost(50, 0))


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 3, 2)).eval()


@pytest.fixture
def plan(model: nn.Module) -> Plan:
    return make_plan(model, X, budget=Budget(macs=0.9), schemes="channel", exclude=())


def test_representations_are_short(model: nn.Module, plan: Plan) -> None:
    small = compress(model, X, budget=Budget(macs=0.9), schemes="channel", exclude=())
    macs = f"MACs {100 * (plan.total_after.macs / plan.total.macs - 1):+.1f} %"
    sweep = pareto(model, X, fractions=(0.95, 0.9), schemes="channel", exclude=())
    history = History(EPOCHS, {}, {}, 0.4)
    for value, texts in (
        (plan, ("<Plan: 1 cut, 2 skips, ", macs, "Budget(macs=0.9)>")),
        (small.report, (f"<Report: {len(plan.cuts)} of 3 layers cut, ", macs)),
        (small, (f"<Compressed: Sequential, {len(plan.cuts)} of 3 layers cut, ", macs)),
        (sweep, ("<Sweep: the dense network and 2 budgets on macs: 0.95, 0.9>",)),
        (history, ("<History: 3 epochs, loss 0.6667, best score 0.8000 in epoch 3>",)),
        (find_convs(model, X), ("<Layers: 2 sites, 1 skip, 907 parameters, ",)),
        (plan.diff(plan), ("<PlanDifference in 0 layers>",)),
    ):
        assert all(text in repr(value) for text in texts), repr(value)
        assert len(repr(value)) < 150
        assert str(value).count("\n") > 0
        assert "<table>" in value._repr_html_()  # type: ignore[attr-defined]


def test_a_compressed_network_shows_its_report_and_its_histories(model: nn.Module) -> None:
    small = replace(compress(model, X, budget=Budget(macs=0.9), schemes="channel"), tuned=(History(EPOCHS, {}, {}),))
    assert str(small) == f"{small.report}\n{small.tuned[0]}"
    assert small._repr_html_().count("<table>") == 2


def test_the_list_of_layers_is_a_list_and_a_table(model: nn.Module) -> None:
    layers = find_convs(model, X)
    assert [layer.name for layer in layers] == ["0", "2", "4"]
    assert layers == list(layers)
    lines = str(layers).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["0", "2", "4", "whole"] or "outside" in str(layers)
    assert "nn.ConvTranspose2d is not a plain nn.Conv2d" in lines[3]
    assert lines[-1].split()[-2:] == [f"{layers.total.params:,}", f"{layers.total.macs:,}"]


# ---- degeneracy


def test_a_high_degeneracy_is_explained() -> None:
    """In a column that is not there otherwise, for each such layer, and in a line that says why it matters and what to do."""
    high, normal = (Row("conv2", Cost(300, 3000), Cost(150, 900), "cp", 4, 0.1, None, None, value) for value in (259.6, 29.0))
    other = Row("conv3", Cost(300, 3000), Cost(150, 900), "cp_split", 4, 0.1, None, None, 41.2)
    text = str(replace(REPORT, rows=(*ROWS, high, other, replace(normal, name="conv4"))))
    columns, *lines = (line.split() for line in text.splitlines())
    assert "degeneracy" in columns
    assert [line[-1] for line in lines if line[0] in ("conv2", "conv3", "conv4")] == ["0.1000", "260", "41", "0.1000"]
    assert "largest CP degeneracy 259.60, in conv2: squared norms of terms / squared norm of the kernel. Above 30, terms cancel" in text
    assert "rounding to int8 may cost points of accuracy. Measure it in int8, or cut the layers with a degeneracy" in text
    text = str(replace(REPORT, rows=(*ROWS, normal)))
    assert "largest CP degeneracy 29.00, in conv2: squared norms of terms / squared norm of the kernel\n" in text
    assert "Above" not in text
    assert "degeneracy" not in text.splitlines()[0]
    assert "degeneracy" not in str(REPORT)


# ---- time


def test_the_latency_line_says_faster_or_slower() -> None:
    for before, after, verdict in (
        (10.0, 4.0, "10.00 -> 4.00 ms, 2.50x faster than the dense network"),
        (4.0, 10.0, "4.00 -> 10.00 ms, 2.50x slower than the dense network"),
        (10.0, 10.01, "10.00 -> 10.01 ms, as fast as the dense network"),
    ):
        report = replace(REPORT, latency=Latency(before, after, CONDITIONS, 15))
        assert f"latency {verdict} (fastest quarter of at least 15 rounds, batch 2" in str(report)
        assert "was not measured" not in str(report)
        assert verdict in repr(report)


def test_reports_and_plans_without_times_say_so(model: nn.Module, plan: Plan) -> None:
    small = compress(model, X, budget=Budget(params=0.9), schemes="channel", exclude=())
    for text in (str(small.report), str(plan), str(REPORT)):
        assert "time was not measured, and fewer MACs do not always take less" in text
    timed = replace(REPORT, planned_latency=Latency(4.0, 3.0, CONDITIONS, 15))
    assert "latency 4.00 -> 3.00 ms, 1.33x faster than the dense network when it was planned, with random weights" in str(timed)
    assert "was not measured" not in str(timed)
    assert "random weights" in str(replace(plan, timing=Latency(4.0, 3.0, CONDITIONS, 15)))


def test_compare_measures_the_time_in_each_layer(model: nn.Module, plan: Plan) -> None:
    """The links of a chain are summed; without latency there are no such columns."""
    small = compress(model, X, budget=Budget(macs=0.9), schemes="channel", exclude=())
    report = compare(model, small.model, X, plan=small.plan, latency=True)
    assert all(row.before.latency > 0 and row.after.latency > 0 for row in report.rows)
    assert "-> ms" in str(report)
    assert "-> ms" not in str(small.report)
    assert Report.from_json(report.to_json()) == report
    assert [row.changed for row in report.rows] == [row.changed for row in small.report.rows]


# ---- pictures


def widths(axes: Any) -> list[float]:
    return [patch.get_width() for patch in axes.patches]


def test_the_picture_of_a_report(tmp_path: Path) -> None:
    """Bars before, then after by scheme, then those that stay dense, with what is outside layers last."""
    report = replace(REPORT, latency=Latency(4.0, 5.0, CONDITIONS, 15))
    figure = report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 0
    params, macs, time = figure.axes
    assert [text.get_text() for text in params.get_yticklabels()] == ["conv1", "conv2", "fc", "outside layers"]
    assert widths(params) == [100, 300, 200, 50, 150, 100, 100, 50]
    assert widths(macs) == [1000, 3000, 200, 0, 900, 100, 1000, 0]
    assert widths(time) == pytest.approx([1e-3, 2e-3, 0, 0, 3e-3, 0, 1.1e-3, 0])
    assert [axes.get_title() for axes in figure.axes] == ["parameters -38.5 %", "MACs -52.4 %", "time in layers +36.7 %"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["before", "cp", "bottleneck", "stays dense"]
    assert figure.get_suptitle() == "2 of 3 layers cut, 4.00 -> 5.00 ms, 1.25x slower than the dense network"
    untimed = replace(REPORT, rows=tuple(replace(r, before=replace(r.before, latency=0.0)) for r in ROWS))
    assert len(untimed.plot().axes) == 2


def test_a_scheme_has_the_same_colour_in_all_pictures() -> None:
    only_bottleneck = replace(REPORT, rows=ROWS[2:])
    colours = [report.plot().axes[0].patches[index].get_facecolor() for report, index in ((REPORT, 5), (only_bottleneck, 2))]
    assert colours[0] == colours[1]


def test_the_picture_of_a_sweep() -> None:
    points = [Point(f, Cost(int(1000 * f), int(10**6 * f)), score=s) for f, s in ((1.0, 0.9), (0.5, 0.8), (0.25, 0.6))]
    figure = Sweep("params", tuple(points)).plot()
    macs, params = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["MACs", "parameters (the budget)"]
    assert [text.get_text() for text in macs.texts] == ["dense", "0.5", "0.25"]
    level, line, _, first = params.lines
    assert set(level.get_ydata()) == {0.9}
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1000, 500, 250], [0.9, 0.8, 0.6])
    assert first.get_markerfacecolor() == "white"
    timed = [replace(point, cost=replace(point.cost, latency=2.0)) for point in points]
    assert [axes.get_xlabel() for axes in Sweep("macs", tuple(timed)).plot().axes] == ["MACs", "parameters", "ms"]
    with pytest.raises(ValueError, match="nothing to plot: quality was not measured"):
        Sweep("macs", (Point(1.0, Cost(1, 1)),)).plot()


def test_the_picture_of_a_history() -> None:
    loss, score = History(EPOCHS, {}, {}, 0.4).plot(dense=0.95).axes
    assert list(loss.lines[0].get_xdata()) == [1, 2, 3]
    assert set(score.lines[0].get_ydata()) == {0.95}
    assert list(score.lines[1].get_xdata()) == [0, 1, 2, 3]
    assert list(score.lines[1].get_ydata()) == pytest.approx([0.4, 0.6, 0.7, 0.8])
    assert [text.get_text() for text in score.get_legend().get_texts()] == ["dense network", "before tuning"]
    assert len(History(tuple(replace(e, score=None) for e in EPOCHS), {}, {}).plot().axes) == 1
    gap = History((EPOCHS[0], replace(EPOCHS[1], score=None)), {}, {}).plot().axes[1].lines[0].get_ydata()
    assert math.isnan(gap[1])
