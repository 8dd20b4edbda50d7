"""Runtimes: networks and chains executed in each of them, plans and reports that record them, and every mistake with its remedy."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsconv_surgery import Budget, Plan, PlanSettings, Recipe, compare, fold_batchnorm, make_plan, pareto
from dsconv_surgery.budget import BudgetError
from dsconv_surgery.network.geometry import ConvSpec
from dsconv_surgery.planning.layer_latency import LayerTimer
from dsconv_surgery.support.cache import Cache
from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.latency import Conditions, Stopwatch, Timing, measure_latency
from dsconv_surgery.support.records import parse_json
from dsconv_surgery.support.runtimes import Runtime, find_runtime
from dsconv_surgery.surgery import apply_plan

X = torch.rand(2, 3, 12, 12)


class Net(nn.Module):
    """Two layers of one geometry, and another one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.a, self.b, self.c = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(self.first(x)))).mean((2, 3))


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class Device:
    """Another device, on which time is the number of parameters in thousands. It counts its measurements."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []

    def __call__(self, module: nn.Module, inputs: Inputs) -> float:
        assert not module.training
        assert not torch.is_grad_enabled()
        module(*inputs.args, **inputs.kwargs)
        self.modules.append(module)
        return parameters(module) / 1000


@pytest.fixture
def net() -> nn.Module:
    return Net().eval()


@pytest.fixture
def device() -> Device:
    return Device()


def plan_for(net: nn.Module, runtime: Any, keep: float = 0.6, **settings: Any) -> Plan:
    return make_plan(net, X, budget=Budget(latency=keep), schemes=["spatial", "channel"], exclude=["first.*"], runtime=runtime, **settings)


# ---- a user's function


def test_a_function_measures_layers_and_networks(net: nn.Module, device: Device) -> None:
    """Its times are taken as they are, the plan meets its budget by them, and plan and report record the function."""
    plan = plan_for(net, device)
    cut = apply_plan(net, plan)
    dense_time, cut_time = (parameters(fold_batchnorm(model, X)) / 1000 for model in (net, cut))
    assert plan.timing is not None
    assert (plan.timing.before, plan.timing.after) == pytest.approx((dense_time, cut_time))
    assert plan.timing.predicted == pytest.approx(cut_time)
    assert cut_time <= 0.62 * dense_time
    assert plan.timing.conditions.runtime == "callable Device"
    assert Plan.from_json(plan.to_json()) == plan
    assert "float32, contiguous, cpu, callable Device, BatchNorms folded)" in str(plan)
    report = compare(net, cut, X, plan=plan, latency=True, runtime=device)
    assert report.latency is not None
    assert report.latency.before == pytest.approx(dense_time)
    assert report.latency.predicted == plan.timing.after
    assert "the dense network" in str(report)
    assert "rounds" not in str(report)


def test_a_function_measures_a_geometry_once_and_in_each_plan_again(net: nn.Module, device: Device) -> None:
    """Layers a and b share their measurements. On disk, nothing would tell a changed function."""
    plan_for(net, device)
    layers = [module for module in device.modules if type(module) is nn.Sequential]
    specs = [tuple(str(ConvSpec.of(layer)) for layer in chain) for chain in layers]
    assert len(specs) == len(set(specs)) > 5
    count = len(device.modules)
    plan_for(net, device)
    assert len(device.modules) == 2 * count


@pytest.mark.parametrize("result", [0, -1.0, float("nan"), float("inf"), None, True, "3"], ids=str)
def test_what_is_no_time_is_refused(net: nn.Module, result: Any) -> None:
    def phone(module: nn.Module, inputs: Inputs) -> Any:
        return result

    with pytest.raises(ValueError, match=r"runtime=callable phone: it returned .*, expected the milliseconds that module"):
        plan_for(net, phone)


def test_where_nothing_is_faster_the_error_says_so(net: nn.Module) -> None:
    def constant(module: nn.Module, inputs: Inputs) -> float:
        return 2.0

    with pytest.raises(BudgetError, match=r"latency=1.0 \(0 layers .*another runtime.*no option is faster .* in callable constant"):
        plan_for(net, constant)


def test_a_plan_that_a_function_timed_is_compared_with_this_function_or_with_another_runtime(net: nn.Module, device: Device) -> None:
    plan = plan_for(net, device)
    cut = apply_plan(net, plan)
    with pytest.raises(ValueError, match=r"the plan was timed by a function \(callable Device\). Pass it as runtime="):
        compare(net, cut, X, plan=plan, latency=True)
    report = compare(net, cut, X, plan=plan, latency=True, runtime="eager")
    assert report.latency is not None
    assert report.latency.conditions.runtime == "eager"
    assert report.latency.predicted is None  # that was a prediction for the other device
    assert compare(net, cut, X, plan=plan).latency is None


def test_a_sweep_is_timed_in_the_runtime(net: nn.Module, device: Device) -> None:
    """Where budgets are on latency, the plans are made for it; elsewhere only the results are timed in it."""
    sweep = pareto(net, X, fractions=(0.6,), measure="macs", latency=True, runtime=device, schemes="channel")
    assert sweep.conditions is not None
    assert sweep.conditions.runtime == "callable Device"
    assert "times for batch 2" in str(sweep)
    folded = parameters(net) - parameters(fold_batchnorm(net, X))
    assert folded > 0
    assert [point.cost.latency for point in sweep.points] == pytest.approx([(point.cost.params - folded) / 1000 for point in sweep.points])
    sweep = pareto(net, X, fractions=(0.7,), measure="latency", runtime=device, schemes="channel", exclude=())
    timing = sweep.points[1].plan.timing  # type: ignore[union-attr]
    assert timing is not None
    assert timing.conditions.runtime == "callable Device"


# ---- names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"runtime": "onnxruntim"},
            r"unknown runtime 'onnxruntim'. Did you mean 'onnxruntime'\? Known: eager, compile, onnxruntime, or a ",
        ),
        ({"runtime": 3}, "runtime=3: expected one of eager, compile, onnxruntime"),
        ({"runtime": "compile", "budget": Budget(macs=0.5)}, r"runtime= goes with a budget on latency, as in budget=Budget\(latency=0.5\)"),
        ({"runtime": "compile", "rule": "fixed", "rank": 2, "budget": None}, "found runtime='compile', a rule that takes no budget"),
    ],
)
def test_wrong_runtimes_are_refused(settings: dict[str, Any], message: str, net: nn.Module) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(net, X, **{"budget": Budget(latency=0.5), **settings})


def test_a_runtime_without_a_measurement_is_refused(net: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"runtime='onnxruntime': no latency is measured. Pass latency=True"):
        compare(net, net, X, runtime="onnxruntime")
    with pytest.raises(ValueError, match="goes with a budget on latency"):
        pareto(net, X, fractions=(0.6,), runtime="compile")
    with pytest.raises(ValueError, match="unknown runtime 'onnx'"):
        pareto(net, X, fractions=(0.6,), latency=True, runtime="onnx")


def test_recipes_hold_names_of_runtimes() -> None:
    recipe = Recipe(budget=Budget(latency=0.5), runtime="onnxruntime")
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    with pytest.raises(ValueError, match=r"recipe: runtime=.* is a function, which a file cannot hold. Name a runtime."):
        Recipe(budget=Budget(latency=0.5), runtime=lambda module, inputs: 1.0).to_toml()


def test_plans_that_name_no_runtime_were_timed_in_eager_mode() -> None:
    text = '{"threads": 1, "batch": 1, "dtype": "float32", "device": "cpu", "memory_format": "contiguous"}'
    assert parse_json(Conditions, text, "conditions").runtime == "eager"


def test_multiples_fit_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime fills blocks of channels, as wide as the processor's vectors, with zeros."""
    for capability, expected in (("AVX512", 16), ("AVX2", 8)):
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda capability=capability: capability)
        assert PlanSettings(budget=Budget(latency=0.5), runtime="onnxruntime").multiple_for(["layer"]) == expected
        assert PlanSettings(budget=Budget(latency=0.5), runtime="onnxruntime", multiple=4).multiple_for(["layer"]) == 4
        assert PlanSettings(budget=Budget(latency=0.5)).multiple_for(["layer"]) == 8


# ---- timings


def test_timings_are_cached_by_runtime_and_version(net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A timing of another runtime, or of another version, is not taken for this one's."""
    monkeypatch.setattr(Stopwatch, "time", lambda _, calls, *__: [Timing(call(), 1.0) for call in calls])
    chain = {"dense": ConvSpec.of(nn.Conv2d(3, 4, 3))}

    def timed(name: str, version: str, milliseconds: float) -> list[float]:
        def call(_module: nn.Module, _inputs: Inputs) -> Callable[[], float]:
            return lambda: milliseconds

        return LayerTimer(net, Inputs(X), Cache(tmp_path), Stopwatch(), Runtime(name, version, call, call)).time([chain], [(2, 12, 12)])

    assert timed("eager", "", 1.0) == [1.0]
    assert timed("onnxruntime", "1.31", 2.0) == [2.0]
    assert timed("onnxruntime", "1.32", 3.0) == [3.0]
    assert timed("onnxruntime", "1.31", 4.0) == [2.0]
    assert timed("eager", "", 5.0) == [1.0]


# ---- onnxruntime


def test_a_plan_for_onnxruntime(net: nn.Module) -> None:
    """With a budget that every plan meets."""
    plan = plan_for(net, "onnxruntime", keep=1.0)
    assert plan.timing is not None
    assert (plan.timing.conditions.runtime, plan.timing.conditions.threads) == ("onnxruntime", torch.get_num_threads())
    assert plan.timing.conditions.runtime_version
    report = compare(net, apply_plan(net, plan), X, plan=plan, latency=True)
    assert report.latency is not None
    assert report.latency.conditions == plan.timing.conditions
    assert report.latency.predicted == plan.timing.after


def test_a_network_is_exported_once(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense network is timed beside each cut one; a network that is gone is forgotten."""
    runtime = find_runtime("onnxruntime")
    exports: list[nn.Module] = []
    export = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda model, *rest, **options: exports.append(model) or export(model, *rest, **options))
    small = nn.Sequential(nn.Conv2d(3, 2, 1)).eval()
    other = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    first = measure_latency([small, other], Inputs(X), rounds=1, runtime=runtime)
    assert len(first) == 2
    measure_latency([small], Inputs(X), rounds=1, runtime=runtime)
    assert len(exports) == 2
    assert exports[0] is not small
    del other
    assert len(runtime._calls) == 1


def test_inputs_in_channels_last_are_timed_as_onnxruntime_takes_them() -> None:
    """As contiguous arrays, and so the conditions say."""
    layer = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    x = X.contiguous(memory_format=torch.channels_last)
    runtime = find_runtime("onnxruntime")
    assert torch.allclose(torch.from_numpy(runtime.prepare_chain(layer, Inputs(x))()[0]), layer(x), atol=1e-6)


@pytest.mark.parametrize("module", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_command(module: str, net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"ONNX needs {module}: pip install 'dsconv_surgery\[onnx\]'."):
        plan_for(net, "onnxruntime")


def test_what_onnxruntime_cannot_run_is_refused(net: nn.Module) -> None:
    class Unexportable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * len(repr(x)) if float(x.sum()) > 0 else x

    with pytest.raises(ValueError, match=r"runtime='onnxruntime': ONNX export: Unexportable cannot be exported: .* Use runtime='eager'"):
        measure_latency([Unexportable()], Inputs(X), runtime=find_runtime("onnxruntime"))
    with pytest.raises(ValueError, match=r"runtime='onnxruntime' times on the CPU; found inputs on meta"):
        measure_latency([net.to("meta")], Inputs(X.to("meta")), runtime=find_runtime("onnxruntime"))


# ---- torch.compile


@pytest.mark.slow
def test_a_compiled_network(net: nn.Module) -> None:
    """Compiled as a user does it."""
    runtime = find_runtime("compile")
    with torch.inference_mode():
        assert torch.allclose(runtime.network_call(net, Inputs(X))(), net(X), atol=1e-5)
    (milliseconds,) = measure_latency([net], Inputs(X), rounds=1, runtime=runtime)
    assert milliseconds > 0


def test_compiled_networks_are_compiled_each(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than torch.compile keeps for one function, where it would silently fall back to eager mode."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # without the C++ compiler
    runtime = find_runtime("compile")
    before = counters["stats"]["unique_graphs"]
    layers = [nn.Sequential(nn.Linear(4, width)).eval() for width in range(1, 11)]
    calls = [runtime.prepare(layer, Inputs(torch.ones(1, 4))) for layer in layers]
    assert counters["stats"]["unique_graphs"] - before == len(layers)
    with torch.inference_mode():
        for layer, call in zip(layers, calls, strict=True):
            assert torch.allclose(call(), layer(torch.ones(1, 4)), atol=1e-6)
    assert counters["stats"]["unique_graphs"] - before == len(layers)


def test_without_a_compiler_the_error_names_it(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_function: Any) -> Any:
        raise RuntimeError("No working C++ compiler found\nand many more lines")

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(ValueError, match=r"Net cannot be compiled: No working C\+\+ compiler found. On CPUs torch.compile needs a C\+\+"):
        measure_latency([net], Inputs(X), runtime=find_runtime("compile"))


def test_layers_for_compiled_networks_are_timed_in_channels_last(net: nn.Module) -> None:
    """As activations are in compiled networks."""
    formats: list[bool] = []

    def call(module: nn.Module, inputs: Inputs) -> Callable[[], Any]:
        tensors = [inputs.args[0], module[0].weight]  # type: ignore[index]
        formats.extend(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors)
        return lambda: None

    for name, expected in (("compile", True), ("onnxruntime", False)):
        formats.clear()
        timer = LayerTimer(net, Inputs(X), Cache(False), Stopwatch(), Runtime(name, "1", call, call))
        timer.time([{"dense": ConvSpec.of(nn.Conv2d(8, 8, 3))}], [(2, 12, 12)])
        assert formats == [expected] * 2
