"""A plan depends neither on what the cache holds nor on the plans made before it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dsconv_surgery import Budget, make_plan
from dsconv_surgery.calibration.images import Images
from dsconv_surgery.plan import Plan
from dsconv_surgery.planning.planner import Planner
from dsconv_surgery.planning.settings import PlanSettings
from dsconv_surgery.support.inputs import Inputs

SCHEMES = ["cp", "bottleneck"]


def a_network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2, bias=False), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()


def some_images() -> Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def plan_with(cache: Path | bool, images: Tensor | None, macs: float = 0.5, schemes: list[str] | None = None) -> Plan:
    calibration = None if images is None else [images]
    return make_plan(
        a_network(),
        torch.rand(1, 3, 8, 8),
        calibration=calibration,
        cache=cache,
        budget=Budget(macs=macs),
        schemes=schemes or SCHEMES,
        exclude=(),
    )


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.json"))


@pytest.fixture(scope="module", params=[True, False], ids=["images", "weights"])
def planned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path, Tensor | None]:
    """A plan, the cache that it filled, and its images or None."""
    folder, batch = tmp_path_factory.mktemp("full"), some_images() if request.param else None
    return plan_with(folder, batch), folder, batch


def test_plans_with_parts_of_a_cache_are_equal(planned: tuple[Plan, Path, Tensor | None]) -> None:
    plan, folder, batch = planned
    assert plan.cuts
    everything = {path: path.read_bytes() for path in entries(folder)}
    kinds = {path.parent.name for path in everything}
    assert kinds >= ({"outputs", "gain", "damage"} if plan.calibrated else {"weights"})
    assert plan_with(folder, batch) == plan == plan_with(False, batch)
    halves = [random.Random(seed).sample(sorted(everything), len(everything) // 2) for seed in range(2)]
    for lost in (*halves, *([path for path in everything if path.parent.name == kind] for kind in sorted(kinds))):
        for path in lost:
            path.unlink()
        assert plan_with(folder, batch) == plan, lost
        assert {path: path.read_bytes() for path in entries(folder)} == everything, lost


def test_plans_do_not_depend_on_entries_of_other_plans(tmp_path: Path) -> None:
    images = some_images()
    orders = [[0.7, 0.4], [0.4, 0.7]]
    results = [{macs: plan_with(tmp_path / str(index), images, macs) for macs in order} for index, order in enumerate(orders)]
    assert results[0] == results[1]
    plan_with(tmp_path / "other", images, schemes=["channel", "cp"])  # other schemes are measured and left out
    assert plan_with(tmp_path / "other", images, 0.4) == results[0][0.4]


def test_plans_of_one_planner_do_not_depend_on_their_order() -> None:
    example = torch.rand(1, 3, 8, 8)
    results = []
    for order in ((0.8, 0.7, 0.6, 0.5, 0.4), (0.4, 0.5, 0.6, 0.7, 0.8)):
        loaded = Images([some_images()], Inputs(example))
        settings = PlanSettings(budget=Budget(macs=0.7), schemes=SCHEMES)
        planner = Planner(a_network(), Inputs(example), settings, loaded, cache=False)
        results.append({macs: planner.plan(Budget(macs=macs))[0] for macs in order})
    assert results[0] == results[1]
