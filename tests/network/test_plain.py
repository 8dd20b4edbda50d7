"""`plain` turns layers that compute their weight or pad their input into plain ones with equal outputs, and leaves all others alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize, prune

from dsconv_surgery import compress, find_convs, load, plain, save
from dsconv_surgery.network.discovery import ConvSite, survey_model
from dsconv_surgery.network.plain import SamePad2d

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*"),
]


def relative(output: Tensor, expected: Tensor) -> float:
    return float((output - expected).detach().norm() / expected.detach().norm())


class Doubles(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class SameConv(nn.Conv2d):
    """Pads as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        sides = []
        for size, kernel, stride, dilation in zip(x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True):
            total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            sides.append((total // 2, total - total // 2))
        return F.conv2d(F.pad(x, [*sides[1], *sides[0]]), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardised(nn.Conv2d):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = self.gain * w / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


def _hooked(layer: nn.Module, wrap: Callable[..., Any], *args: Any) -> nn.Module:
    wrap(layer, *args)
    return layer


MADE_PLAIN: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3, padding=1)),
    "weight norm, linear": lambda: parametrizations.weight_norm(nn.Linear(4, 6)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(4, 6, 3, stride=2, groups=2)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(6, 4, bias=False)),
    "own parametrisation": lambda: _hooked(nn.Conv2d(4, 6, 3), parametrize.register_parametrization, "weight", Doubles()),
    "parametrised bias": lambda: _hooked(nn.Conv2d(4, 6, 3), parametrize.register_parametrization, "bias", Doubles()),
    "reflecting": lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, (3, 5), padding=(1, 2), padding_mode="reflect")),
    "same, reflecting": lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, (3, 5), padding="same", padding_mode="reflect")),
    "same": lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, (3, 5), padding="same")),
    "old weight norm": lambda: nn.utils.weight_norm(nn.Conv2d(4, 6, 3, dilation=2)),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 6)),
    "pruned": lambda: _hooked(nn.Conv2d(4, 6, 3), prune.random_unstructured, "weight", 0.4),
    "standardised": lambda: Standardised(4, 6, 3, padding=1, bias=False),
    "standardised, float64": lambda: Standardised(4, 6, 3, padding=1).double(),
    "TensorFlow, stride 1": lambda: SameConv(4, 6, 3),
    "TensorFlow, even": lambda: SameConv(4, 6, (2, 4)),
    "TensorFlow, stride 2": lambda: SameConv(4, 6, 3, stride=2),
    "TensorFlow, stride 3 x 1": lambda: SameConv(4, 6, (5, 2), stride=(3, 1), groups=2),
    "TensorFlow, dilated": lambda: SameConv(4, 6, (3, 2), stride=2, dilation=(2, 3), bias=False),
    "TensorFlow, stride over kernel": lambda: SameConv(4, 6, 2, stride=3),
    "TensorFlow, bfloat16": lambda: SameConv(4, 6, 3, stride=2).bfloat16(),
}


@pytest.mark.parametrize("name", MADE_PLAIN)
def test_layers_become_plain_with_equal_outputs(name: str) -> None:
    """In evaluation mode, for sizes that `plain` did not try itself; the argument is bit-identical."""
    model = nn.Sequential(MADE_PLAIN[name]()).eval()
    dtype = next(model.parameters()).dtype
    before = copy.deepcopy(list(model.state_dict().items())), torch.get_rng_state()
    result = plain(model)
    assert all(torch.equal(value, old) for (_, value), (_, old) in zip(model.state_dict().items(), before[0], strict=True))
    assert torch.equal(torch.get_rng_state(), before[1])
    linear = isinstance(model[0], nn.Linear)
    last = result[0] if linear or isinstance(result[0], nn.Conv2d) else result[0][1]
    assert type(last) is (nn.Linear if linear else nn.Conv2d)
    assert not result[0].training
    assert {p.dtype for p in result.parameters()} == {dtype}
    assert all(p.is_leaf and p.requires_grad for p in result.parameters())
    channels = last.in_features if linear else last.in_channels * 1
    for size in ((17, 12), (12, 17), (13, 13), (30, 31)):
        x = torch.randn(2, *size, channels, dtype=dtype) if linear else torch.randn(2, channels, *size, dtype=dtype)
        assert relative(result(x), model(x)) < (1e-2 if dtype is torch.bfloat16 else 1e-6)
    x = torch.randn(1, 9, 9, channels, dtype=dtype) if linear else torch.randn(1, channels, 9, 9, dtype=dtype)
    assert all(isinstance(layer, ConvSite) for layer in find_convs(result, x))


class FlippedPad(nn.Conv2d):
    """Pads on the left and at the top more."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.conv2d(F.pad(x, (1, 0, 1, 0)), self.weight, self.bias, self.stride)


class PadsWithOnes(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.conv2d(F.pad(x, (1, 1, 1, 1), value=1.0), self.weight, self.bias)


class Activates(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x).clamp(-100, 100)


class Normalises(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x * 1.0, self.weight, self.bias)


class Dynamic(nn.Linear):
    """The weight depends on the sign of the input."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight * x.sum().sign(), self.bias)


class Adapter(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight, self.bias) + F.linear(x, self.weight)


class DropsInTraining(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        y = F.linear(x, self.weight, self.bias)
        return F.dropout(y, 0.1) if self.training else y


class Twice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.conv2d(F.conv2d(x, self.weight, self.bias), self.weight, self.bias)


class RandomWeight(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight + 1e-4 * torch.randn_like(self.weight), self.bias)


class Raises(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        raise RuntimeError("not on such inputs")


def _with_hook(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *_: None)
    return layer


def _with(layer: nn.Module, name: str, value: Any) -> nn.Module:
    setattr(layer, name, value)
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda: _with(SameConv(4, 4, 3), "note", object()), lambda: _with(SameConv(4, 4, 3), "forward", lambda x: x),
        lambda: FlippedPad(4, 4, 2), lambda: PadsWithOnes(4, 4, 3), lambda: Activates(4, 4, 3), lambda: Normalises(4, 4),
        lambda: Dynamic(4, 4), lambda: Adapter(4, 4), lambda: DropsInTraining(4, 4), lambda: Twice(4, 4, 3), lambda: RandomWeight(4, 4),
        lambda: Raises(4, 4), lambda: _with_hook(SameConv(4, 4, 3)), lambda: parametrizations.weight_norm(nn.Conv1d(4, 4, 3)),
        lambda: nn.ConvTranspose2d(4, 4, 3),
    ],
)  # fmt: skip
def test_layers_that_compute_more_stay(make: Callable[[], nn.Module]) -> None:
    layer = make()
    model = nn.Sequential(layer)
    assert type(plain(model)[0]) is type(layer)
    assert type(plain(model.train())[0]) is type(layer)


def test_plain_layers_are_copied_and_nothing_is_shared() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4))
    result = plain(model)
    assert [type(m) for m in result] == [nn.Conv2d, nn.Conv2d, nn.BatchNorm2d]
    addresses = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert addresses.isdisjoint(t.data_ptr() for t in (*result.parameters(), *result.buffers()))
    assert type(plain(parametrizations.weight_norm(nn.Linear(3, 4)))) is nn.Linear  # the layer is the model


def test_flags_and_attributes_stay() -> None:
    layer = Standardised(4, 6, 3).requires_grad_(False)
    layer.bias.requires_grad_(True)
    layer.i = 7
    result = plain(nn.Sequential(layer).train())[0]
    assert result.training
    assert result.i == 7
    assert (result.weight.requires_grad, result.bias.requires_grad) == (False, True)
    assert plain(nn.Sequential(Standardised(4, 6, 3, device="meta")))[0].weight.is_meta


class Sharing(nn.Module):
    """One layer under two names, a tied weight, and a weight that the forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = Standardised(4, 4, 3, padding=1)
        self.tied, self.also = Standardised(4, 4, 1), Standardised(4, 4, 1)
        self.also.weight = self.tied.weight
        self.read = Standardised(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.also(self.tied(self.second(self.first(x)))) + F.conv2d(x, self.read.weight) + self.read(x)


def test_shared_layers_stay_shared_and_tied_or_read_ones_stay() -> None:
    model, x = Sharing().eval(), torch.rand(1, 4, 7, 7)
    result = plain(model)
    assert type(result.first) is nn.Conv2d
    assert result.first is result.second
    assert result.tied.weight is result.also.weight
    assert {type(m) for m in (result.tied, result.also, result.read)} == {Standardised}
    assert relative(result(x), model(x)) < 1e-6


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [((3, 3), (2, 2), (1, 1)), ((2, 5), (3, 1), (2, 1)), ((1, 1), (2, 2), (1, 1))])
def test_same_padding_can_be_traced(kernel: Any, stride: Any, dilation: Any) -> None:
    """As TensorFlow documents it, `ceil(size / stride)` outputs, also in a graph for other sizes."""
    pad = SamePad2d(kernel, stride, dilation)
    graph = fx.symbolic_trace(pad)
    conv = nn.Conv2d(2, 2, kernel, stride, dilation=dilation)
    for size in ((7, 8), (9, 12), (10, 11)):
        x = torch.rand(1, 2, *size)
        assert torch.equal(graph(x), pad(x))
        assert conv(pad(x)).shape[2:] == tuple(-(-n // s) for n, s in zip(size, stride, strict=True))


def test_a_plain_copy_is_cut_saved_and_loaded(tmp_path: Any) -> None:
    def build() -> nn.Module:
        return nn.Sequential(SameConv(8, 32, 3, stride=2), nn.ReLU(), Standardised(32, 32, 3, padding=1)).eval()

    model, x = build(), torch.rand(1, 8, 15, 15)
    small = compress(plain(model), x, rule="fixed", rank=4, schemes="channel")
    assert {cut.name for cut in small.plan.cuts} == {"0.1", "2"}
    save(small, tmp_path)
    assert torch.equal(load(plain(build()), tmp_path)(x), small.model(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dm_nfnet_f0", "nf_resnet50", "resnetv2_50x1_bit", "tf_efficientnet_b0"])
def test_networks_of_timm(name: str) -> None:
    """Equal outputs, and at least 95 % of the MACs of convolutions can be cut."""
    timm = pytest.importorskip("timm")
    model, x = timm.create_model(name).eval(), torch.rand(1, 3, 128, 128)
    for module in model.modules():  # the initial values hide some layers
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(getattr(module, "skipinit_gain", None), nn.Parameter):
            nn.init.ones_(module.skipinit_gain)
    result = plain(model)
    with torch.no_grad():
        assert relative(result(x), model(x)) < 1e-5
        x = x[..., :97, :110]
        assert relative(result.forward_features(x), model.forward_features(x)) < 1e-5
    survey = survey_model(result, x)
    convs = {n for n, module in result.named_modules() if isinstance(module, nn.Conv2d)}
    cut = sum(layer.cost.macs for layer in survey.layers if isinstance(layer, ConvSite) and layer.name in convs)
    assert cut >= 0.95 * sum(survey.costs[n].macs for n in convs)
