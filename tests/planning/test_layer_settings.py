"""Settings for some layers: schemes and multiples by pattern, ranks up front, types in include and exclude."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsconv_surgery import Budget, PlanSettings, Recipe, compress, make_plan
from dsconv_surgery.budget import BudgetError
from dsconv_surgery.support.latency import Stopwatch, Timing

X = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
FIXED: dict[str, Any] = {"rule": "fixed", "rank": 4, "exclude": (), "cache": False}


def parameters_as_times(_stopwatch: Any, calls: Any, _device: Any, _rounds: int) -> list[Timing]:
    return [Timing(1e-3 * sum(p.numel() for p in call.func.parameters()), 1.0) for call in calls]


class OwnConv(nn.Conv2d):
    pass


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.layer1 = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), OwnConv(16, 16, 3, padding=1))
        self.layer10 = nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 16, 1)
        self.fc = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.up(self.layer10(self.layer1(self.conv1(x)))).mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    return Net().eval()


def schemes_of(plan: Any) -> dict[str, str]:
    return {cut.name: cut.scheme for cut in plan.cuts}


# ---- schemes by pattern


def test_the_first_pattern_that_matches_a_layer_counts(model: nn.Module) -> None:
    plan = make_plan(model, X, **FIXED, schemes={"layer1.0": "cp", "layer1": ["channel"], "fc": None, "conv1": []})
    assert schemes_of(plan) == {"layer1.0": "cp", "layer1.1": "channel"} | {"layer10": schemes_of(plan)["layer10"]}
    reasons = {skip.name: skip.reason for skip in plan.skips}
    assert reasons["fc"] == reasons["conv1"] == "kept dense by schemes= (None for a pattern that matches it)."
    plan = make_plan(model, X, **FIXED, schemes={"layer1": "spatial", "*": None})
    assert schemes_of(plan) == {"layer1.0": "spatial", "layer1.1": "spatial"}


def test_schemes_by_pattern_in_a_recipe() -> None:
    text = 'rule = "fixed"\nrank = 4\n[schemes]\n"layer1" = "cp"\n"*" = []\n'
    recipe = Recipe.from_toml(text)
    assert recipe.schemes == {"layer1": ("cp",), "*": ()}
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert schemes_of(recipe.run(Net().eval(), X, cache=False).plan) == {"layer1.0": "cp", "layer1.1": "cp"}


# ---- ranks up front


def test_a_rank_up_front_is_kept_and_the_rest_meets_the_budget(model: nn.Module) -> None:
    ranks = {"layer1.0": ("tucker", (3, 5)), "conv1": ("channel", 12)}
    plan = make_plan(model, X, budget=Budget(macs=0.5), ranks=ranks, schemes=["spatial"])
    chosen = {cut.name: (cut.scheme, cut.rank) for cut in plan.cuts}
    assert {name: chosen[name] for name in ranks} == ranks
    assert all(scheme == "spatial" for name, (scheme, _) in chosen.items() if name not in ranks)
    assert 0.45 * plan.total.macs < plan.total_after.macs <= 0.5 * plan.total.macs
    small = compress(model, X, budget=Budget(macs=0.5), ranks=ranks, schemes=["spatial"])
    assert {cut.name: (cut.scheme, cut.rank) for cut in small.plan.cuts} == chosen


def test_a_rank_up_front_is_kept_even_if_it_saves_nothing(model: nn.Module) -> None:
    """It costs more than the layer, so that the others have to save more."""
    plans = [make_plan(model, X, budget=Budget(macs=0.9), schemes="channel", exclude=(), ranks=r) for r in (None, {"layer10": ("cp", 100)})]
    (cut,) = [cut for cut in plans[1].cuts if cut.name == "layer10"]
    assert (cut.scheme, cut.rank) == ("cp", 100)
    assert cut.cost_after.macs > cut.cost_before.macs
    assert all(plan.total_after.macs <= 0.9 * plan.total.macs for plan in plans)


@pytest.mark.parametrize("rule", ["budget", "uniform", "equal_error", "fixed"])
def test_ranks_up_front_with_every_kind_of_rule(rule: str, model: nn.Module) -> None:
    settings: dict[str, Any] = {"rank": 4} if rule == "fixed" else {"budget": Budget(macs=0.6)}
    plan = make_plan(model, X, rule=rule, schemes="channel", ranks={"layer1": ("cp", 7)}, **settings)
    assert {cut.name: cut.rank for cut in plan.cuts if cut.scheme == "cp"} == {"layer1.0": 7, "layer1.1": 7}


def test_ranks_up_front_with_images(model: nn.Module) -> None:
    small = compress(model, X, calibration=[torch.rand(8, 3, 16, 16)], schemes="channel", ranks={"layer10": ("cp", 9)})
    (cut,) = [cut for cut in small.plan.cuts if cut.name == "layer10"]
    assert (cut.scheme, cut.rank) == ("cp", 9)
    assert cut.error is not None


def test_ranks_up_front_under_a_latency_budget(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of parameters stands for the time."""
    monkeypatch.setattr(Stopwatch, "time", parameters_as_times)
    plan = make_plan(model, X, budget=Budget(latency=0.6), schemes="channel", ranks={"layer10": ("cp", 9)}, multiple=1, cache=False)
    assert next((cut.scheme, cut.rank) for cut in plan.cuts if cut.name == "layer10") == ("cp", 9)
    assert plan.total_after.params <= 0.62 * plan.total.params


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": {"layer9": ("cp", 3)}}, "ranks: no layer matches 'layer9'. Did you mean 'layer10'"),
        ({"ranks": {"up": ("cp", 3)}}, "ranks: 'up' matches no layer that can be cut. up: nn.ConvTranspose2d is not"),
        ({"ranks": {"fc": ("cp", 3)}}, "ranks: fc: scheme 'cp' does not apply"),
        ({"ranks": {"layer10": ("cp", 10**4)}}, "ranks: layer10: rank 10000 is above the full rank"),
        ({"ranks": {"layer10": ("pc", 3)}}, "unknown scheme 'pc'. Known: depthwise"),
        ({"ranks": {"layer10": 3}}, r"ranks=3: expected a scheme and a rank by pattern, as in ranks=\{'layer1': \('cp', 12\)\}"),
        ({"ranks": {"layer10": ("cp", 0)}}, "ranks=.*: expected a scheme and a rank"),
        ({"ranks": {}}, r"ranks=\{\}: expected a scheme and a rank"),
        ({"ranks": {"layer10": ("cp", 3)}, "exclude": "layer10"}, "layer10 has a rank there, but it is excluded by 'layer10'. Remove one"),
        ({"ranks": {"layer10": ("cp", 3)}, "include": "layer1"}, "layer10 has a rank there, but it is not among the included layers"),
        ({"schemes": {"layer9": "cp"}}, "schemes: no layer matches 'layer9'. Did you mean 'layer10'"),
        ({"schemes": {"layer1": "pc"}}, "unknown scheme 'pc'"),
        ({"schemes": {}}, r"schemes=\{\}: expected a scheme to choose from"),
        ({"multiple": {"layer9": 4}}, "multiple: no layer matches 'layer9'"),
        ({"multiple": {"layer1": 0}}, r"multiple=0|multiple=\{'layer1': 0\}: expected a number of channels"),
        ({"exclude": nn.Conv3d}, "exclude: no layer matches 'nn.Conv3d'"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_wrong_settings_name_the_layer_and_the_setting(settings: dict[str, Any], message: str, model: nn.Module) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(model, X, **settings)


def test_a_budget_that_ranks_up_front_make_unreachable(model: nn.Module) -> None:
    make_plan(model, X, budget=Budget(macs=0.3), exclude=())
    with pytest.raises(BudgetError, match="is out of reach"):
        make_plan(model, X, budget=Budget(macs=0.3), exclude=(), ranks={"layer1": ("cp", 100)})


def test_ranks_in_a_recipe(model: nn.Module) -> None:
    recipe = Recipe.from_toml('[ranks]\n"layer1.0" = ["cp", 12]\nlayer10 = ["tucker", [3, 5]]\n')
    assert recipe.ranks == {"layer1.0": ("cp", 12), "layer10": ("tucker", (3, 5))}
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert recipe == Recipe(ranks={"layer1.0": ["cp", 12], "layer10": ["tucker", [3, 5]]})


# ---- multiple by pattern, and types


def test_multiple_by_pattern(model: nn.Module) -> None:
    plan = make_plan(model, X, budget=Budget(macs=0.55), schemes="channel", multiple={"layer1.1": 8, "layer1": 4})
    ranks = {cut.name: cut.rank for cut in plan.cuts}
    assert ranks["layer1.1"] % 8 == 0
    assert ranks["layer1.0"] % 4 == 0
    settings = PlanSettings(multiple={"a": 4}, budget=Budget(latency=0.5))
    assert [settings.multiple_for([name]) for name in ("a", "a.b", "c")] == [4, 4, 8]
    assert PlanSettings(multiple={"a": 4}).multiple_for(["c"]) == PlanSettings().multiple_for(["a"]) == 1
    assert Recipe.from_toml("[multiple]\nlayer1 = 4\n").multiple == {"layer1": 4}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"exclude": [nn.Linear]}, {"conv1", "layer1.0", "layer1.1", "layer10"}),
        ({"exclude": nn.Conv2d}, {"fc"}),  # subclasses, too
        ({"exclude": OwnConv}, {"conv1", "layer1.0", "layer10", "fc"}),
        ({"exclude": ["nn.Linear", "layer1"]}, {"conv1", "layer10"}),
        ({"include": nn.Linear}, {"fc"}),
        ({"include": ["layer1", nn.Linear]}, {"layer1.0", "layer1.1", "fc"}),
        ({"exclude": "layer1"}, {"conv1", "layer10", "fc"}),
        ({"exclude": "layer1*"}, {"conv1", "fc"}),
    ],
    ids=["linear", "conv", "own", "name and type", "include", "include both", "module", "wildcard"],
)
def test_types_and_modules_in_include_and_exclude(settings: dict[str, Any], expected: set[str], model: nn.Module) -> None:
    plan = make_plan(model, X, **{**FIXED, "schemes": ["channel", "bottleneck"], **settings})
    assert {cut.name for cut in plan.cuts} == expected


def test_a_type_in_settings_is_its_name() -> None:
    settings = PlanSettings(exclude=[nn.Linear, OwnConv])
    assert settings.exclude == ("nn.Linear", f"{OwnConv.__module__}.OwnConv")
    assert PlanSettings(exclude="nn.Linear") == PlanSettings(exclude=nn.Linear)
    recipe = Recipe(exclude=[nn.Linear])
    assert Recipe.from_toml(recipe.to_toml()) == recipe
