"""A layer is cut only if it is nothing but its call, its weight and its bias; what else it holds is carried over or a reason to stay."""

from __future__ import annotations

import copy
import functools
import pickle
import random
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dsconv_surgery import DepthwiseConv2d, PointwiseConv2d, apply_plan, find_convs, make_plan
from dsconv_surgery.network.discovery import ConvSite, Skip
from dsconv_surgery.network.geometry import ConvSpec
from dsconv_surgery.network.layers import (
    LINK_NAMES,
    carry_attributes,
    check_not_quantized,
    irreplaceable_layers,
    named_layers,
    weight_property_readers,
)
from dsconv_surgery.schemes import build, chain_of, get_scheme, scheme_names


def reasons(model: nn.Module) -> dict[str, str]:
    """The reason for each layer that cannot be replaced, by its first name."""
    names = named_layers(model)
    return {names[layer][0]: reason for layer, reason in irreplaceable_layers(model).items()}


def reason(layer: nn.Module) -> str:
    return reasons(nn.Sequential(layer)).get("0", "")


# ---- state


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(4, 8, 3), lambda: nn.Linear(4, 8)])
def test_parameters_buffers_and_modules_of_a_layer_are_a_reason(make: Callable[[], Any]) -> None:
    layer = make()
    layer.register_parameter("gain", nn.Parameter(torch.ones(1)))
    assert "it holds gain beside its weight and bias" in reason(layer)
    layer = make()
    layer.register_buffer("scale", torch.ones(1), persistent=False)
    assert "it holds scale beside" in reason(layer)
    layer = make()
    layer.adapter = nn.Linear(2, 2)
    assert "it holds adapter beside" in reason(layer)
    assert reason(make()) == ""


@pytest.mark.parametrize(
    "register",
    [
        lambda m: m.register_forward_hook(lambda *_: None),
        lambda m: m.register_forward_pre_hook(lambda *_: None),
        lambda m: m.register_full_backward_hook(lambda *_: None),
        lambda m: m.register_full_backward_pre_hook(lambda *_: None),
        lambda m: m.register_state_dict_pre_hook(lambda *_: None),
        lambda m: m.register_state_dict_post_hook(lambda *_: None),
        lambda m: m.register_load_state_dict_pre_hook(lambda *_: None),
        lambda m: m.register_load_state_dict_post_hook(lambda *_: None),
    ],
)
def test_hooks_of_every_kind_are_a_reason(register: Callable[[nn.Module], Any]) -> None:
    layer = nn.Conv2d(4, 8, 3)
    register(layer)
    assert "it has hooks" in reason(layer)


def _wrapped(layer: nn.Module, x: Tensor) -> Tensor:
    return F.relu(x)


@pytest.mark.parametrize("name", ["forward", "_conv_forward", "_call_impl", "__call__", "_save_to_state_dict"])
@pytest.mark.parametrize("kind", ["method", "function", "partial"])
def test_methods_replaced_on_an_instance_are_a_reason(name: str, kind: str) -> None:
    layer = nn.Conv2d(4, 8, 3)
    values = {"method": types.MethodType(_wrapped, layer), "function": lambda x: F.relu(x), "partial": functools.partial(_wrapped, layer)}
    setattr(layer, name, values[kind])
    assert reason(layer).startswith(f"its {name} was replaced on the instance")


def test_a_compiled_layer_is_a_reason() -> None:
    layer = nn.Linear(4, 8)
    layer._compiled_call_impl = lambda *_: None  # as nn.Module.compile does, which takes seconds to import
    assert "_compiled_call_impl was replaced on the instance" in reason(layer)


@pytest.mark.parametrize("path", ["Conv2d.forward", "Conv2d._conv_forward", "Linear.forward", "Module.__call__", "Module._call_impl"])
def test_methods_replaced_on_a_class_of_torch_are_a_reason(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(4, 8))
    assert not reasons(model)
    kind, method = path.split(".")
    own = getattr(getattr(nn, kind), method)
    monkeypatch.setattr(getattr(nn, kind), method, functools.wraps(own)(lambda *args: own(*args)))
    affected = {"Conv2d": {"0"}, "Linear": {"1"}, "Module": {"0", "1"}}[kind]
    assert {name for name, text in reasons(model).items() if f"nn.{path} was replaced by" in text} == affected
    monkeypatch.undo()
    assert not reasons(model)


def test_tracing_is_no_reason() -> None:
    """torch.fx replaces nn.Module.__call__ while it traces; afterwards layers are as before."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(4, 8))
    asked: list[dict[str, str]] = []

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            asked.append(reasons(self.model))
            return self.model(x)

    fx.symbolic_trace(Asks())
    assert asked == [{}]
    assert reasons(model) == {}


# ---- attributes


class Parsed(nn.Module):
    """Reads `i` and `f` of its layers, as YOLO does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)])
        for i, layer in enumerate(self.layers):
            layer.i, layer.f, layer.type = i, [-1, 0] if i == 2 else -1, "nn.Conv2d"

    def forward(self, x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for layer in self.layers:
            if not isinstance(layer.f, int):
                x = sum(outputs[k] for k in layer.f)  # type: ignore[assignment]
            x = layer(x) + layer.i
            outputs.append(x)
        return x


def test_plain_data_on_a_layer_is_carried_over() -> None:
    model, x = Parsed().eval(), torch.rand(1, 3, 8, 8)
    plan = make_plan(model, x, rule="fixed", rank=3, schemes="channel", exclude=(), cache=False)
    small = apply_plan(model, plan)
    assert [cut.name for cut in plan.cuts] == ["layers.0", "layers.1", "layers.2"]
    assert [(chain.i, chain.f, chain.type) for chain in small.layers] == [
        (0, -1, "nn.Conv2d"),
        (1, -1, "nn.Conv2d"),
        (2, [-1, 0], "nn.Conv2d"),
    ]
    assert small.layers[2].f is not model.layers[2].f
    h = small.layers[1](small.layers[0](x)) + 1
    torch.testing.assert_close(small(x), small.layers[2](h + small.layers[0](x)) + 2)
    dense = nn.Conv2d(16, 16, 3)
    carry_attributes(small.layers[2], dense)
    assert (dense.i, dense.f, dense.type) == (2, [-1, 0], "nn.Conv2d")


@pytest.mark.parametrize(
    "value", [None, True, 3, 0.5, "text", torch.float16, torch.device("cpu"), torch.Size([1]), (1, [2]), {"a": [None]}]
)
def test_every_kind_of_plain_data_is_carried_over(value: Any) -> None:
    layer, spec = nn.Conv2d(4, 8, 3), ConvSpec(4, 8, (3, 3), bias=True)
    layer.note = value
    assert reason(layer) == ""
    assert build(chain_of(get_scheme("channel"), spec, 2), layer, None).note == value


@pytest.mark.parametrize("value", [torch.ones(1), nn.ReLU, F.relu, object(), [torch.ones(1)], {"a": len}, {1, 2}, random.Random(0)])
def test_other_attributes_are_a_reason(value: Any) -> None:
    layer = nn.Conv2d(4, 8, 3)
    layer.note = value
    assert "its attribute note (" in reason(layer)


def test_attributes_named_like_links_or_methods_are_a_reason() -> None:
    for name in ("depthwise", "append", "pop"):
        layer = nn.Conv2d(4, 8, 3)
        setattr(layer, name, 3)
        assert f"its attribute {name} has the name of a link or a method of nn.Sequential." in reason(layer)
    layer.custom = 1
    with pytest.raises(ValueError, match="the attribute custom of a layer has the name of a link"):
        carry_attributes(layer, nn.Sequential(__import__("collections").OrderedDict(custom=nn.ReLU())))


def test_the_names_of_links_are_known() -> None:
    spec = ConvSpec(6, 6, (3, 3))
    links = {link for name in scheme_names() for link in get_scheme(name).chain(spec, (2, 2) if name == "tucker" else 2)}
    assert links <= LINK_NAMES


# ---- subclasses


class Inherits(nn.Conv2d):
    def extra_repr(self) -> str:
        return "inherits"


class Scripted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if torch.jit.is_scripting():
            return F.linear(x, self.weight.to(x.dtype), self.bias)
        return F.linear(x, self.weight, bias=self.bias)


class CallsSuper(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class WritesItOut(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.conv2d(x, self.weight, self.bias, stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups)


SERVED: list[Callable[[], nn.Module]] = [
    lambda: Inherits(4, 8, 3),
    lambda: Scripted(4, 8),
    lambda: Scripted(4, 8, bias=False),
    lambda: CallsSuper(4, 8, 3, padding=1, padding_mode="circular"),
    lambda: CallsSuper(4, 8, (2, 3), stride=2, padding="valid"),
    lambda: CallsSuper(4, 8, 3, padding="same", dilation=2),
    lambda: WritesItOut(4, 8, 3, stride=(2, 1), padding=1, groups=2, bias=False),
    lambda: WritesItOut(4, 8, 3).double(),
    lambda: WritesItOut(4, 8, 3).half(),
    lambda: WritesItOut(4, 8, 3, device="meta"),
    lambda: DepthwiseConv2d(8, 2),
    lambda: PointwiseConv2d(4, 8),
]


@pytest.mark.parametrize("make", SERVED)
def test_subclasses_that_compute_the_same_are_served(make: Callable[[], nn.Module]) -> None:
    assert reason(make()) == ""


class Scales(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * 1.0


class Activates(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.relu(super().forward(x))


class DropsInTraining(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(F.dropout(x, 0.1, self.training), self.weight, self.bias)


class LowRankAdapter(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down = nn.Parameter(torch.zeros(2, inputs))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight, self.bias) + F.linear(x, self.down).sum()


class Switched(nn.Linear):
    """Adds an adapter if a flag says so; now it does not."""

    active = False

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight, self.bias) * 2 if self.active else F.linear(x, self.weight, self.bias)


GLOBAL_FLAG = False


class AsksAGlobal(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x if GLOBAL_FLAG else F.linear(x, self.weight, self.bias)


class DrawsLots(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight, self.bias if random.random() < 0.999 else None)


class AsksTheSize(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x if x.shape[0] > 1000 else F.linear(x, self.weight, self.bias)


class NoGradient(nn.Linear):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight, self.bias)


class NoBias(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)


class NoPadding(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class ZeroPadding(nn.Conv2d):
    """Right for padding_mode "zeros" only."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class OwnState(nn.Linear):
    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)


class OwnCopy(nn.Linear):
    def __deepcopy__(self, memo: Any) -> OwnCopy:
        return self


class OwnWeight(nn.Linear):
    @property
    def out_features(self) -> int:  # type: ignore[override]
        return 8

    @out_features.setter
    def out_features(self, value: int) -> None:
        pass


REFUSED: list[Callable[[], nn.Module]] = [
    lambda: Scales(4, 8), lambda: Activates(4, 8, 3), lambda: DropsInTraining(4, 8), lambda: DropsInTraining(4, 8).eval(),
    lambda: LowRankAdapter(4, 8), lambda: Switched(4, 8), lambda: AsksAGlobal(4, 8), lambda: DrawsLots(4, 8), lambda: AsksTheSize(4, 8),
    lambda: NoGradient(4, 8), lambda: NoBias(4, 8, 3), lambda: NoPadding(4, 8, 3, padding=1),
    lambda: ZeroPadding(4, 8, 3, padding=1, padding_mode="reflect"), lambda: OwnState(4, 8), lambda: OwnCopy(4, 8), lambda: OwnWeight(4, 8),
]  # fmt: skip


@pytest.mark.parametrize("make", REFUSED)
def test_subclasses_that_may_compute_something_else_are_refused(make: Callable[[], nn.Module]) -> None:
    layer = make()
    assert reason(layer).startswith(f"{__name__}.{type(layer).__name__} is not a plain nn.Conv2d or nn.Linear.")
    assert "dsconv_surgery.plain(model)" in reason(layer)


def test_the_answer_depends_on_the_geometry() -> None:
    assert reason(ZeroPadding(4, 8, 3, padding=1)) == reason(NoBias(4, 8, 3, bias=False)) == reason(NoPadding(4, 8, 3)) == ""


def test_a_method_replaced_on_a_subclass_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Scripted(4, 8)
    assert reason(layer) == ""
    monkeypatch.setattr(Scripted, "forward", lambda self, x: F.linear(x, self.weight, self.bias).relu())
    assert "Scripted is not a plain" in reason(layer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_layers_of_timm() -> None:
    layers = pytest.importorskip("timm.layers")
    assert reason(layers.Linear(4, 8)) == ""
    std = pytest.importorskip("timm.layers.std_conv")
    for layer in (layers.Conv2dSame(4, 8, 3), std.StdConv2d(4, 8, 3), std.ScaledStdConv2d(4, 8, 3), std.StdConv2dSame(4, 8, 3)):
        kind = type(layer)
        assert reason(layer).startswith(f"{kind.__module__}.{kind.__name__} is not a plain nn.Conv2d or nn.Linear. If it only pads")
        assert kind.__module__.startswith("timm.layers.")


def test_attention_projections_stay() -> None:
    """nn.MultiheadAttention reads the weight of its output projection and does not call it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x, need_weights=False)[0])

    for mode in (True, False):
        projection, head = find_convs(Net().train(mode), torch.rand(1, 5, 16))
        assert isinstance(projection, Skip)
        assert "nn.NonDynamicallyQuantizableLinear is not a plain nn.Conv2d or nn.Linear." in projection.reason
        assert isinstance(head, ConvSite)


# ---- reads in the code of a model


class Lazy(nn.Module):
    """Each layer is read in another way, most of them in branches that do not run."""

    def __init__(self) -> None:
        super().__init__()
        names = ("device", "dtype", "weight", "bias", "features", "prop", "local", "text", "helped", "unread", "other", "unreached")
        for name in names:
            setattr(self, name, nn.Linear(4, 4))
        self.listed = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.block = nn.ModuleDict({"inner": nn.Linear(4, 4), "unread": nn.Linear(4, 4)})
        self.looped = nn.Sequential(nn.Linear(4, 4))
        self.cache: Tensor | None = None

    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        if again:
            self.cache = torch.arange(4, device=self.device.weight.device, dtype=self.dtype.weight.dtype)
            x = x @ self.weight.weight + self.bias.bias + self.features.in_features + self._helper()
            local = self.local
            x = x + local.weight.sum() + self.prop_weight + getattr(self.text, "weight").sum()  # noqa: B009
            x = x + self.listed[0].out_features + self.block.inner.weight.to(x.dtype) + self.other.weight.requires_grad
            for layer in self.looped:
                x = x + layer.weight
        return x

    @property
    def prop_weight(self) -> Tensor:
        return self.prop.weight

    def _helper(self) -> Tensor:
        return self.helped.weight

    def export(self) -> Tensor:
        return self.unreached.weight


def test_reads_in_code_that_did_not_run_are_a_reason() -> None:
    model = nn.Sequential(Lazy())
    texts = {name.removeprefix("0."): text for name, text in reasons(model).items()}
    methods = {"prop": "prop_weight", "helped": "_helper"}
    attributes = {"bias": "bias", "features": "in_features", "listed.0": "out_features", "listed.1": "out_features"}
    names = ("weight", "bias", "features", "prop", "local", "text", "helped", "listed.0", "listed.1", "block.inner", "looped.0", "other")
    expected = {name: f"its {attributes.get(name, 'weight')} is read by Lazy.{methods.get(name, 'forward')}" for name in names}
    assert texts == {name: f"{text}, so the layer must stay." for name, text in expected.items()}
    assert weight_property_readers(model) == {model[0].device, model[0].dtype}


def test_reads_of_a_child_by_its_parents_parent() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))])
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x.to(self.blocks[1][0].weight.dtype)

    model = Root()
    assert reasons(model) == {}
    assert weight_property_readers(model) == {model.blocks[0][0], model.blocks[1][0]}


def test_a_reason_is_the_same_in_every_process() -> None:
    """Of several reads, the first in alphabetical order is named. Texts have another order in a set in each process."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            sizes = self.fc.out_features + self.fc.in_features
            return self._second(self._first(self._third(x))) @ self.fc.weight + self.fc.bias + sizes

        def _first(self, x: Tensor) -> Tensor:
            return x + self.fc.bias

        def _second(self, x: Tensor) -> Tensor:
            return x + self.fc.bias

        def _third(self, x: Tensor) -> Tensor:
            return x + self.fc.bias

    qualified = Reads.forward.__qualname__.removesuffix("forward")
    assert reasons(Reads()) == {"fc": f"its bias is read by {qualified}_first, so the layer must stay."}


def test_code_without_source_counts_as_code_without_reads() -> None:
    names: dict[str, Any] = {"nn": nn}
    exec("class Net(nn.Module):\n    def forward(self, x):\n        return self.fc.weight", names)
    model = names["Net"]()
    model.fc = nn.Linear(4, 4)
    assert reasons(model) == {}


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 8, 3), nn.Linear(4, 8)])
def test_a_chain_has_the_dtype_and_device_of_its_layer(layer: nn.Module) -> None:
    """Where the network reads `weight.dtype`: after conversions and copies, too, and the state_dict is as without."""
    spec = ConvSpec.of(layer)
    links = chain_of(get_scheme("channel" if spec.kind == "conv" else "bottleneck"), spec, 2)
    chain, plain_chain = build(links, layer, None, weight_properties=True), build(links, layer, None)
    assert list(chain.state_dict()) == list(plain_chain.state_dict())
    assert not hasattr(plain_chain, "weight")
    assert chain.weight.dtype == torch.float32
    assert not chain.weight.requires_grad
    for other in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        assert other.half().weight.dtype == torch.float16
        assert other.to("meta").weight.device.type == "meta"


# ---- weights


class Quantised(Tensor):
    """Stands for the tensors of torchao: a wrapper without a storage."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Quantised:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)  # type: ignore[attr-defined]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = torch.utils._pytree.tree_map_only(Quantised, lambda t: t.inner, (args, kwargs or {}))
        result = func(*args, **kwargs)
        return Quantised(result) if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default) else result


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_weights_of_a_tensor_subclass_are_a_reason() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(4, 8), nn.Linear(4, 8))
    model[1].weight = nn.Parameter(Quantised(model[1].weight.detach()), requires_grad=False)
    text = "its weights are tensors of the subclass test_layers.Quantised. Cut the network before you quantise or shard it."
    assert {name: r.replace(__name__, "test_layers") for name, r in reasons(model).items()} == {"1": text}
    model[2].weight = nn.Parameter(model[2].weight.detach().to_sparse_csr())
    assert "its weights are sparse (torch.sparse_csr)." in reasons(model)["2"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_layers_are_named() -> None:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this build of torch has no quantised engine")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 8))
    check_not_quantized(model)
    with pytest.raises(ValueError, match=r"^1: expected floating-point weights, found torch.ao.nn.quantized.dynamic"):
        check_not_quantized(torch.ao.quantization.quantize_dynamic(model, {nn.Linear}))


def test_layers_edited_after_their_construction() -> None:
    """A weight of another shape, and a padding that the layer does not use."""
    layer = nn.Conv2d(3, 8, 3)
    layer.weight = nn.Parameter(layer.weight.detach().sum(1, keepdim=True))
    assert "its weight has the shape (8, 1, 3, 3), but its attributes say (8, 3, 3, 3)" in reason(layer)
    line = nn.Linear(4, 8)
    line.weight = nn.Parameter(torch.rand(8, 6))
    assert "its weight has the shape (8, 6), but its attributes say (8, 4)" in reason(line)
    layer = nn.Conv2d(3, 8, 3, padding_mode="circular")
    layer.padding = (1, 1)
    assert "it pads by [0, 0, 0, 0], but its attributes say [1, 1, 1, 1]" in reason(layer)
    for padding in (1, (2, 1), "same", "valid"):
        assert reason(nn.Conv2d(3, 8, (4, 3), padding=padding, padding_mode="replicate", dilation=2)) == ""
    layer = nn.Conv2d(3, 8, 3)
    layer.stride, layer.padding = 2, 1  # type: ignore[assignment]
    assert reason(layer) == ""
    assert ConvSpec.of(layer) == ConvSpec(3, 8, (3, 3), (2, 2), (1, 1), bias=True)


# ---- words


def test_reasons_name_the_class_with_its_module() -> None:
    assert reason(nn.ConvTranspose2d(3, 8, 2)) == "nn.ConvTranspose2d is not a plain nn.Conv2d or nn.Linear."
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)))
    assert reasons(model) == {"0": "its weight is parametrised. Call dsconv_surgery.plain(model) first."}


def test_a_depthwise_layer_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=2)).eval()
    plan = make_plan(model, torch.rand(1, 8, 9, 9), schemes=["depthwise", "channel"], rule="fixed", rank=1, cache=False)
    assert plan.skips[0].reason.startswith("it is already depthwise: depthwise at rank 1 already costs ")
    assert [cut.name for cut in plan.cuts] == ["1"]
