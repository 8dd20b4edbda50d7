"""The check after every cut, and networks that treat a layer by more than its call."""

from __future__ import annotations

import math
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dsconv_surgery import Budget, Plan, apply_plan, compress, find_convs, load, make_plan, save
from dsconv_surgery.network.discovery import ConvSite, Skip
from dsconv_surgery.network.self_check import check_computes_same
from dsconv_surgery.support.copies import CopyError
from dsconv_surgery.support.inputs import Inputs

X = torch.rand(1, 3, 12, 12)


class Pair(nn.Module):
    """Two convolutions in a list; what `step` does with each layer is the test's."""

    def __init__(self, step: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList((nn.Conv2d(3, 24, 3), nn.Conv2d(24, 24, 3)))
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.step(layer, x)
        return x


class Doubled(nn.Module):
    """A module around a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def plan_of(model: nn.Module, *inputs: Any) -> Plan:
    return make_plan(model, *(inputs or (X,)), schemes="spatial", rule="fixed", rank=2, exclude=(), cache=False)


TYPE_TESTS: dict[str, Any] = {
    "isinstance": lambda layer, x: layer(x).relu() if isinstance(layer, nn.Conv2d) else layer(x),
    "type": lambda layer, x: layer(x) * 2 if type(layer).__name__ == "Sequential" else layer(x),
    "children": lambda layer, x: layer(x) + len(list(layer.children())),
    "hasattr": lambda layer, x: layer(x).relu() if hasattr(layer, "kernel_size") else layer(x),
    "parameters": lambda layer, x: layer(x) * len(list(layer.parameters())),
    "repr": lambda layer, x: layer(x) + (1 if "Sequential" in repr(layer) else 0),
    "method": lambda layer, x: layer._conv_forward(x, layer.weight, layer.bias),
}


@pytest.mark.parametrize("kind", sorted(TYPE_TESTS.keys() - {"parameters"}))
def test_layers_that_are_treated_by_their_type_are_skipped_with_the_reason(kind: str) -> None:
    model = Pair(TYPE_TESTS[kind]).eval()
    layers = find_convs(model, X)
    assert all(isinstance(layer, Skip) for layer in layers), layers
    with pytest.raises(ValueError, match=r"no layer of the network can be cut\. 2 x: "):
        compress(model, X)


def test_only_the_layers_concerned_are_skipped() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            for index, layer in enumerate(self.layers):
                x = layer(x)
                if index in (1, 4) and isinstance(layer, nn.Conv2d):
                    x = x.relu()
            return x

    layers = find_convs(Net().eval(), X)
    assert [type(layer) for layer in layers] == [ConvSite, Skip, ConvSite, ConvSite, Skip]


@pytest.mark.parametrize("kind", ["isinstance", "type", "children", "hasattr", "parameters", "repr"])
def test_the_check_finds_what_discovery_did_not_see(kind: str) -> None:
    """A plan of a plain network, applied to one with the same layers that tests types."""
    plan = plan_of(Pair(lambda layer, x: layer(x)).eval())
    model = Pair(TYPE_TESTS[kind]).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers\.(0|1)"):
        apply_plan(model, plan, X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    apply_plan(model, plan, X, check=False)
    apply_plan(model, plan, init="empty")


def test_the_first_layer_that_differs_is_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 24, 3), nn.Conv2d(24, 24, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x))
            return self.c(x.relu() if type(self.b) is nn.Conv2d else x)

    model = Net().eval()
    assert [cut.name for cut in plan_of(model, X).cuts] == ["a", "c"]
    plain = Net().eval()
    plain.b = Doubled(plain.b)
    plan = Plan.from_json(plan_of(plain, X).to_json().replace("b.layer", "b"))
    assert [cut.name for cut in plan.cuts] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="differ first in the output of layer 'c'"):
        apply_plan(model, plan, X)


def test_the_check_compares_whole_numbers_and_calls() -> None:
    dense, cut = nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)))
    cut[0][0].load_state_dict(dense[0].state_dict())
    check_computes_same(dense, cut, {"0": "0"}, Inputs(X))

    class Classes(nn.Module):
        def __init__(self, net: nn.Module, shift: int) -> None:
            super().__init__()
            self.net, self.shift = net, shift

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).argmax(1) + self.shift

    check_computes_same(Classes(dense, 0), Classes(cut, 0), {"net.0": "0"}, Inputs(X))
    with pytest.raises(ValueError, match="does not compute"):
        check_computes_same(Classes(dense, 0), Classes(cut, 1), {"net.0": "0"}, Inputs(X))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_check_allows_for_rounding_only(dtype: torch.dtype) -> None:
    class Shifted(nn.Module):
        def __init__(self, net: nn.Module, shift: float) -> None:
            super().__init__()
            self.net, self.shift = net, shift

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * (1 + self.shift)

    dense, cut = nn.Sequential(nn.Conv2d(3, 4, 3)).to(dtype), nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3))).to(dtype)
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-9}.get(dtype, 1e-2)
    inputs = Inputs(X.to(dtype))
    with torch.no_grad():
        dense[0].bias.fill_(1)
    cut[0][0].load_state_dict(dense[0].state_dict())
    check_computes_same(Shifted(dense, 0), Shifted(cut, 0), {"net.0": "0"}, inputs)
    with pytest.raises(ValueError, match="does not compute"):
        check_computes_same(Shifted(dense, 0), Shifted(cut, 10 * tolerance), {"net.0": "0"}, inputs)


def closure(model: nn.Module) -> None:
    old = model.forward
    model.forward = lambda x: old(x)


def default_argument(model: nn.Module) -> None:
    def forward(x: Tensor, layers: Any = model.layers) -> Tensor:
        return layers[1](layers[0](x))

    model.forward = forward


def kept_lambda(model: nn.Module) -> None:
    layer = model.layers[1]
    model.step = lambda inner, x: layer(x) if x.shape[1] == 24 else inner(x)


@pytest.mark.parametrize("patch", [closure, default_argument, kept_lambda])
def test_forwards_that_belong_to_the_original_are_refused(patch: Any) -> None:
    model = Pair(lambda layer, x: layer(x)).eval()
    plan = plan_of(model)
    patch(model)
    for call in (lambda: compress(model, X, budget=Budget(macs=0.3)), lambda: find_convs(model, X)):
        with pytest.raises(ValueError, match=r"layers\.\d\.(weight|bias).*forward"):
            call()
    if patch is closure:
        with pytest.raises(ValueError, match="none of the cut layers"):
            apply_plan(model, plan, X)


def test_bound_methods_belong_to_the_copy() -> None:
    model = Pair(lambda layer, x: layer(x)).eval()

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x).relu())

    model.forward = types.MethodType(forward, model)
    small = compress(model, X, budget=Budget(macs=0.5), cache=False)
    assert small.plan.cuts
    assert type(small.model.layers[1]) is nn.Sequential


@pytest.mark.parametrize("traced", [False, True])
def test_reduced_and_full_rank_pass(traced: bool) -> None:
    model: nn.Module = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3), nn.Dropout(0.5)
    ).eval()
    model = fx.symbolic_trace(model) if traced else model
    small = compress(model, X, budget=Budget(macs=0.5), cache=False)
    assert small.plan.cuts
    apply_plan(model, small.plan)
    fitted = compress(model, X, budget=Budget(macs=0.5), calibration=[torch.rand(8, 3, 12, 12)], schemes="spatial", cache=False)
    apply_plan(model, fitted.plan, calibration=[torch.rand(8, 3, 12, 12)])


def test_weights_whose_dtype_is_read_later(tmp_path: Any) -> None:
    """The chain answers `weight.device` and `weight.dtype` after a move, a copy and a save."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qk, self.index = nn.Conv2d(8, 8, 3, padding=1), None

        def forward(self, x: Tensor) -> Tensor:
            if self.index is None or len(self.index) != x.shape[-1]:
                self.index = torch.arange(x.shape[-1], device=self.qk.weight.device).to(self.qk.weight.dtype)
            return self.qk(x) + self.index

    x = torch.rand(1, 8, 8, 8)
    model = Attention().eval()
    model(x)
    plan = plan_of(model, x)
    cut = apply_plan(model, plan)
    assert cut.state_dict().keys() == {f"qk.{name}" for name in cut.qk.state_dict()}
    cut.double()(torch.rand(1, 8, 12, 12, dtype=torch.float64))
    assert cut.index.dtype == torch.float64
    save(cut.float(), tmp_path, plan)
    load(Attention(), tmp_path)(torch.rand(1, 8, 10, 10))


def test_functional_networks_are_announced() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.weight = nn.Conv2d(3, 32, 3), nn.Parameter(torch.randn(32, 32, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(self.conv(x), self.weight)

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.others = nn.Conv2d(3, 32, 3), [nn.Conv2d(32, 32, 3)]

        def forward(self, x: Tensor) -> Tensor:
            return self.others[0](self.conv(x))

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.lstm = nn.Conv2d(3, 32, 3), nn.LSTM(32, 64, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(self.conv(x).flatten(2).mT)[0]

    class Attentive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.attention = nn.Conv2d(3, 32, 3), nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).flatten(2).mT
            return self.attention(y, y, y)[0]

    macs = {
        Functional: 64 * 32 * 32 * 9,
        Listed: 64 * 32 * 32 * 9,
        Recurrent: 100 * 4 * 64 * (32 + 64),
        Attentive: 100 * 32 * 96 + 100 * 32 * 32 + 2 * 100 * 100 * 32,
    }
    params = {Functional: 32 * 32 * 9, Listed: 32 * 32 * 9 + 32, Recurrent: 4 * 64 * (32 + 64 + 2), Attentive: 96 * 32 + 96}
    for kind, expected in macs.items():
        model = kind().eval()
        with pytest.warns(UserWarning, match="of the network's MACs are outside of its layers"):
            plan = make_plan(model, X, budget=Budget(macs=0.9), cache=False)
        assert (plan.outside.macs, plan.outside.params) == (expected, params[kind]), kind
        assert "outside layers" in str(plan)
    with pytest.warns(UserWarning, match="parameters are outside"):
        make_plan(Listed().eval(), X, budget=Budget(params=0.9), cache=False)


@pytest.mark.parametrize(
    ("model", "x", "words"),
    [
        (nn.Sequential(nn.Conv3d(3, 8, 3)), torch.rand(1, 3, 9, 9, 9), ["1 x: nn.Conv3d"]),
        (nn.Sequential(nn.ReLU()), X, ["no convolution or linear layer was found", "exported, quantised"]),
        (torch.export.export(nn.Sequential(nn.Conv2d(3, 64, 3)).eval(), (X,)).module(), X, ["no convolution", "MACs outside of layers"]),
    ],
)
def test_networks_without_a_layer_to_cut_are_refused_with_the_cause(model: nn.Module, x: Tensor, words: list[str]) -> None:
    with pytest.raises(ValueError, match="layer") as caught:
        compress(model, x)
    assert all(word in str(caught.value) for word in words), caught.value


def test_the_error_of_a_copy_is_not_one_of_the_inputs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    model[0].handle = open(__file__)  # noqa: SIM115
    try:
        with pytest.raises(CopyError, match=r"0\.handle: this TextIOWrapper cannot be copied"):
            find_convs(model, X)
    finally:
        model[0].handle.close()


def test_a_graph_module_whose_forward_was_replaced_is_refused() -> None:
    """A copy of a GraphModule is made from its graph, and would lose the function."""
    graph = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)))
    old = graph.forward
    graph.forward = lambda x: 10 * old(x)
    for model in (graph, nn.Sequential(graph)):
        with pytest.raises(TypeError, match="GraphModule would lose it"):
            compress(model, X)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_nothing_but_nan_or_infinite_cannot_be_checked(value: float) -> None:
    model = Pair(lambda layer, x: layer(x) + value).eval()
    with pytest.raises(ValueError, match=r"all outputs on the inputs of the check are NaN or infinite, .* Pass example inputs for which"):
        compress(model, X, schemes="spatial", rule="fixed", rank=2, cache=False)
    plan = plan_of(model)
    with pytest.warns(UserWarning, match="the cut network was not checked, because all outputs .* are NaN or infinite"):
        apply_plan(model, plan)
    apply_plan(model, plan, X, check=False)
    masked = Pair(lambda layer, x: torch.where(torch.arange(x.shape[-1] - 2) > 0, layer(x), value)).eval()
    compress(masked, X, schemes="spatial", rule="fixed", rank=2, cache=False)
