"""Random networks are cut correctly or refused: 60 in the normal tests, 1,000 with `pytest -m slow`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import random_network_checks
import torch
from random_network_checks import check, difference, is_calibrated, run
from random_networks import BLOCKS, DEFAULTS, NETWORKS, OUTPUTS, Description, describe, make_case
from torch import nn

from dsconv_surgery import Plan, apply_plan

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own
NETWORKS_PER_TEST = 10
FEW, MANY = 60, 1000


def failures(first: int, count: int) -> list[str]:
    """What does not hold, one line for each failure."""
    torch.set_num_threads(1)  # small networks are faster so
    return [f"seed {seed}: {f.check}: {f.message}\n{f.trace}" for seed in range(first, first + count) for f in check(describe(seed))]


@pytest.mark.parametrize("first", range(0, FEW, NETWORKS_PER_TEST))
def test_random_networks(first: int) -> None:
    assert failures(first, NETWORKS_PER_TEST) == []


@pytest.mark.slow
@pytest.mark.parametrize("first", range(FEW, MANY, 20))
def test_many_random_networks(first: int) -> None:
    assert failures(first, 20) == []


def test_the_generator_draws_everything() -> None:
    """Each block, kind of input and kind of output occurs, and 40 % of the networks are calibrated."""
    descriptions = [describe(seed) for seed in range(MANY)]
    assert {kind for d in descriptions for kind, _ in d.blocks} == set(BLOCKS)
    for feature, values in {"inputs": set(NETWORKS), "output": set(OUTPUTS), "graph_module": {True, False}}.items():
        assert {d.features[feature] for d in descriptions} == values
    assert sum(map(is_calibrated, descriptions)) >= 380
    assert all(set(d.features) == set(DEFAULTS) for d in descriptions)


def test_a_description_always_gives_the_same_network() -> None:
    for seed in range(5):
        cases = [make_case(describe(seed)) for _ in range(2)]
        outputs = [run(case.build(3), case.inputs) for case in cases]
        assert difference(*outputs) == 0


def shift_outputs(model: nn.Module, cut: nn.Module, plan: Plan) -> None:
    for planned in plan.cuts:
        list(cut.get_submodule(planned.name))[-1].weight.data.mul_(1.01)


def change_other_layers(model: nn.Module, cut: nn.Module, plan: Plan) -> None:
    cut.blocks[0].norm.weight.data.mul_(1.01)


def freeze(model: nn.Module, cut: nn.Module, plan: Plan) -> None:
    cut.requires_grad_(False)
    cut.blocks[0].norm.requires_grad_(True)


def change_the_dense_network(model: nn.Module, cut: nn.Module, plan: Plan) -> None:
    model.blocks[0].norm.weight.data.mul_(1.01)


def add_parameters(model: nn.Module, cut: nn.Module, plan: Plan) -> None:
    cut.extra = nn.Parameter(torch.ones(1))


FAULTS = {
    shift_outputs: "outputs differ from the dense network's",
    change_other_layers: "values of other layers changed",
    freeze: "no gradient",
    change_the_dense_network: "the dense model changed",
    add_parameters: "cut params",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_checks_notice_faults(fault: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(model: nn.Module, plan: Plan, *inputs: Any, **settings: Any) -> nn.Module:
        cut = apply_plan(model, plan, *inputs, **settings)
        fault(model, cut, plan)
        return cut

    description = next(d for d in map(describe, range(MANY)) if suits(d))
    assert check(description, calibrated=False) == []
    monkeypatch.setattr(random_network_checks, "apply_plan", faulty)
    assert FAULTS[fault] in " ".join(failure.message for failure in check(description, calibrated=False))


def suits(description: Description) -> bool:
    """Whether a network begins with a unit that has a BatchNorm, and is simple otherwise."""
    simple = all(description.features[name] == DEFAULTS[name] for name in ("graph_module", "frozen", "refused", "training", "inputs"))
    network = make_case(replace(description, features=DEFAULTS)).build(0)
    return simple and isinstance(getattr(network.blocks[0], "norm", None), nn.BatchNorm2d) and {k for k, _ in description.blocks} <= SIMPLE


SIMPLE = {"unit", "residual", "branches", "separable"}
