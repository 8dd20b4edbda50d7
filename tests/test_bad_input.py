"""Wrong input is an error that says what to do; unusual input works. The model is never changed."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from dsconv_surgery import Budget, Inputs, Plan, apply_plan, compare, compress, find_convs, fine_tune, fold_back, make_plan, pareto, plain
from dsconv_surgery.network.discovery import ConvSite, Skip
from dsconv_surgery.schemes import scheme_names
from dsconv_surgery.support.formatting import as_sentence


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.Conv2d(12, 8, 1))


@pytest.fixture
def x() -> Tensor:
    return torch.rand(2, 3, 9, 7)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Weights bit for bit (NaN included), and the module tree by identity."""
    tensors = {name: t for name, t in (*model.named_parameters(), *model.named_buffers()) if not nn.parameter.is_lazy(t)}
    return {
        "bytes": {n: t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in tensors.items() if not t.is_meta},
        "tensors": {n: (id(t), t.dtype, t.shape, t.requires_grad, t.device) for n, t in tensors.items()},
        "tree": [(name, id(m), type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()],
        "repr": repr(model),
    }


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    before = snapshot(model)
    yield
    assert snapshot(model) == before


def reasons(model: nn.Module, *inputs: Any) -> dict[str, str]:
    """The reason for every skip."""
    return {layer.name: layer.reason for layer in find_convs(model, *inputs) if isinstance(layer, Skip)}


def cuts_elsewhere(model: nn.Module, x: Tensor, left: str) -> None:
    """The layer `left` stays, at least one other is cut, the network runs, and the model is not changed."""
    model.eval()
    dense = model(x)
    with unchanged(model):
        small = compress(model, x, rule="fixed", rank=2, exclude=())
        assert left in {skip.name for skip in small.plan.skips}
        assert small.plan.cuts
        assert small.model(x).shape == dense.shape
        assert type(small.model.get_submodule(left)) is type(model.get_submodule(left))
        exact = compress(model, x, rule="energy", energy=1 - 1e-9, exclude=())  # almost exact, so the outputs must agree
    assert torch.allclose(exact.model(x), dense, atol=1e-3)


# ---- weights


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(value: float, x: Tensor) -> None:
    """The error names the layer and counts the weights. An excluded layer is no error."""
    model = net()
    with torch.no_grad():
        model[2].weight[3, 2, 1, 1] = value
    plan = make_plan(net(), x, rule="fixed", rank=2, schemes="channel", exclude=())
    with unchanged(model):
        for attempt in (lambda: make_plan(model, x, exclude=()), lambda: compress(model, x, exclude=()), lambda: apply_plan(model, plan)):
            with pytest.raises(ValueError, match=r"2: 1 of 864 weights are NaN or infinite. Repair them, or exclude the layer"):
                attempt()
        assert {cut.name for cut in make_plan(model, x, rule="fixed", rank=1, schemes="channel", exclude="2").cuts} == {"0"}


@pytest.mark.parametrize("scheme", scheme_names())
def test_weights_that_are_all_zero(scheme: str, x: Tensor) -> None:
    """The factors are zero and the errors are zero, so only the bias is left."""
    model = net().eval()
    with torch.no_grad():
        for layer in (model[0], model[2], model[3]):
            layer.weight.zero_()
    with unchanged(model):
        small = compress(model, x, schemes=scheme, rule="fixed", rank=(2, 2) if scheme == "tucker" else 2, exclude=())
        assert small.plan.cuts
        assert all(cut.error == 0 for cut in small.plan.cuts)
        assert all(bool(p.isfinite().all()) for p in small.model.parameters())
        assert torch.equal(small.model(x), model(x))
        assert {row.error for row in small.report.rows if row.scheme} == {0.0}
        assert compress(model, x, schemes=scheme, rule="energy", energy=0.9, exclude=()).plan.cuts


def test_a_convolution_without_channels(x: Tensor) -> None:
    """It is a skip; the other layer is cut."""

    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch warns that there is nothing to initialise
                self.none = nn.Conv2d(0, 4, 3, padding=1)
            self.some = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.some(x)

    model = Empty()
    assert "no weights" in reasons(model, x)["none"]
    with unchanged(model):
        small = compress(model, x, rule="fixed", rank=2, schemes="channel")
    assert [cut.name for cut in small.plan.cuts] == ["some"]
    assert small.model(x).shape == (2, 8, 9, 7)


# ---- ranks, schemes, rules, budgets, patterns


@pytest.mark.parametrize("rank", [0, -1, True, 2.0, "2", (2,), (2, 0), (True, 2), (1, 2, 3)])
def test_invalid_ranks(rank: Any, x: Tensor) -> None:
    model = net()
    with unchanged(model), pytest.raises(ValueError, match=r"rank=.*: expected a rank of 1 or more for rule fixed, or a pair"):
        make_plan(model, x, rule="fixed", rank=rank)


def test_a_rank_above_the_full_one(x: Tensor) -> None:
    """For a rule, a layer without this rank is a skip. In an edited plan or in JSON it is an error with the range."""
    model = net()
    with unchanged(model):
        plan = make_plan(model, x, rule="fixed", rank=1000, exclude=())
        assert not plan.cuts
        assert all("fixed rank=1000" in skip.reason for skip in plan.skips)
    plan = make_plan(model, x, rule="fixed", rank=2, schemes="channel", exclude=())
    for rank, message in [(13, r"2: rank 13 is above the full rank 12 .*Choose 1\.\.12"), (0, "2: rank 0 is below 1")]:
        with pytest.raises(ValueError, match=message):
            plan.replace("2", rank=rank)
    for wrong in (True, 2.0, (2, 2)):
        with pytest.raises(ValueError, match="2: 'channel' has one rank, found"):
            plan.replace("2", rank=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"2: rank \(9, 12\) is outside \(1\.\.8, 1\.\.12\) of 'tucker'"):
        plan.replace("2", scheme="tucker", rank=(9, 12))
    with pytest.raises(ValueError, match=r"has a pair of ranks, found 2. Choose \(1\.\.8, 1\.\.12\)"):
        plan.replace("2", scheme="tucker")
    data = json.loads(plan.to_json())
    data["cuts"][1]["rank"] = 13
    with pytest.raises(ValueError, match=r"plan: at cuts\.1: 2: rank 13 is above the full rank 12"):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("rank", [2.5, "ab", (True, 2), (1.5, 2)])
def test_a_pair_of_ranks_of_the_wrong_kind(rank: Any, x: Tensor) -> None:
    plan = make_plan(net(), x, rule="fixed", rank=(2, 2), schemes="tucker")
    with pytest.raises(ValueError, match="pair of ranks"):
        plan.replace("2", rank=rank)


def test_an_unknown_scheme_names_the_nearest(x: Tensor) -> None:
    model = net()
    with unchanged(model):
        for attempt in (make_plan, compress):
            with pytest.raises(ValueError, match=r"unknown scheme 'depthwize'. Did you mean 'depthwise'"):
                attempt(model, x, schemes=["channel", "depthwize"])
        with pytest.raises(ValueError, match=r"unknown scheme 'xyz'. Known: depthwise, "):
            make_plan(model, x, schemes="xyz")


def test_no_schemes_at_all(x: Tensor) -> None:
    model = net()
    with unchanged(model), pytest.raises(ValueError, match=r"schemes=\[\]: expected a scheme to choose from"):
        make_plan(model, x, schemes=[])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["cuts"][0].update(rnak=3), r"plan: unknown key 'rnak' at cuts\.0\.rnak. Did you mean 'rank'"),
        (lambda d: d.update(skip=[]), "plan: unknown key 'skip' at skip. Did you mean 'skips'"),
        (lambda d: d["cuts"][0]["spec"].update(pading=[1, 1]), "unknown key 'pading' .*Did you mean 'padding'"),
        (lambda d: d["cuts"][0].pop("scheme"), r"plan: at cuts\.0\.scheme"),
        (lambda d: d["cuts"][0].update(scheme="chanel"), "unknown scheme 'chanel'. Did you mean 'channel'"),
        (lambda d: d["cuts"][0].update(rank="two"), r"plan: at cuts\.0\.rank"),
        (lambda d: d.update(budget={"macs": 2}), "plan: at budget.macs: Input should be less than or equal to 1, found 2"),
    ],
)
def test_a_plan_with_a_mistake_in_its_json(edit: Any, message: str, x: Tensor) -> None:
    data = json.loads(make_plan(net(), x, rule="fixed", rank=2, schemes="channel").to_json())
    edit(data)
    with pytest.raises(ValueError, match=message):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "null", "[]", b"\xff\xfe", "{} trailing"])
def test_a_plan_that_is_no_json(text: Any) -> None:
    with pytest.raises(ValueError, match=r"^plan: at "):
        Plan.from_json(text)


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5, math.nan, math.inf, True, "0.5"])
@pytest.mark.parametrize("measure", ["macs", "params"])
def test_a_budget_that_is_no_fraction(measure: str, fraction: Any) -> None:
    with pytest.raises(ValueError, match=rf"{measure}=.*: expected the fraction to keep, in \(0, 1\]"):
        Budget(**{measure: fraction})


def test_a_budget_of_nothing() -> None:
    with pytest.raises(ValueError, match="macs, params and latency are all None"):
        Budget()


@pytest.mark.parametrize("measures", [("macs",), ("params",), ("macs", "params")])
@pytest.mark.parametrize("seed", range(4))
def test_a_budget_out_of_reach_names_one_within(measures: tuple[str, ...], seed: int, x: Tensor) -> None:
    """The fractions in the error can be reached. Smaller ones cannot."""
    model = nn.Sequential(net(), nn.Flatten(), nn.Linear(8 * 63, 5 + seed))
    with unchanged(model):
        with pytest.raises(ValueError, match=r"is out of reach.*Raise the budget") as caught:
            make_plan(model, x, budget=Budget(**dict.fromkeys(measures, 0.001)), exclude="2")
        named = {measure: float(value) for measure, value in re.findall(r"(macs|params)=([\d.]+)", str(caught.value).split("keeps")[1])}
        assert set(named) == set(measures)
        plan = make_plan(model, x, budget=Budget(**named), exclude="2")
        for measure, fraction in named.items():
            assert getattr(plan.total_after, measure) <= fraction * getattr(plan.total, measure)
        for measure, fraction in named.items():
            with pytest.raises(ValueError, match="is out of reach"):
                make_plan(model, x, budget=Budget(**{**named, measure: fraction - 0.001}), exclude="2")


def test_a_budget_where_nothing_can_be_cut() -> None:
    """Only 1.0 can be reached."""
    model, x = nn.Sequential(nn.Conv2d(1, 1, 1)), torch.rand(1, 1, 4, 4)
    with pytest.raises(ValueError, match=r"keeps macs=1.0 \(0 layers can be cut\)"):
        make_plan(model, x)
    assert not make_plan(model, x, budget=Budget(macs=1.0)).cuts


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_patterns_that_match_nothing(key: str, x: Tensor) -> None:
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(3, 8, 3))
    with unchanged(model):
        with pytest.raises(ValueError, match=f"{key}: no layer matches 'sten'. Did you mean 'stem'"):
            make_plan(model, x, **{key: "sten"})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"{key}: no layer matches 'conv*"):
            make_plan(model, x, **{key: ["stem", "conv*"]})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "uniforn"}, "unknown rule 'uniforn'. Did you mean 'uniform'"),
        ({"rule": "energy"}, "energy= goes with rule='energy'"),
        ({"rule": "fixed"}, "rank= goes with rule='fixed'"),
        ({"energy": 0.9}, "energy= goes with rule='energy' and only with it"),
        ({"rank": 2}, "rank= goes with rule='fixed' and only with it"),
        ({"rule": "fixed", "rank": 2, "energy": 0.9}, "energy= goes with rule='energy' and only with it"),
        ({"rule": "energy", "energy": 1.0}, "expected a share of the squared weight norm"),
        ({"rule": "energy", "energy": 0}, "expected a share of the squared weight norm"),
        ({"rule": "energy", "energy": math.nan}, "expected a share of the squared weight norm"),
        ({"rule": "energy", "energy": "0.9"}, "expected a share of the squared weight norm"),
        ({"rule": "energy", "energy": 0.9, "budget": Budget(macs=0.5)}, "rule 'energy' takes no budget"),
        ({"rule": "fixed", "rank": 2, "budget": Budget(macs=0.5)}, "rule 'fixed' takes no budget"),
    ],
)
def test_settings_that_do_not_fit_each_other(settings: dict[str, Any], message: str, x: Tensor) -> None:
    model = net()
    with unchanged(model):
        for attempt in (make_plan, compress):
            with pytest.raises(ValueError, match=message):
                attempt(model, x, **settings)


# ---- plans and networks that do not fit each other


def test_a_plan_for_another_network(x: Tensor) -> None:
    """The error lists every mismatch, of changed and missing layers."""
    plan = make_plan(net(), x, rule="fixed", rank=2, schemes="channel", exclude=())
    other = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU())
    with unchanged(other):
        with pytest.raises(ValueError, match="made for another network") as caught:
            apply_plan(other, plan)
        message = str(caught.value)
        assert "0: expected 3x3 3 -> 8, padding 1x1, bias, found 5x5 3 -> 8, padding 2x2, bias." in message
        assert "2: expected 3x3 8 -> 12, padding 1x1, found no such layer." in message
        assert "make_plan" in message
        with pytest.raises(ValueError, match="not cut by this plan"):
            fold_back(other, plan)


def test_a_plan_for_another_network_names_the_nearest_layer(x: Tensor) -> None:
    model, other = nn.Sequential(), nn.Sequential()
    model.add_module("conv_one", nn.Conv2d(3, 8, 3))
    other.add_module("conv_two", nn.Conv2d(3, 8, 3))
    plan = make_plan(model, x, rule="fixed", rank=2, schemes="channel")
    with pytest.raises(ValueError, match=r"conv_one: .*no such layer. Did you mean 'conv_two'"):
        apply_plan(other, plan)


def _swap(model: nn.Sequential) -> None:
    model[2] = nn.Conv2d(8, 12, 3, padding=1, stride=2, bias=False)


def _subclass(model: nn.Sequential) -> None:
    model[2].__class__ = Doubled


def _parametrize(model: nn.Sequential) -> None:
    parametrizations.weight_norm(model[2])


def _more_groups(model: nn.Sequential) -> None:
    model[2] = nn.Conv2d(8, 12, 3, padding=1, groups=2, bias=False)


def _cut_already(model: nn.Sequential) -> None:
    model[2] = nn.Sequential(nn.Conv2d(8, 2, 3, padding=1, bias=False), nn.Conv2d(2, 12, 1, bias=False))


@pytest.mark.parametrize("change", [_swap, _subclass, _parametrize, _more_groups, _cut_already])
def test_a_layer_changed_after_planning(change: Any, x: Tensor) -> None:
    model = net()
    plan = make_plan(model, x, rule="fixed", rank=2, schemes="channel", exclude=())
    change(model)
    with unchanged(model), pytest.raises(ValueError, match=r"made for another network. 2: expected 3x3 8 -> 12, padding 1x1, found"):
        apply_plan(model, plan)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("what", ["weight_norm", "hook", "tied"])
def test_a_layer_made_special_after_planning(what: str, x: Tensor) -> None:
    """Cutting would lose the weight norm, the hook or the tie, so it is an error."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    plan = make_plan(model, x, rule="fixed", rank=2, schemes="channel", exclude=())
    if what == "weight_norm":
        nn.utils.weight_norm(model[1])
    elif what == "hook":
        model[1].register_forward_hook(lambda *_: None)
    else:
        model[1].weight = model[2].weight
    with unchanged(model), pytest.raises(ValueError, match=r"1: expected 3x3 8 -> 8, bias, found a layer that cannot be cut: its? "):
        apply_plan(model, plan)


# ---- wrapped models, inputs, devices, precisions


@contextmanager
def _process_group(folder: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _refused(wrapped: nn.Module, x: Tensor, message: str) -> None:
    plan = make_plan(net(), x, rule="fixed", rank=2, schemes="channel")
    for attempt in (
        lambda: find_convs(wrapped, x),
        lambda: make_plan(wrapped, x),
        lambda: compress(wrapped, x),
        lambda: apply_plan(wrapped, plan),
        lambda: fold_back(wrapped, plan),
        lambda: compare(wrapped, wrapped, x),
    ):
        with pytest.raises(TypeError, match=message):
            attempt()


def test_a_distributed_model(x: Tensor, tmp_path: Path) -> None:
    """One process with gloo."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    with _process_group(tmp_path):
        wrapped = nn.parallel.DistributedDataParallel(net())
        with unchanged(wrapped):
            _refused(
                wrapped, x, r"model: expected a plain module, found DistributedDataParallel. Pass `model.module`, then wrap the result"
            )
        assert compress(wrapped.module, x).plan.cuts
        del wrapped


def test_a_data_parallel_model(x: Tensor) -> None:
    wrapped = nn.DataParallel(net())
    with unchanged(wrapped):
        _refused(wrapped, x, "model: expected a plain module, found DataParallel. Pass `model.module`, then wrap the result")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own warning
def test_a_compiled_model(x: Tensor) -> None:
    wrapped: Any = torch.compile(net())
    _refused(
        wrapped, x, r"model: expected a plain module, found OptimizedModule. Pass the model from before torch.compile .*model._orig_mod"
    )
    assert compress(wrapped._orig_mod, x).plan.cuts
    _refused(nn.Sequential(wrapped), x, "^0: expected a plain module, found OptimizedModule")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_model(x: Tensor) -> None:
    """The whole model or a part of it."""
    wrapped = torch.jit.script(net())
    _refused(wrapped, x, "model: expected a plain module, found ScriptModule. Pass the eager model, then script the result")
    _refused(nn.Sequential(wrapped), x, "0: expected a plain module, found ScriptModule")


@pytest.mark.parametrize(
    ("package", "name", "remedy"),
    [
        ("ultralytics.engine.model", "Model", "yolo.model"),
        ("lightning.fabric.wrappers", "_FabricModule", "model.module"),
        ("lightning_fabric.wrappers", "_FabricModule", "model.module"),
    ],
)
def test_wrappers_of_other_libraries(x: Tensor, package: str, name: str, remedy: str) -> None:
    """Subclasses, too, but no other class of that name or that package."""
    kind = type(name, (nn.Sequential,), {"__module__": package})
    for wrapper in (kind, type("YOLO", (kind,), {})):
        _refused(wrapper(net()), x, rf"model: expected a plain module, found {name}\. Pass .*`{remedy}`")
        _refused(nn.Sequential(wrapper(net())), x, f"^0: expected a plain module, found {name}")
    for other in (type(name, (nn.Sequential,), {"__module__": "models"}), type("Other", (nn.Sequential,), {"__module__": package})):
        assert compress(other(net()), x).plan.cuts


@pytest.mark.parametrize("model", [None, "resnet18", nn.Conv2d, torch.rand(3), lambda x: x])
def test_not_a_module(model: Any, x: Tensor) -> None:
    for attempt in (lambda: find_convs(model, x), lambda: make_plan(model, x), lambda: compress(model, x)):
        with pytest.raises(TypeError, match=r"expected an nn.Module, found "):
            attempt()


@pytest.mark.parametrize(
    ("inputs", "description"),
    [
        ((), "no tensors"),
        ((torch.rand(2, 4, 9, 7),), r"\(2, 4, 9, 7\) torch.float32 on cpu"),
        ((torch.rand(5),), r"\(5,\)"),
        ((torch.rand(2, 3, 9, 7, dtype=torch.float64),), "torch.float64"),
        (("image",), "no tensors"),
    ],
)
def test_example_inputs_that_do_not_fit(inputs: tuple[Any, ...], description: str) -> None:
    """The error describes the inputs and has torch's message."""
    model = net()
    with unchanged(model):
        for attempt in (find_convs, make_plan, compress):
            with pytest.raises(ValueError, match=f"(?s)does not run on the example inputs.*{description}.*Pass inputs for which"):
                attempt(model, *inputs)


@pytest.mark.parametrize("calibrated", [False, True])
def test_swapped_and_wrapped_networks(calibrated: bool, x: Tensor) -> None:
    """The network is looked at before its inputs and before batches."""
    model, batches = net(), {"calibration": [torch.rand(4, 3, 9, 7)]} if calibrated else {}
    plan = make_plan(model, x, rule="fixed", rank=2, schemes="channel", exclude=())
    for attempt in (make_plan, compress, pareto):
        with pytest.raises(TypeError, match=r"example inputs: found the network Sequential.*Pass the network first"):
            attempt(x, model, **batches)
    small = compress(model, x, budget=Budget(macs=0.8), schemes="channel", exclude=())
    for call in (
        lambda: compress(small, x, **batches, exclude=()),
        lambda: pareto(small, x, **batches, exclude=()),
        lambda: apply_plan(small, plan, x, **batches),
        lambda: compare(small, model, x),
        lambda: compare(model, small, x),
        lambda: find_convs(small, x),
        lambda: fold_back(small, plan),
        lambda: plain(small),
        lambda: fine_tune(small, [x], teacher=model),
        lambda: fine_tune(model, [x], teacher=small),
    ):
        with pytest.raises(TypeError, match=r"(model|before|after|teacher): expected an nn.Module, found Compressed\. Pass its \.model\."):
            call()


@pytest.mark.parametrize(
    ("inputs", "keywords", "message"),
    [
        (((),), {"input": torch.rand(1, 3, 9, 7)}, r"Leave out the \(\) before example_kwargs="),
        ((None,), {"input": torch.rand(1, 3, 9, 7)}, "Leave out the None before example_kwargs="),
        (((torch.rand(1, 3, 9, 7),),), None, r"Pass x, not \(x,\)"),
        (([torch.rand(1, 3, 9, 7)],), None, r"Pass x, not \[x\]"),
        ((), {"pixels": torch.rand(1, 3, 9, 7)}, "pixels"),
        ((torch.rand(1, 4, 9, 7),), None, "channels"),
    ],
)
def test_example_inputs_are_looked_at_before_batches(inputs: tuple[Any, ...], keywords: Any, message: str) -> None:
    batches = [torch.rand(4, 3, 9, 7)]
    plan = make_plan(net(), torch.rand(1, 3, 9, 7), rule="fixed", rank=2, schemes="channel")
    for call in (
        lambda: find_convs(net(), *inputs, example_kwargs=keywords),
        lambda: compress(net(), *inputs, example_kwargs=keywords, calibration=batches),
        lambda: pareto(net(), *inputs, example_kwargs=keywords, data=batches),
        lambda: apply_plan(net(), plan, *inputs, example_kwargs=keywords, calibration=batches),
        lambda: compare(net(), net(), *inputs, example_kwargs=keywords, data=batches),
    ):
        with pytest.raises(ValueError, match=f"(?s)does not run on the example inputs.*{message}") as caught:
            call()
        assert re.search(r"[.!?] (Pass|Leave)", str(caught.value))  # torch's error ends before the remedy begins


def test_a_list_for_a_tensor_where_batches_are_tensors() -> None:
    with pytest.raises(ValueError, match=r"(?s)does not run on the example inputs .*Pass x, not \(x,\)"):
        make_plan(net(), (torch.rand(1, 3, 9, 7),), calibration=[torch.rand(4, 3, 9, 7)])


def test_inputs_as_the_example_input(x: Tensor) -> None:
    """An `Inputs` is the arguments that it holds."""
    model = net().eval()
    expected = compress(model, x, budget=Budget(macs=0.5), schemes="channel", exclude=()).plan
    assert compress(model, Inputs(x), budget=Budget(macs=0.5), schemes="channel", exclude=()).plan == expected
    assert len(find_convs(model, Inputs(input=x))) == 3
    assert len(find_convs(model, Inputs(), example_kwargs={"input": x})) == 3


def test_reasons_name_a_remedy_once(x: Tensor) -> None:
    model = net()
    parametrizations.weight_norm(model[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model[2])
    parametrizations.weight_norm(model[3])
    with pytest.raises(
        ValueError, match=r"can be cut\. 2 x: its weight is parametrised\. 1 x: .* Call dsconv_surgery.plain\(model\) first\.$"
    ) as caught:
        make_plan(model, x)
    assert str(caught.value).count("plain(model)") == 1


@pytest.mark.parametrize("error", ["wrong", "wrong.", "wrong?", "wrong:", " wrong\n"])
def test_errors_of_others_end_before_the_next_sentence_begins(error: str) -> None:
    assert as_sentence(error) in ("wrong.", "wrong?")
    assert as_sentence(KeyError(3)) == "KeyError: 3."


def test_more_example_inputs_than_the_model_takes(x: Tensor) -> None:
    with pytest.raises(ValueError, match="does not run on the example inputs"):
        find_convs(net(), x, x)


def test_example_inputs_on_another_device(x: Tensor) -> None:
    """Only the shape of an input matters, so a meta input works for a model on the CPU."""
    model = net()
    with unchanged(model):
        assert find_convs(model, x.to("meta")) == find_convs(model, x)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_half_precision(dtype: torch.dtype, close: float, x: Tensor) -> None:
    """Factorised in float64 and stored in the network's precision: errors are those of float32, to rounding."""
    model = net().eval()
    half = net().eval().to(dtype)
    half.load_state_dict(model.state_dict())
    settings: dict[str, Any] = {"rule": "energy", "energy": 0.8, "schemes": ["channel", "depthwise", "bottleneck"]}
    with unchanged(half):
        small = compress(half, x.to(dtype), **settings, exclude=())
    assert small.plan.cuts
    assert {p.dtype for p in small.model.parameters()} == {dtype}
    reference = apply_plan(model, small.plan)(x)
    assert float(((small.model(x.to(dtype)).float() - reference).norm() / reference.norm()).detach()) < close
    for row, cut in zip((row for row in small.report.rows if row.scheme), small.plan.cuts, strict=True):
        assert row.error == pytest.approx(cut.error, abs=close)


def test_the_meta_device(x: Tensor) -> None:
    """Finding and cutting with init='empty' work. Planning and factorising need weights, and the errors say what to do."""
    model = net()
    plan = make_plan(model, x, schemes="channel", exclude=())
    empty, inputs = net().to("meta"), x.to("meta")
    with unchanged(empty):
        assert find_convs(empty, inputs) == find_convs(model, x)
        for settings in ({}, {"rule": "energy", "energy": 0.9}, {"rule": "fixed", "rank": 2}):
            with pytest.raises(ValueError, match=r"^\d: its weights are on the meta device.*apply_plan\(model, plan, init='empty'\)"):
                make_plan(empty, inputs, **settings, exclude=())  # type: ignore[arg-type]
        with pytest.raises(
            ValueError, match=r"\d: expected weights to factorise, found a tensor on the meta device. Load weights, or use init='empty'"
        ):
            apply_plan(empty, plan)
        small = apply_plan(empty, plan, init="empty")
    assert all(p.is_meta for p in small.parameters())
    assert small(inputs).shape == model(x).shape
    assert compare(empty, small, inputs, plan=plan).after == plan.total_after


# ---- layers that are not what they seem


def test_lazy_modules(x: Tensor) -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.Conv2d(8, 8, 3))
    with unchanged(model):
        for attempt in (find_convs, make_plan, compress):
            with pytest.raises(
                ValueError, match=r"0.weight: expected an initialised tensor, found one of a lazy module. Run one forward pass first"
            ):
                attempt(model, x)
    model(x)
    assert compress(model, x).plan.cuts


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal])
def test_parametrised_convolutions(wrap: Any, x: Tensor) -> None:
    model = net()
    wrap(model[2])
    assert reasons(model, x)["2"] == "its weight is parametrised. Call dsconv_surgery.plain(model) first."
    cuts_elsewhere(model, x, "2")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "prune"])
def test_convolutions_whose_weight_a_hook_computes(kind: str, x: Tensor) -> None:
    """Old-style weight norm, spectral norm, pruning."""
    model = net()
    if kind == "prune":
        prune.random_unstructured(model[2], "weight", amount=0.3)
    else:
        getattr(nn.utils, kind)(model[2])
    model(x)  # the hook computes the weight
    model.eval()
    assert "computed by a hook" in reasons(model, x)["2"]
    cuts_elsewhere(model, x, "2")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_old_style_weight_norm_without_a_warning(x: Tensor) -> None:
    """Finding convolutions does not warn; warnings are errors in these tests."""
    model = net()
    nn.utils.weight_norm(model[2])
    model(x)
    assert list(reasons(model, x)) == ["2"]


class DataDependent(nn.Module):
    """Can be neither traced nor run on fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.normed = nn.utils.weight_norm(nn.Conv2d(8, 8, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.normed(y) if float(x.sum()) > 0 else y


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_old_style_weight_norm_in_a_model_that_only_runs_for_real(x: Tensor) -> None:
    model = DataDependent()
    model(x)
    assert list(reasons(model, x)) == ["normed"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Conv2d(8, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 8, 3, padding=1)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(F.relu(self.first(x)))))


def test_tied_weights(x: Tensor) -> None:
    """Two layers with one weight both stay, and still share it."""
    model = Tied()
    assert reasons(model, x) == {
        "one": "its weight or bias is tied to two.weight, and cutting the layer would untie them.",
        "two": "its weight or bias is tied to one.weight, and cutting the layer would untie them.",
    }
    cuts_elsewhere(model, x, "one")
    small = compress(model, x, rule="fixed", rank=2)
    assert small.model.one.weight is small.model.two.weight
    assert small.report.after.params == sum(p.numel() for p in small.model.parameters())


@pytest.mark.parametrize("what", ["bias", "alias"])
def test_tied_in_other_ways(what: str, x: Tensor) -> None:
    """A bias that two layers share, and a weight that the model holds under a second name."""
    model = Tied()
    model.two.weight = nn.Parameter(torch.rand(8, 8, 3, 3))
    if what == "bias":
        model.two.bias = model.one.bias
    else:
        model.register_parameter("alias", model.one.weight)
    assert "one" in reasons(model, x)


class ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.other = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(F.conv2d(x, self.conv.weight * 2, self.conv.bias, padding=1))


def test_a_weight_that_is_read_functionally(x: Tensor) -> None:
    model = ReadsWeight()
    assert reasons(model, x) == {"conv": "its bias is read by ReadsWeight.forward, so the layer must stay."}
    cuts_elsewhere(model, x, "conv")


class Lora(type("BaseTunerLayer", (), {"__module__": "peft.tuners.tuners_utils"}), nn.Module):  # type: ignore[misc]
    """An adapter as peft has them: a layer, and two small ones beside it."""

    def __init__(self, layer: nn.Module, *added: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A, self.lora_B = (nn.ModuleDict({"default": module}) for module in added)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_layers_inside_adapters(x: Tensor) -> None:
    """They stay, because merging reads their weights; other layers are cut, and the refusal of a budget names the remedy."""
    conv = Lora(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1, bias=False), nn.Conv2d(2, 8, 1, bias=False))
    linear = Lora(nn.Linear(7, 7), nn.Linear(7, 2, bias=False), nn.Linear(2, 7, bias=False))
    model = nn.Sequential(conv, linear, nn.Conv2d(8, 8, 3, padding=1))
    inside = [f"{index}.{name}" for index in (0, 1) for name in ("base_layer", "lora_A.default", "lora_B.default")]
    assert list(reasons(model, x)) == inside
    assert all("inside a peft adapter" in reason and "merge_and_unload()" in reason for reason in reasons(model, x).values())
    assert [cut.name for cut in compress(model, x, budget=Budget(macs=0.9)).plan.cuts] == ["2"]
    with pytest.raises(ValueError, match=r"out of reach.* Not cut: 6 x: it is inside a peft adapter.* merge_and_unload\(\)"):
        compress(model, x, budget=Budget(macs=0.1))
    with pytest.raises(ValueError, match=r"no layer of the network can be cut\. 6 x: it is inside a peft adapter.* merge_and_unload\(\)"):
        compress(model[:2], x)


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * 2


def test_a_subclass_of_conv2d(x: Tensor) -> None:
    """Its forward may compute anything, so it is a skip."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Doubled(8, 8, 3))
    assert list(reasons(model, x)) == ["1"]
    assert f"{Doubled.__module__}.Doubled is not a plain nn.Conv2d or nn.Linear." in reasons(model, x)["1"]
    cuts_elsewhere(model, x, "1")


class OtherKinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2)
        self.line = nn.Conv1d(8, 8, 3)
        self.solid = nn.Conv3d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.solid(self.line(self.up(self.conv(x)).flatten(2))[..., None, None])


def test_other_convolutions(x: Tensor) -> None:
    """Transposed, 1-d and 3-d convolutions are skips, and their MACs count."""
    model = OtherKinds()
    assert reasons(model, x) == {
        "up": "nn.ConvTranspose2d is not a plain nn.Conv2d or nn.Linear.",
        "line": "nn.Conv1d is not a plain nn.Conv2d or nn.Linear.",
        "solid": "nn.Conv3d is not a plain nn.Conv2d or nn.Linear.",
    }
    cuts_elsewhere(model, x, "up")
    costs = {row.name: row.before.macs for row in compare(model, model, x).rows}
    pixels = 10 * 8
    assert costs == {
        "conv": 2 * 63 * 27 * 8,
        "up": 2 * 63 * 8 * 8 * 4,
        "line": 2 * (pixels - 2) * 8 * 8 * 3,
        "solid": 2 * (pixels - 2) * 8 * 4,
    }


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_a_convolution_with_a_hook(kind: str, x: Tensor) -> None:
    """Replacing the layer would lose the hook."""
    model = net()
    getattr(model[2], kind)(lambda *_: None)
    assert reasons(model, x) == {"2": "it has hooks, which would be lost. Remove them first."}
    cuts_elsewhere(model, x, "2")


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.near = nn.Conv2d(8, 8, 3, padding=1)
        self.far = self.near
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.near(self.stem(x))
        return self.far(self.pool(x))


def test_a_module_under_two_names(x: Tensor) -> None:
    """One site with an alias is replaced under both names. MACs count for both calls, parameters once."""
    model = Shared()
    site = next(layer for layer in find_convs(model, x) if layer.name == "near")
    assert isinstance(site, ConvSite)
    assert site.aliases == ("far",)
    assert site.sizes == ((2, 9, 7), (2, 4, 3))
    assert site.cost.params == 8 * 8 * 9 + 8
    assert site.cost.macs == 8 * 8 * 9 * 2 * (63 + 12)
    with unchanged(model):
        small = compress(model, x, rule="fixed", rank=2, schemes="channel")
    assert small.model.near is small.model.far
    assert isinstance(small.model.far, nn.Sequential)
    row = next(row for row in small.report.rows if row.name == "near")
    assert row.after.macs == (8 * 9 * 2 + 2 * 8) * 2 * (63 + 12)
    assert row.after.params == 8 * 9 * 2 + 2 * 8 + 8
    assert small.report.after.params == sum(p.numel() for p in small.model.parameters())
    assert [skip.name for skip in make_plan(model, x, rule="fixed", rank=2, schemes="channel", exclude="far").skips] == ["near"]


class Repeats(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.step = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = F.relu(self.step(x))
        return x


def test_a_module_called_several_times(x: Tensor) -> None:
    """MACs count for every call, parameters once."""
    model = Repeats().eval()
    site = next(layer for layer in find_convs(model, x) if layer.name == "step")
    assert isinstance(site, ConvSite)
    assert site.sizes == ((2, 9, 7),) * 3
    assert site.cost.macs == 3 * 2 * 63 * 9 * 64
    small = compress(model, x, rule="fixed", rank=8, schemes="spatial")
    row = next(row for row in small.report.rows if row.name == "step")
    assert row.after.macs == 3 * 2 * 63 * (3 * 8 * 8 + 3 * 8 * 8)
    assert row.after.params == 2 * 3 * 8 * 8 + 8
