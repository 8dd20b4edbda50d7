"""PlanSettings: one record for make_plan, compress, pareto, recipes and the command line, with errors that show the correct call."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from dsconv_surgery import Budget, PlanSettings, Recipe, compress, make_plan, pareto
from dsconv_surgery.cli.commands import app

NAMES = [field.name for field in dataclasses.fields(PlanSettings)]  # type: ignore[arg-type]
RULES_WITH_SETTING = {"energy": 0.9, "fixed": 2}


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1)).eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(1, 3, 12, 12)


@pytest.mark.parametrize("function", [make_plan, compress, pareto])
def test_every_setting_is_in_the_signature(function: Any) -> None:
    parameters = inspect.signature(function).parameters
    for field in dataclasses.fields(PlanSettings):  # type: ignore[arg-type]
        assert parameters[field.name].default == field.default
    assert not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


def test_every_setting_is_a_key_of_recipes_and_an_option_of_the_commands() -> None:
    assert set(NAMES) <= set(Recipe.schema()["properties"])
    for command in ("compress", "sweep"):
        text = CliRunner().invoke(app, [command, "--help"]).output
        for name in NAMES:
            options = ("--fractions", "--measure") if (name, command) == ("budget", "sweep") else ("--macs", "--params", "--latency")
            for option in options if name == "budget" else (f"--{name.replace('_', '-')}",):
                assert option in text, f"{command} has no {option}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0.5}, r"budget=0.5: expected a Budget. Write budget=Budget\(macs=0.5\)"),
        ({"budget": {"macs": 0.5}}, r"budget=\{'macs': 0.5\}: expected a Budget. Write budget=Budget\(macs=0.5\)"),
        (
            {"shemes": "cp"},
            r"shemes=.*: there is no such setting. Did you mean 'schemes'\?.*\(model, x, budget=",
        ),
        ({"budgets": Budget(macs=0.5)}, r"there is no such setting. Did you mean 'budget'\?"),
        ({"schemes": ()}, r"schemes=\(\): expected a scheme to choose from"),
        ({"schemes": 3}, "schemes=3: expected a scheme to choose from"),
        ({"schemes": ["chanel"]}, r"unknown scheme 'chanel'. Did you mean 'channel'\?"),
        ({"rule": "unifrom"}, r"unknown rule 'unifrom'. Did you mean 'uniform'\?"),
        ({"rule": 3}, "rule=3: expected one of budget, uniform"),
        ({"rule": "energy"}, "energy= goes with rule='energy' and only with it; found rule='energy', energy=None"),
        ({"energy": 0.9}, "energy= goes with rule='energy' and only with it; found rule='budget', energy=0.9"),
        ({"rule": "energy", "energy": 1.0}, "energy=1.0: expected a share of the squared weight norm"),
        ({"rule": "energy", "energy": "0.9"}, "energy='0.9': expected a share"),
        ({"rule": "fixed", "rank": 0}, "rank=0: expected a rank of 1 or more"),
        ({"rule": "fixed", "rank": True}, "rank=True: expected a rank of 1 or more"),
        ({"rule": "fixed", "rank": (1, 2, 3)}, r"rank=\(1, 2, 3\): expected a rank of 1 or more"),
        ({"rule": "fixed", "rank": 2, "budget": Budget(macs=0.5)}, "rule 'fixed' takes no budget"),
        ({"rule": "evbmf", "schemes": "cp"}, "rule 'evbmf' chooses ranks for tucker, but schemes are cp. Add 'tucker'"),
        ({"multiple": 0}, "multiple=0: expected a number of channels, 1 or more"),
        ({"multiple": 1.5}, "multiple=1.5: expected a number of channels"),
        ({"include": 3}, "include=3: expected pattern of layer names"),
    ],
)
def test_wrong_settings_are_refused_with_the_correct_call(settings: dict[str, Any], message: str, model: nn.Module, x: Any) -> None:
    for call in (lambda: PlanSettings(**settings), lambda: make_plan(model, x, **settings), lambda: compress(model, x, **settings)):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_misspelt_keyword_of_compress_itself(model: nn.Module, x: torch.Tensor) -> None:
    """It is compared with the settings and with the other keywords; its value, perhaps a list of images, is not printed."""
    with pytest.raises(ValueError, match=r"calibraton=: there is no such setting. Did you mean 'calibration'\?") as caught:
        compress(model, x, calibraton=[x])
    assert "tensor" not in str(caught.value)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"mac": 0.5}, r"mac=0.5: there is no such setting. Did you mean 'macs'\? Known: macs, params, latency, as in Budget\(macs=0.5\)"),
        ({"macs": 1.5}, r"macs=1.5: expected the fraction to keep, in \(0, 1\]"),
        ({"params": 0}, "params=0: expected the fraction to keep"),
        ({"latency": True}, "latency=True: expected the fraction to keep"),
        ({"macs": "0.5"}, "macs='0.5': expected the fraction to keep"),
        ({"macs": float("nan")}, "macs=nan: expected the fraction to keep"),
        ({}, "macs, params and latency are all None. Limit at least one"),
    ],
)
def test_wrong_budgets_are_refused_with_the_correct_call(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**keywords)


def test_long_input_is_cut_in_messages() -> None:
    with pytest.raises(ValueError, match="no such setting") as caught:
        PlanSettings(nothing="x" * 10_000)
    assert len(str(caught.value)) < 700


def test_one_name_stands_for_a_list_of_one_also_in_recipes() -> None:
    assert PlanSettings(schemes="cp", exclude="conv1") == PlanSettings(schemes=["cp"], exclude=("conv1",))
    assert Recipe.from_toml('schemes = "cp"\nexclude = "conv1"').schemes == ("cp",)


def test_a_budget_in_a_recipe_is_checked_as_in_python() -> None:
    with pytest.raises(ValueError, match=r"at budget.macs: Input should be less than or equal to 1, found 1.5"):
        Recipe.from_toml("[budget]\nmacs = 1.5")
    with pytest.raises(ValueError, match=r"unknown key 'mac' at budget.mac. Did you mean 'macs'\?"):
        Recipe.from_toml("[budget]\nmac = 0.5")


def test_pareto_takes_energy_and_rank_only_where_a_budget_makes_sense(model: nn.Module, x: Any) -> None:
    """They are settings like all others, so the error is the settings' error and not an unknown keyword."""
    with pytest.raises(ValueError, match="rule 'energy' takes no budget, but pareto cuts to budgets"):
        pareto(model, x, rule="energy", energy=0.9)
    with pytest.raises(ValueError, match="budget=: pareto makes its budgets from fractions="):
        pareto(model, x, budget=Budget(macs=0.5))


def test_settings_are_frozen_and_equal_by_value() -> None:
    settings = PlanSettings(budget=Budget(macs=0.5), schemes=["cp"])
    assert settings == PlanSettings(budget=Budget(macs=0.5), schemes="cp")
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.rule = "uniform"  # type: ignore[misc]


def test_the_plan_records_the_rule(model: nn.Module, x: Any) -> None:
    assert make_plan(model, x, rule="fixed", rank=2, schemes="cp").rule == "fixed rank=2"
    assert make_plan(model, x, rule="energy", energy=0.5, schemes="spatial").rule == "energy=0.5"
    assert make_plan(model, x, rule="uniform", schemes="spatial").rule == "uniform"
    assert json.loads(make_plan(model, x, budget=Budget(params=0.5)).to_json())["budget"] == {"macs": None, "params": 0.5, "latency": None}
