"""Without images, the first convolution and the last layer stay dense by default."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsconv_surgery import Budget, Plan, Recipe, compress, make_plan
from dsconv_surgery.budget import BudgetError
from dsconv_surgery.planning.rules import RULES, NamedRule
from dsconv_surgery.planning.site_selection import DENSE_END

X = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
FIXED: dict[str, Any] = {"rule": "fixed", "rank": 2, "schemes": ["channel", "bottleneck"], "cache": False}
ALL = {"conv1", "conv2", "conv3", "head"}
INNER = {"conv2", "conv3"}


class Net(nn.Module):
    """Three convolutions and a classifier, called in this order, and registered in it or in the reverse; an average after conv1."""

    def __init__(self, backwards: bool = False, pool: int = 1, classes: int = 10) -> None:
        super().__init__()
        layers = {
            "conv1": nn.Conv2d(3, 8, 3, padding=1),
            "conv2": nn.Conv2d(8, 16, 3, padding=1),
            "conv3": nn.Conv2d(16, 16, 3, padding=1),
            "head": nn.Linear(16, classes),
        }
        for name in reversed(layers) if backwards else layers:
            self.add_module(name, layers[name])
        self.pool = nn.AvgPool2d(pool)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.conv1(x)))
        return self.head(torch.relu(self.conv3(torch.relu(self.conv2(x)))).mean((2, 3)))


def plan_of(model: nn.Module | None = None, x: Tensor = X, **settings: Any) -> Plan:
    return make_plan((model or Net()).eval(), x, **{**FIXED, **settings})


def cut_names(plan: Plan) -> set[str]:
    return {cut.name for cut in plan.cuts}


def dense_ends(plan: Plan) -> set[str]:
    """The layers that stayed dense because they are the first or the last."""
    return {skip.name for skip in plan.skips if skip.reason == DENSE_END}


@pytest.mark.parametrize("backwards", [False, True])
def test_the_first_convolution_and_the_last_layer_stay_dense(backwards: bool) -> None:
    """The order in which the network calls its layers counts, not the order of its modules."""
    plan = plan_of(Net(backwards))
    assert cut_names(plan) == INNER
    assert dense_ends(plan) == ALL - INNER


def test_the_report_shows_the_reason() -> None:
    small = compress(Net().eval(), X, **FIXED)
    assert {row.name for row in small.report.rows if row.skipped == DENSE_END} == ALL - INNER
    assert str(small.report).count(DENSE_END) == 2


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"exclude": ()}, ALL),
        ({"exclude": []}, ALL),
        ({"exclude": "conv2"}, ALL - {"conv2"}),
        ({"calibration": [torch.rand(8, 3, 16, 16)]}, ALL),
        ({"include": ["conv1"]}, {"conv1"}),
        ({"include": ["conv1", "*"]}, ALL - {"head"}),
        ({"include": ["conv1", "conv2", "head"]}, ALL - {"conv3"}),
        ({"include": ["conv*"]}, INNER),
        ({"include": ["*1", "head*"]}, {"conv1", "head"}),  # nothing but the ends
    ],
    ids=["empty", "empty list", "another", "images", "only one", "one and all", "both", "pattern", "ends only"],
)
def test_when_they_are_cut(settings: dict[str, Any], expected: set[str]) -> None:
    assert cut_names(plan_of(**settings)) == expected


def test_another_name_of_the_layer_in_include() -> None:
    model = Net(backwards=True)
    model.stem = model.conv1
    assert cut_names(plan_of(model, include=["stem", "conv2"])) == {"conv1", "conv2"}
    model = Net()
    model.stem = model.conv1
    assert cut_names(plan_of(model, include=["st*", "conv2"])) == {"conv2"}


@pytest.mark.parametrize("layers", [2, 3, 4, 5])
def test_layers_of_more_than_a_quarter_of_the_cost_are_cut(layers: int) -> None:
    """Of four equal layers, each is a quarter and not more."""
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(layers)))
    expected = {str(index) for index in (range(layers) if layers < 4 else range(1, layers - 1))}
    assert cut_names(plan_of(model, torch.rand(1, 8, 8, 8))) == expected


@pytest.mark.parametrize(
    ("model", "budget", "expected"),
    [
        (Net(pool=4), Budget(macs=0.6), {"head"}),
        (Net(pool=4), Budget(params=0.6), {"conv1", "head"}),
        (Net(pool=4), Budget(macs=0.6, params=0.8), {"head"}),
        (Net(classes=500), Budget(macs=0.6), {"conv1", "head"}),
        (Net(classes=500), Budget(params=0.6), {"conv1"}),
        (Net(classes=500), Budget(macs=0.6, params=0.8), {"conv1"}),
    ],
)
def test_the_cost_is_in_the_measures_of_the_budget(model: nn.Module, budget: Budget, expected: set[str]) -> None:
    """Before an average of 4x4 pixels, conv1 has most of the MACs; a head of 500 classes has most of the parameters."""
    assert dense_ends(plan_of(model, budget=budget, rule="budget", rank=None)) == expected


def test_a_network_of_ends_only_is_cut() -> None:
    two = nn.Sequential(nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    assert cut_names(plan_of(two)) == {"0", "3"}
    between = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    assert cut_names(plan_of(between)) == {"0", "4"}  # no other layer can be cut


def test_in_a_network_of_linear_layers_only_the_last_stays_dense() -> None:
    plan = plan_of(nn.Sequential(*(nn.Linear(16, 16) for _ in range(5))), torch.rand(1, 16))
    assert cut_names(plan) == {"0", "1", "2", "3"}
    assert dense_ends(plan) == {"4"}


# ---- budgets out of reach


def test_an_unreachable_budget_names_the_way_out() -> None:
    with pytest.raises(BudgetError, match=r"out of reach.*exclude=\(\) cuts them"):
        plan_of(budget=Budget(macs=0.01), rule="budget", rank=None)
    for settings in ({"exclude": ()}, {"calibration": [torch.rand(8, 3, 16, 16)]}):
        with pytest.raises(BudgetError, match="out of reach") as caught:
            plan_of(budget=Budget(macs=0.01), rule="budget", rank=None, **settings)
        assert "exclude=()" not in str(caught.value)


def test_limits_that_cannot_be_met_at_once_name_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "uniform", NamedRule(lambda tables, _allowed: dict.fromkeys(tables)))
    settings = {"budget": Budget(macs=0.5), "rule": "uniform", "rank": None}
    with pytest.raises(BudgetError, match=r"finds nothing within.*Or pass exclude=\(\) to cut the first convolution and the last layer"):
        plan_of(**settings)
    with pytest.raises(BudgetError, match="finds nothing within") as caught:
        plan_of(**settings, exclude=())
    assert "exclude=()" not in str(caught.value)


# ---- recipes


def test_an_empty_list_in_a_recipe() -> None:
    text = 'exclude = []\nrule = "fixed"\nrank = 2\nschemes = ["channel", "bottleneck"]\n'
    recipe, default = Recipe.from_toml(text), Recipe.from_toml(text.removeprefix("exclude = []\n"))
    assert (recipe.exclude, default.exclude) == ((), None)
    assert "exclude = []" in recipe.to_toml()
    for written in (recipe, default):
        assert Recipe.from_toml(written.to_toml()) == written
    assert cut_names(recipe.run(Net().eval(), X, cache=False).plan) == ALL
    assert cut_names(default.run(Net().eval(), X, cache=False).plan) == INNER
