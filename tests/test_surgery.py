"""Cutting leaves the original unchanged, changes only the cut layers, and can be undone by fold_back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cifar import CifarResNet
from torch import Tensor, nn

from dsconv_surgery import Budget, Plan, apply_plan, compare, compress, find_convs, fold_back, make_plan
from dsconv_surgery.network.geometry import chain_cost
from dsconv_surgery.planning.tables import Choice, Option, Table
from dsconv_surgery.report import Report
from dsconv_surgery.schemes import chain_of, factorize, get_scheme, kernel_of, relative_error, scheme_names

CLOSED_FORM = ["depthwise", "pointwise_depthwise", "spatial", "channel", "bottleneck"]


class Net(nn.Module):
    """Layers for every scheme: a grouped, a dilated and a 1x1 convolution, BatchNorm, dropout, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.mid = nn.Conv2d(8, 12, 3, stride=2, padding=2, dilation=2, bias=False)
        self.point = nn.Conv2d(12, 12, 1)
        self.grouped = nn.Conv2d(12, 16, (3, 5), padding="same", groups=2, padding_mode="reflect")
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.mid(F.relu(self.bn(self.stem(x)))))
        x = F.relu(self.grouped(F.relu(self.point(x))))
        return self.head(self.drop(x.mean((2, 3))))


@pytest.fixture
def x() -> Tensor:
    return torch.rand(2, 3, 14, 12)


@pytest.fixture
def x64() -> Tensor:
    return torch.rand(2, 3, 14, 12, dtype=torch.float64)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that surgery could change: values bit for bit, objects by identity."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    return {
        "bytes": {name: t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()},
        "tensors": {n: (id(t), t.data_ptr(), t.dtype, t.shape, t.stride(), t.requires_grad, t.grad is None) for n, t in tensors.items()},
        "state": list(model.state_dict()),
        "tree": [(name, id(module), type(module), module.training) for name, module in model.named_modules(remove_duplicate=False)],
        "hooks": [(list(m._forward_hooks.values()), list(m._forward_pre_hooks.values())) for m in model.modules()],
        "repr": repr(model),
        "attributes": [sorted(vars(m)) for m in model.modules()],
    }


def relative(output: Tensor, expected: Tensor) -> float:
    output, expected = output.detach().double(), expected.detach().double()
    return float((output - expected).norm() / expected.norm())


def cut_all(model: nn.Module, x: Tensor, scheme: str) -> tuple[nn.Module, Plan]:
    plan = make_plan(model, x, rule="energy", energy=0.6, schemes=scheme, exclude=())
    assert plan.cuts, scheme
    return apply_plan(model, plan), plan


# ---- the original


@pytest.mark.parametrize("scheme", scheme_names())
def test_the_original_is_bit_identical(scheme: str, x: Tensor) -> None:
    """Planning, cutting and comparing change no weight, object, flag, hook or random state."""
    model = Net()
    model.bn.eval()
    model.mid.weight.requires_grad_(False)
    model.drop.register_forward_hook(lambda *_: None)
    before, random_state = snapshot(model), torch.get_rng_state()
    small, plan = cut_all(model, x, scheme)
    compare(model, small, x, plan=plan)
    assert torch.equal(torch.get_rng_state(), random_state)
    small(x).sum().backward()
    with torch.no_grad():
        for p in small.parameters():
            p.add_(1)
    assert snapshot(model) == before


def test_compress_and_fold_back_leave_their_argument(x: Tensor) -> None:
    model = Net().train()
    before = snapshot(model)
    small = compress(model, x, budget=Budget(macs=0.5), exclude=())
    assert snapshot(model) == before
    cut = snapshot(small.model)
    fold_back(small.model, small.plan)
    assert snapshot(small.model) == cut


def test_no_tensor_is_shared_between_original_and_result(x: Tensor) -> None:
    """Training the result cannot change the original."""
    model = Net()
    small, _ = cut_all(model, x, "channel")
    addresses = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert addresses.isdisjoint(t.data_ptr() for t in (*small.parameters(), *small.buffers()))


# ---- the result


def test_the_result_keeps_class_flags_and_hooks(x: Tensor) -> None:
    model = Net().train()
    model.bn.eval()
    model.grouped.eval()
    model.mid.weight.requires_grad_(False)
    model.stem.bias.requires_grad_(False)
    calls: list[str] = []
    model.drop.register_forward_hook(lambda *_: calls.append("drop"))
    small, plan = cut_all(model, x, "channel")
    assert [cut.name for cut in plan.cuts] == ["stem", "mid", "grouped"]
    assert type(small) is Net
    assert small.training
    assert not small.bn.training
    assert small.drop.training
    assert not any(module.training for module in small.grouped.modules())
    assert all(module.training for module in small.mid.modules())
    assert not any(p.requires_grad for p in small.mid.parameters())
    assert [p.requires_grad for _, p in sorted(small.stem.named_parameters())] == [False, True, True]  # expand.bias, weights
    assert all(p.requires_grad for p in small.grouped.parameters())
    calls.clear()
    small(x)
    assert calls == ["drop"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_result_keeps_dtype_and_device(dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    small, _ = cut_all(model, torch.rand(2, 3, 14, 12, dtype=dtype), "channel")
    assert {t.dtype for t in small.parameters()} == {dtype}
    assert {t.device for t in small.parameters()} == {torch.device("cpu")}


def test_channels_last_weights_stay_so(x: Tensor) -> None:
    """Links keep the memory format of their layer. 1x1 links have no memory format."""
    model = Net().to(memory_format=torch.channels_last)
    small, _ = cut_all(model, x, "channel")
    for weight in (small.stem.reduce.weight, small.mid.reduce.weight, small.grouped.reduce.weight):
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
    plain, _ = cut_all(Net(), x, "channel")
    assert plain.mid.reduce.weight.is_contiguous()


class Listed(nn.Module):
    """Two convolutions that the model also holds under another name, in a list, in a dict and in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.block = nn.ModuleDict({"conv": nn.Conv2d(12, 12, 3, padding=1)})
        self.same = self.block["conv"]
        self.stages = [self.first, self.same]
        self.by_name = {"pair": (self.first, self.same)}

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = F.relu(stage(x))
        return self.same(x)


def test_lists_and_aliases_hold_the_new_layer(x: Tensor) -> None:
    """Every reference to a layer becomes a reference to its chain, so nothing runs the dense layer."""
    model = Listed()
    plan = make_plan(model, x, rule="fixed", rank=3, schemes="channel", exclude=())
    small = apply_plan(model, plan)
    assert {cut.name for cut in plan.cuts} == {"first", "block.conv"}
    assert isinstance(small.first, nn.Sequential)
    assert small.stages[0] is small.first
    assert small.stages[1] is small.same is small.block["conv"] is small.by_name["pair"][1]
    assert small.by_name["pair"][0] is small.first
    assert model.stages[1] is model.same
    y = small(x)
    with torch.no_grad():
        small.same[0].weight.zero_()
        small.same[1].bias.zero_()
    assert small(x).abs().max() == 0 != y.abs().max()


def test_a_lone_layer_as_the_model(x: Tensor) -> None:
    """The model may be a convolution."""
    conv = nn.Conv2d(3, 12, 3)
    small = apply_plan(conv, make_plan(conv, x, rule="fixed", rank=2, schemes="channel"))
    assert isinstance(small, nn.Sequential)
    assert small(x).shape == conv(x).shape


# ---- numbers


@pytest.mark.parametrize("scheme", scheme_names())
def test_fold_back_computes_the_same(scheme: str, x64: Tensor) -> None:
    """The dense model has the original layer types, and the outputs of the cut one to rounding in float64."""
    model = Net().double().eval()
    small, plan = cut_all(model, x64, scheme)
    dense = fold_back(small, plan)
    assert relative(dense(x64), small(x64)) < 1e-10
    assert relative(dense(x64), model(x64)) > 1e-6  # the cut changed the outputs
    assert list(dense.state_dict()) == list(model.state_dict())
    assert [type(m) for m in dense.modules()] == [type(m) for m in model.modules()]


def test_fold_back_keeps_flags_and_layout(x: Tensor) -> None:
    model = Net().to(memory_format=torch.channels_last)
    model.mid.weight.requires_grad_(False)
    model.grouped.eval()
    small, plan = cut_all(model, x, "channel")
    dense = fold_back(small, plan)
    assert not dense.mid.weight.requires_grad
    assert dense.stem.weight.requires_grad
    assert not dense.grouped.training
    assert dense.mid.weight.is_contiguous(memory_format=torch.channels_last)


def test_fold_back_with_another_plan_is_an_error(x: Tensor) -> None:
    """Errors name the layer for another rank, another scheme and a dense layer. The model is not changed."""
    model = Net()
    small, plan = cut_all(model, x, "channel")
    before = snapshot(small)
    for wrong in (plan.replace("mid", rank=1), plan.replace("mid", scheme="spatial")):
        with pytest.raises(ValueError, match=r"mid: expected the links .*found Sequential.*Pass the plan that the model was cut by"):
            fold_back(small, wrong)
    with pytest.raises(ValueError, match=r"stem: expected the links reduce, expand of 'channel'.*found Conv2d"):
        fold_back(model, plan)
    assert snapshot(small) == before


def test_empty_init_then_load_state_dict(x: Tensor) -> None:
    """A network that was cut with empty weights takes the state_dict of a factorised one."""
    model = Net().eval()
    small, plan = cut_all(model, x, "depthwise")
    other = Net().eval()
    empty = apply_plan(other, plan, init="empty")
    assert list(empty.state_dict()) == list(small.state_dict())
    empty.load_state_dict(small.state_dict())
    assert torch.equal(empty(x), small(x))
    with pytest.raises(ValueError, match="init='zeros'"):
        apply_plan(other, plan, init="zeros")  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", [*scheme_names(), None])
def test_compress_is_plan_then_apply(scheme: str | None, x64: Tensor) -> None:
    """`compress` computes the same as its parts, and the errors in the plan are those in the report."""
    model = Net().double().eval()
    compressed = compress(model, x64, rule="energy", energy=0.7, schemes=scheme, exclude=())
    plan = make_plan(model, x64, rule="energy", energy=0.7, schemes=scheme, exclude=())
    small = apply_plan(model, plan)
    assert compressed.plan == plan
    assert relative(compressed.model(x64), small(x64)) < 1e-10
    for report in (compressed.report, compare(model, small, x64, plan=plan)):
        rows = {row.name: row for row in report.rows}
        for cut in plan.cuts:
            assert cut.error is not None
            assert rows[cut.name].error == pytest.approx(cut.error, abs=1e-8)
            assert (rows[cut.name].scheme, rows[cut.name].rank) == (cut.scheme, cut.rank)
            assert rows[cut.name].after == cut.cost_after
        assert report.before == plan.total
        assert report.after == plan.total_after


def test_the_error_is_that_of_the_weights(x64: Tensor) -> None:
    """The error is `|W - V|^2 / |W|^2`, with V measured by unit impulses through the chain."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False)).double().requires_grad_(False)
    conv = model[0]
    plan = make_plan(model, x64, rule="fixed", rank=2, schemes="channel", exclude=())
    chain = apply_plan(model, plan)
    kernel = torch.stack([chain(_impulse(3, channel, 5))[0, :, 1:4, 1:4].flip(1, 2) for channel in range(3)], 1)
    error = (conv.weight - kernel).square().sum() / conv.weight.square().sum()
    assert plan.cuts[0].error == pytest.approx(float(error), rel=1e-10)


def _impulse(channels: int, channel: int, size: int) -> Tensor:
    x = torch.zeros(1, channels, size, size, dtype=torch.float64)
    x[0, channel, size // 2, size // 2] = 1
    return x


# ---- rules and plans


@pytest.mark.parametrize("budget", [Budget(macs=0.5), Budget(params=0.45), Budget(macs=0.5, params=0.5), Budget(macs=0.3)])
def test_uniform_meets_the_budget(budget: Budget) -> None:
    """The counted cost of the cut network is within every limit, and near to at least one."""
    model, x = CifarResNet(20).eval(), torch.rand(1, 3, 32, 32)
    small = compress(model, x, budget=budget, schemes=CLOSED_FORM, rule="uniform", exclude=())
    for measure, fraction in budget.limits().items():
        assert getattr(small.report.after, measure) <= fraction * getattr(small.report.before, measure)
    used = [getattr(small.report.after, m) / (f * getattr(small.report.before, m)) for m, f in budget.limits().items()]
    assert max(used) > 0.85
    assert small.report.after.params == sum(p.numel() for p in small.model.parameters())
    assert len(small.plan.cuts) > 10


@pytest.mark.parametrize("scheme", CLOSED_FORM)
def test_energy_takes_the_lowest_rank(scheme: str, x64: Tensor) -> None:
    """Each layer keeps the energy that was asked for; the next lower rank would not."""
    model, keep = Net().double(), 0.7
    plan = make_plan(model, x64, rule="energy", energy=keep, schemes=scheme, exclude=())
    assert plan.cuts
    for cut in plan.cuts:
        weight, record = model.get_submodule(cut.name).weight, get_scheme(scheme)

        def error(rank: int, spec: Any = cut.spec, weight: Tensor = weight, record: Any = record) -> float:
            return relative_error(weight, kernel_of(record, spec, next(factorize(record, spec, weight, [rank]))))

        assert isinstance(cut.rank, int)
        assert error(cut.rank) <= 1 - keep + 1e-12
        if cut.rank > 1:
            assert error(cut.rank - 1) > 1 - keep
            assert chain_cost(chain_of(record, cut.spec, cut.rank - 1), cut.sizes).macs < cut.cost_after.macs


def test_energy_takes_the_cheapest_scheme(x64: Tensor) -> None:
    """No other closed-form scheme keeps the energy with fewer MACs."""
    model = Net().double()
    plan = make_plan(model, x64, rule="energy", energy=0.7, schemes=CLOSED_FORM, exclude=())
    for cut in plan.cuts:
        for scheme in CLOSED_FORM:
            single = {c.name: c for c in make_plan(model, x64, rule="energy", energy=0.7, schemes=scheme, exclude=()).cuts}
            if cut.name in single:
                assert cut.cost_after.macs <= single[cut.name].cost_after.macs


def test_fixed_rank_is_kernels_per_layer(x: Tensor) -> None:
    """Depthwise with rank=2: two kernels per channel, in every layer larger than 1x1."""
    model = CifarResNet(8)
    plan = make_plan(model, torch.rand(1, 3, 32, 32), rule="fixed", rank=2, schemes="depthwise", exclude=())
    small = apply_plan(model, plan)
    assert [cut.rank for cut in plan.cuts] == [2] * 7
    for cut in plan.cuts:
        link = small.get_submodule(cut.name).depthwise
        assert link.groups == link.in_channels == cut.spec.in_channels
        assert link.out_channels == 2 * link.in_channels
    assert [skip.name for skip in plan.skips] == ["linear"]


def test_fixed_pair_is_for_tucker(x: Tensor) -> None:
    """A pair, as a tuple or a list, is the ranks of Tucker."""
    model = Net()
    plan = make_plan(model, x, rule="fixed", rank=(4, 5), schemes=["tucker", "channel"], exclude=())
    assert {(cut.scheme, cut.rank) for cut in plan.cuts} == {("tucker", (4, 5))}
    assert make_plan(model, x, rule="fixed", rank=[4, 5], schemes=["tucker", "channel"], exclude=()) == plan  # type: ignore[arg-type]


def test_a_callable_rule_decides(x: Tensor) -> None:
    """It gets the tables and the allowed costs. Layers that it leaves out stay dense."""
    costs: dict[str, int] = {}

    def second_cheapest(tables: Mapping[str, Table], allowed: Mapping[str, int]) -> Choice:
        costs.update(allowed)
        choice: dict[str, Option | None] = {"mid": tables["mid"].measure(tables["mid"].options["channel"][1]), "stem": None}
        return choice

    plan = make_plan(Net(), x, rule=second_cheapest, budget=Budget(macs=0.7, params=0.9), schemes="channel", exclude=())
    assert [(cut.name, cut.scheme, cut.rank) for cut in plan.cuts] == [("mid", "channel", 2)]
    assert "callable second_cheapest" in plan.rule
    assert set(costs) == {"macs", "params"}
    assert {"stem", "grouped"} <= {skip.name for skip in plan.skips}
    assert all("second_cheapest" in skip.reason for skip in plan.skips if skip.name in ("stem", "grouped"))


def test_a_callable_rule_with_an_unknown_layer(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"chose for 'midd'.*Did you mean 'mid'"):
        make_plan(Net(), x, rule=lambda tables, _: {"midd": None}, schemes="channel", exclude=())


def test_replace_and_without(x: Tensor) -> None:
    """An edited plan is a new one that is marked as edited, and can be applied."""
    model = Net()
    plan = make_plan(model, x, rule="fixed", rank=3, schemes="channel", exclude=())
    text = plan.to_json()
    edited = plan.replace("mid", scheme="depthwise", rank=2).without("s*")
    assert plan.to_json() == text
    assert {cut.name: (cut.scheme, cut.rank, cut.error is None) for cut in edited.cuts} == {
        "mid": ("depthwise", 2, True),
        "grouped": ("channel", 3, False),
    }
    assert "edited" in edited.rule
    assert "removed from the plan by without('s*')." in {skip.reason for skip in edited.skips}
    small = apply_plan(model, edited)
    assert torch.equal(small.stem.weight, model.stem.weight)
    assert list(dict(small.mid.named_children())) == ["depthwise", "pointwise"]
    row = next(row for row in compare(model, small, x, plan=edited).rows if row.name == "mid")
    assert row.error is not None
    assert 0 < row.error < 1
    assert compare(model, small, x, plan=edited).after == edited.total_after


def test_replace_and_without_name_what_is_wrong(x: Tensor) -> None:
    plan = make_plan(Net(), x, rule="fixed", rank=3, schemes="channel", exclude="stem")
    with pytest.raises(ValueError, match=r"mod: the plan has no such cut. Did you mean 'mid'"):
        plan.replace("mod", rank=1)
    with pytest.raises(ValueError, match=r"stem: the plan has no such cut. It was skipped: excluded by 'stem'"):
        plan.replace("stem", rank=1)
    with pytest.raises(ValueError, match=r"mid: rank 99 is above the full rank 12 .*Choose 1\.\.12"):
        plan.replace("mid", rank=99)
    with pytest.raises(ValueError, match=r"unknown scheme 'chanel'. Did you mean 'channel'"):
        plan.replace("mid", scheme="chanel")
    with pytest.raises(ValueError, match=r"no cut matches the pattern 'layer\*'"):
        plan.without("mid", "layer*")
    with pytest.raises(TypeError, match=r'without: found list, expected names, as in plan\.without\("layer1\.\*", "fc"\)'):
        plan.without(["mid"])  # type: ignore[arg-type]


def test_without_several_patterns_removes_the_cuts_of_each(x: Tensor) -> None:
    plan = make_plan(Net(), x, rule="fixed", rank=3, schemes="channel", exclude=())
    edited = plan.without("mid", "s*")
    assert edited.cuts == plan.without("s*").without("mid").cuts
    assert {cut.name for cut in plan.cuts} - {cut.name for cut in edited.cuts} == {"mid", "stem"}
    reasons = {skip.name: skip.reason for skip in edited.skips}
    assert reasons["mid"] == "removed from the plan by without('mid')."
    assert reasons["stem"] == "removed from the plan by without('s*')."


@pytest.mark.parametrize("scheme", [*scheme_names(), None])
def test_a_plan_is_the_same_after_json(scheme: str | None, x: Tensor) -> None:
    plan = make_plan(Net(), x, schemes=scheme, rule="energy", energy=0.6, exclude="head")
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert json.loads(plan.to_json())["format_version"] == 1


@pytest.mark.parametrize("version", [0, 2, "1"])
def test_a_plan_of_another_format_version_is_an_error(version: Any, x: Tensor) -> None:
    """The error names both versions, even if other fields do not fit either."""
    data = json.loads(make_plan(Net(), x, schemes="channel").to_json()) | {"format_version": version}
    for changes in ({}, {"new_field": 1}, {"rule": 5}):
        with pytest.raises(ValueError, match=f"found version {version!r}, expected 1. Make the plan again with make_plan"):
            Plan.from_json(json.dumps(data | changes))


def test_a_budget_and_a_nested_input_survive_json(x: Tensor) -> None:
    plan = make_plan(Net(), x, budget=Budget(macs=0.6, params=0.7), schemes="channel")
    again = Plan.from_json(plan.to_json())
    assert again.budget == Budget(macs=0.6, params=0.7)
    assert again.input_shapes == ((2, 3, 14, 12),)


# ---- what is printed


def test_plan_and_report_show_the_totals(x: Tensor) -> None:
    """Plan, report, Markdown and JSON show the same numbers, and every layer."""
    model = Net()
    small = compress(model, x, budget=Budget(macs=0.5), schemes=CLOSED_FORM)
    report, totals = small.report, (small.plan.total, small.plan.total_after)
    assert (report.before, report.after) == totals
    numbers = [f"{getattr(cost, m):,}" for cost in totals for m in ("params", "macs")]
    for text in (str(small.plan), str(report), report.to_markdown()):
        for number in numbers:
            assert number in text
        for layer in find_convs(model, x):
            assert layer.name in text
    data = json.loads(report.to_json())
    assert data["before"] == {"params": totals[0].params, "macs": totals[0].macs, "latency": 0.0}
    assert data["after"] == {"params": totals[1].params, "macs": totals[1].macs, "latency": 0.0}
    assert Report.from_json(report.to_json()) == report
    assert f"({-100 * report.macs_saved:+.1f} %)" in str(report)
    assert report.macs_saved == pytest.approx(1 - totals[1].macs / totals[0].macs)
    assert report.params_saved == pytest.approx(1 - totals[1].params / totals[0].params)
    lines = report.to_markdown().splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1  # a table of even width


def test_compare_without_a_plan(x: Tensor) -> None:
    """Totals and rows are the same. Schemes and errors, which only a plan has, are left out."""
    model = Net()
    small = compress(model, x, budget=Budget(macs=0.5), schemes=CLOSED_FORM)
    bare = compare(model, small.model, x)
    assert (bare.before, bare.after) == (small.report.before, small.report.after)
    assert [(row.name, row.before, row.after) for row in bare.rows] == [(row.name, row.before, row.after) for row in small.report.rows]
    assert all(row.scheme is None and row.error is None for row in bare.rows)
    assert " cut " in str(bare)


def test_compare_with_another_plan_is_an_error(x: Tensor) -> None:
    model = Net()
    small, plan = cut_all(model, x, "channel")
    with pytest.raises(ValueError, match=r"mid: expected the links reduce, expand of 'channel' at rank 1"):
        compare(model, small, x, plan=plan.replace("mid", rank=1))


def test_latency_has_its_settings(x: Tensor) -> None:
    """A latency has the conditions of its measurement, in text and JSON. Training flags do not change."""
    torch.set_num_threads(1)
    model = Net().train()
    model.bn.eval()
    small, plan = cut_all(model, x, "channel")
    before = snapshot(model)
    report = compare(model, small, x.to(memory_format=torch.channels_last), plan=plan, latency=True)
    t = report.latency
    assert t is not None
    c = t.conditions
    assert (c.threads, c.batch, c.dtype, c.device, c.memory_format) == (1, 2, "float32", "cpu", "channels_last")
    assert t.rounds >= 5
    assert t.before > 0
    assert t.after > 0
    assert f"fastest quarter of at least {t.rounds} rounds, batch 2, 1 threads, float32, channels_last, cpu" in str(report)
    assert Report.from_json(report.to_json()) == report
    assert snapshot(model) == before
    assert compare(model, small, x, plan=plan).latency is None


def test_macs_are_those_of_the_definition(x: Tensor) -> None:
    """MACs are `taps * in / groups * out * output pixels * batch`."""
    site = {layer.name: layer for layer in find_convs(Net(), x)}["mid"]
    height, width = (math.floor((n + 4 - 4 - 1) / 2) + 1 for n in (14, 12))
    assert site.cost.macs == 9 * 8 * 12 * height * width * 2  # type: ignore[union-attr]
