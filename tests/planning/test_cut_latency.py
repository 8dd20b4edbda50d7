"""Whole networks are timed as they are deployed: with BatchNorms folded, the dense and the cut one alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dsconv_surgery import Budget, apply_plan, compare, make_plan, pareto
from dsconv_surgery.planning.cut_latency import CutTimer
from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.latency import Stopwatch
from dsconv_surgery.support.runtimes import find_runtime

X = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
SETTINGS: dict[str, Any] = {"schemes": "channel", "exclude": ()}


class Net(nn.Module):
    """Convolutions, each with a BatchNorm; `asks` makes it compute something else without them."""

    def __init__(self, asks: bool = False) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.second, self.second_norm = nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)
        self.asks = asks

    def forward(self, x: Tensor) -> Tensor:
        y = self.second_norm(self.second(self.first_norm(self.first(x)).relu()))
        return y if not self.asks or isinstance(self.first_norm, nn.BatchNorm2d) else -y


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The networks that were timed."""
    networks: list[nn.Module] = []

    def measure(models: Any, *_: Any, **__: Any) -> list[float]:
        networks.extend(models)
        return [1.0] * len(models)

    for module in ("report", "sweep", "planning.cut_latency"):
        monkeypatch.setattr(f"dsconv_surgery.{module}.measure_latency", measure)
    return networks


def batchnorms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def test_a_planned_cut_is_timed_with_batchnorms_folded(timed: list[nn.Module]) -> None:
    """The cut network has the chains of the plan, and biases where BatchNorms were; the user's network is not changed."""
    model = Net().eval()
    plan = make_plan(model, X, rule="fixed", rank=4, **SETTINGS)
    timer = CutTimer(model, Inputs(X), Stopwatch(), find_runtime("eager"))
    timing = timer.time(plan, 1.0)
    dense, again, cut = timed
    assert dense is again
    assert [batchnorms(network) for network in (model, dense, cut)] == [2, 0, 0]
    assert [len(layer) for layer in (cut.first, cut.second)] == [2, 2]
    assert cut.first[-1].bias is not None
    assert timing.conditions.batchnorm_folded
    assert str(timing.conditions).endswith("eager, BatchNorms folded")
    assert cut(X).shape == model(X).shape


@pytest.mark.parametrize("training", [False, True])
def test_compared_networks_are_timed_with_batchnorms_folded(training: bool, timed: list[nn.Module]) -> None:
    """Also those in training mode, which are timed in evaluation mode; layers are timed in them by name."""
    model = Net().eval()
    plan = make_plan(model, X, rule="fixed", rank=4, **SETTINGS)
    cut = apply_plan(model, plan, X)
    report = compare(model.train(training), cut.train(training), X, plan=plan, latency=True)
    assert [batchnorms(network) for network in timed] == [0, 0]
    assert report.latency is not None
    assert report.latency.conditions.batchnorm_folded
    assert all(row.before.latency and row.after.latency for row in report.rows)


def test_networks_of_a_sweep_are_timed_with_batchnorms_folded(timed: list[nn.Module]) -> None:
    sweep = pareto(Net().eval(), X, fractions=(0.6,), latency=True, cache=False, **SETTINGS)
    assert [batchnorms(network) for network in timed] == [0] * 5
    assert sweep.conditions is not None
    assert sweep.conditions.batchnorm_folded


WITHOUT, FOLDABLE = nn.Sequential(nn.Conv2d(3, 16, 3)), nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16))
PAIRS = {"no BatchNorm": (WITHOUT, WITHOUT), "dense is refused": (Net(asks=True), FOLDABLE), "cut is refused": (FOLDABLE, Net(asks=True))}


@pytest.mark.parametrize("name", PAIRS)
def test_networks_that_cannot_both_be_folded_are_timed_as_they_are(name: str, timed: list[nn.Module]) -> None:
    """And so the conditions say."""
    before, after = (model.eval() for model in PAIRS[name])
    report = compare(before, after, X, latency=True)
    assert timed[0] is before
    assert timed[1] is after
    assert report.latency is not None
    assert not report.latency.conditions.batchnorm_folded


def test_the_conditions_of_a_planned_time_are_those_of_a_measured_one() -> None:
    """So that the predicted time can be compared with the measured one."""
    model = Net().eval()
    plan = make_plan(model, X, budget=Budget(latency=1.0), cache=False, **SETTINGS)
    report = compare(model, apply_plan(model, plan, X), X, plan=plan, latency=True)
    assert plan.timing is not None
    assert report.latency is not None
    assert report.latency.conditions == plan.timing.conditions
