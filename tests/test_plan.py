"""Plans as data: edits, and the difference of two."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dsconv_surgery import Plan, make_plan

X = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def make_model(width: int = 16) -> nn.Module:
    block = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)).eval()


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(make_model(), X, rule="fixed", rank=4, schemes=["channel", "bottleneck"], exclude=())


def test_a_name_in_without_means_everything_below_it(plan: Plan) -> None:
    assert [cut.name for cut in plan.cuts] == ["0", "2.0", "2.2", "5"]
    assert [cut.name for cut in plan.without("2").cuts] == ["0", "5"]
    assert [cut.name for cut in plan.without("2.*", "0").cuts] == ["5"]
    with pytest.raises(
        ValueError, match=r"no cut matches the pattern '2.1'. Did you mean '2.\d'\? A pattern is a layer's name, which also"
    ):
        plan.without("2.1")


def test_replace_without_a_rank_keeps_the_number_or_says_that_it_did(plan: Plan) -> None:
    assert next(cut for cut in plan.replace("2.0", scheme="cp").cuts if cut.name == "2.0").rank == 4
    message = r"has a pair of ranks, found 4.* rank= was not given, so the rank 4 of channel was kept. Pass rank=, too"
    with pytest.raises(ValueError, match=message):
        plan.replace("2.0", scheme="tucker")
    with pytest.raises(ValueError, match="rank 999 is above") as caught:
        plan.replace("2.0", scheme="cp_split", rank=999)
    assert "was not given" not in str(caught.value)


def test_diff_lists_the_layers_that_differ(plan: Plan) -> None:
    other = plan.replace("2.0", scheme="tucker", rank=(3, 5)).without("5")
    difference = plan.diff(other)
    assert difference.names == ("2.0", "5")
    rows = {row[0]: row[1:] for row in difference.table().rows}
    cuts = {name: next(cut for cut in p.cuts if cut.name == "2.0").cost_after for name, p in (("plan", plan), ("other", other))}
    assert rows["2.0"][:2] == ("channel 4", "tucker (3, 5)")
    assert rows["2.0"][2:] == (f"{cuts['plan'].params:,}", f"{cuts['other'].params:,}", f"{cuts['plan'].macs:,}", f"{cuts['other'].macs:,}")
    assert rows["5"][:2] == ("bottleneck 4", "dense")
    assert rows["5"][3] == "170"  # the dense layer's parameters
    assert rows["whole network"][4:] == (f"{plan.total_after.macs:,}", f"{other.total_after.macs:,}")
    assert "2 of 4 layers with a cut differ" in str(difference)
    assert other.diff(plan).names == ("2.0", "5")
    assert plan.diff(Plan.from_json(plan.to_json())).names == ()


def test_plans_of_different_networks_are_not_compared(plan: Plan) -> None:
    wide = make_plan(make_model(32), X, rule="fixed", rank=4, schemes="channel")
    with pytest.raises(ValueError, match="the plans are of different networks or inputs: parameters and MACs are"):
        plan.diff(wide)
    small = make_plan(nn.Sequential(nn.Conv2d(3, 8, 3)), X, rule="fixed", rank=2, schemes="channel")
    with pytest.raises(ValueError, match=r"only one of them has 2.0, 2.2, 5. Compare plans of one network"):
        plan.diff(small)
    with pytest.raises(TypeError, match="diff: found str, expected another Plan"):
        plan.diff("plan")  # type: ignore[arg-type]
