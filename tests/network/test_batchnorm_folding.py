"""fold_batchnorm computes the same without BatchNorms, leaves what it cannot fold, and changes nothing else."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cifar import CifarResNet
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dsconv_surgery import Budget, Plan, apply_plan, compare, compress, fold_back, fold_batchnorm, load, make_plan, save

CLOSED_FORM = ["channel", "bottleneck"]
X = torch.rand(2, 3, 12, 10, generator=torch.Generator().manual_seed(1))


class ActivatedBatchNorm(nn.BatchNorm2d):
    """A BatchNorm with an activation, as timm's BatchNormAct2d."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class CentredBatchNorm(nn.BatchNorm2d):
    """A BatchNorm that does more."""

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        return output - output.mean((2, 3), keepdim=True)


class Block(nn.Module):
    """A convolution, a BatchNorm and a forward that is passed in."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], conv: nn.Module | None = None, batchnorm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = conv or nn.Conv2d(3, 4, 3, bias=False)
        self.bn = batchnorm or nn.BatchNorm2d(4)
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def randomised(model: Any) -> Any:
    """The network in evaluation mode; no statistic and no parameter of its BatchNorms is 0 or 1."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.running_mean is not None and module.running_var is not None:
                nn.init.uniform_(module.running_mean, 0.1, 0.5)
                nn.init.uniform_(module.running_var, 0.3, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.uniform_(module.bias, 0.1, 0.9)
    return model.eval()


def count(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def usual(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.bn(self.conv(x)))


def by_value(self: Any, x: Tensor) -> Tensor:
    return self.bn(self.conv(x if float(x.sum()) > 0 else -x))


def with_shape(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.bn(y).reshape(y.shape[0], -1)


def flat(self: Any, x: Tensor) -> Tensor:
    return self.bn(self.conv(x.flatten(1)[:, :3]))


def chain() -> nn.Sequential:
    return nn.Sequential(OrderedDict(depthwise=nn.Conv2d(3, 6, 3, groups=3, bias=False), pointwise=nn.Conv2d(6, 4, 1)))


FOLDED: dict[str, Callable[[], nn.Module]] = {
    "without bias": lambda: Block(usual),
    "with bias": lambda: Block(usual, nn.Conv2d(3, 4, 3)),
    "grouped, strided": lambda: Block(usual, nn.Conv2d(3, 6, (3, 1), stride=2, groups=3, padding=1), nn.BatchNorm2d(6)),
    "reflected": lambda: Block(usual, nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")),
    "not affine": lambda: Block(usual, None, nn.BatchNorm2d(4, affine=False)),
    "large eps": lambda: Block(usual, None, nn.BatchNorm2d(4, eps=0.5)),
    "linear": lambda: Block(flat, nn.Linear(3, 4), nn.BatchNorm1d(4)),
    "activated": lambda: Block(usual, None, ActivatedBatchNorm(4)),
    "chain": lambda: Block(usual, chain()),
    "not traceable": lambda: Block(by_value),
    "shape is read": lambda: Block(with_shape),
    "graph": lambda: fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))),
    "float64": lambda: Block(usual).double(),
    "keyword": lambda: Block(lambda self, x: self.bn(input=self.conv(input=x))),
    "two names": lambda: two_names(),
}


def two_names() -> nn.Module:
    model = Block(lambda self, x: self.other_bn(self.other_conv(x)))
    model.other_conv, model.other_bn = model.conv, model.bn
    return model


@pytest.mark.parametrize("name", FOLDED)
def test_a_batchnorm_is_folded(name: str) -> None:
    model = randomised(FOLDED[name]())
    x = X.to(next(model.parameters()).dtype)
    before = copy.deepcopy(model.state_dict())
    folded = fold_batchnorm(model, x)
    assert count(model) == 1
    assert count(folded) == 0
    assert type(folded) is type(model) or isinstance(model, fx.GraphModule)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-12 if x.dtype == torch.float64 else 1e-6)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert not folded.training


def used_twice(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.bn(y) + y


def returned(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = self.conv(x)
    return self.bn(y), y


def stored(self: Any, x: Tensor) -> Tensor:
    self.features = self.conv(x)
    return self.bn(self.features)


def before_relu(self: Any, x: Tensor) -> Tensor:
    return self.bn(F.relu(self.conv(x), inplace=True))


def conv_twice(self: Any, x: Tensor) -> Tensor:
    return self.bn(self.conv(x)) + self.conv(x)


def batchnorm_twice(self: Any, x: Tensor) -> Tensor:
    return self.bn(self.bn(self.conv(x)))


def sequence(self: Any, x: Tensor) -> Tensor:
    return self.bn(self.conv(x[:, 0, :4, :3]))


def hooked(where: str) -> nn.Module:
    model = Block(usual)
    model.get_submodule(where).register_forward_hook(lambda _module, _args, output: output + 1)
    return model


class ReadsConvWeight(Block):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) * self.conv.weight.sum()  # type: ignore[operator, union-attr]


LEFT: dict[str, Callable[[], nn.Module]] = {
    "used twice": lambda: Block(used_twice),
    "returned": lambda: Block(returned),
    "stored": lambda: Block(stored),
    "scripted use": lambda: scripted_use(),
    "another operation between": lambda: Block(before_relu),
    "convolution called twice": lambda: Block(conv_twice),
    "BatchNorm called twice": lambda: Block(batchnorm_twice),
    "no statistics": lambda: Block(usual, None, nn.BatchNorm2d(4, track_running_stats=False)),
    "hook on the convolution": lambda: hooked("conv"),
    "hook on the BatchNorm": lambda: hooked("bn"),
    "parametrised": lambda: Block(usual, nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))),
    "BatchNorm that does more": lambda: Block(usual, None, CentredBatchNorm(4)),
    "channels are another dimension": lambda: Block(sequence, nn.Linear(3, 4), nn.BatchNorm1d(4)),
    "weight used elsewhere": lambda: ReadsConvWeight(usual),
    "transposed": lambda: Block(usual, nn.ConvTranspose2d(3, 4, 3)),
}


def _double(x: Tensor) -> Tensor:
    return x + x


def scripted_use() -> nn.Module:
    with pytest.deprecated_call():
        double = torch.jit.script(_double)

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + double(y)

    return Block(forward)


@pytest.mark.parametrize("name", LEFT)
def test_a_batchnorm_stays(name: str) -> None:
    model = randomised(LEFT[name]())
    result = fold_batchnorm(model, X)
    assert count(result) == 1
    torch.testing.assert_close(result(X), model(X), rtol=0, atol=0)


def test_only_those_that_can_be_folded_are_folded() -> None:
    conv = partial(nn.Conv2d, kernel_size=1)
    model = randomised(nn.Sequential(nn.BatchNorm2d(3), conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), conv(4, 4)))
    folded = fold_batchnorm(model, X)
    assert [type(module) for module in folded] == [nn.BatchNorm2d, nn.Conv2d, nn.Identity, nn.ReLU, nn.BatchNorm2d, nn.Conv2d]
    torch.testing.assert_close(folded(X), model(X))


def test_two_batchnorms_on_one_output_stay() -> None:
    model = randomised(Block(usual))
    model.other = randomised(nn.BatchNorm2d(4))
    model.function = lambda self, x: (lambda y: self.bn(y) + self.other(y))(self.conv(x))
    assert count(fold_batchnorm(model, X)) == 2


def test_flags_layout_and_attributes_are_kept() -> None:
    model = randomised(Block(usual)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.conv.weight.requires_grad_(False)
    model.conv.index, model.bn.index = 3, 4
    folded: Any = fold_batchnorm(model, X)
    assert folded.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not folded.conv.weight.requires_grad
    assert not folded.conv.bias.requires_grad
    assert (folded.conv.index, folded.bn.index) == (3, 4)
    assert [*folded.state_dict()] == ["conv.weight", "conv.bias"]
    model.train()
    model.bn.eval()
    assert fold_batchnorm(model, X).training


def test_half_precision_is_folded_in_float64() -> None:
    """The folded weights are those of float64, rounded once."""
    model = randomised(Block(usual)).bfloat16()
    exact: Any = fold_batchnorm(copy.deepcopy(model).double(), X.double())
    folded: Any = fold_batchnorm(model, X.bfloat16())
    assert count(folded) == 0
    for name, value in exact.state_dict().items():
        assert torch.equal(folded.state_dict()[name], value.bfloat16())


class ReadsWeight(Block):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) * self.bn.weight.sum()  # type: ignore[union-attr, operator]


class LooksForBatchNorms(Block):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) * (1 + count(self))


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (Block(usual).eval(), (), "expected example inputs, found none"),
        (Block(usual), (X,), "bn: expected evaluation mode, found 1 BatchNorms in training mode"),
        (Block(usual).eval(), (X[:, :2],), "does not run on the example inputs: .* Pass inputs"),
        (Block(usual).eval().to("meta"), (X,), "conv.weight: expected values to fold, found a tensor on the meta device"),
        (randomised(ReadsWeight(usual)), (X,), "does not run without its BatchNorms: .*weight"),
        (randomised(LooksForBatchNorms(usual)), (X,), "computes something else with its BatchNorms folded"),
    ],
)
def test_refusals(model: nn.Module, inputs: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fold_batchnorm(model, *inputs)


def test_amplified_rounding_is_a_warning() -> None:
    """The sine of large numbers in float32 is far off after rounding, that in float64 is not."""
    model = randomised(Block(lambda self, x: torch.sin(1e4 * self.bn(self.conv(x)))))
    with pytest.warns(UserWarning, match="in float64 they are equal"):
        folded = fold_batchnorm(model, X)
    assert count(folded) == 0


def test_keyword_arguments_and_other_outputs() -> None:
    model = randomised(Block(lambda self, x: {"logits": self.bn(self.conv(x)), "name": "a"}))
    folded = fold_batchnorm(model, example_kwargs={"x": X})
    assert count(folded) == 0
    torch.testing.assert_close(folded(X)["logits"], model(X)["logits"])


# --- with cuts ------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def cut() -> tuple[nn.Module, nn.Module, Plan, Tensor]:
    """A dense network, the cut one, its plan, and inputs."""
    torch.manual_seed(0)
    dense, x = randomised(CifarResNet(8)), torch.rand(2, 3, 16, 16)
    small = compress(dense, x, budget=Budget(macs=0.6), rule="uniform", schemes=CLOSED_FORM, exclude=(), cache=False)
    return dense, small.model, small.plan, x


def test_chains_are_folded(cut: Any) -> None:
    dense, small, plan, x = cut
    folded = fold_batchnorm(small, x)
    assert len(plan.cuts) > 3
    assert count(dense) == count(small) > 0 == count(folded)
    torch.testing.assert_close(folded(x), small(x), rtol=1e-5, atol=1e-6)
    for entry in plan.cuts:
        links = [module.bias is not None for module in folded.get_submodule(entry.name)]  # type: ignore[union-attr]
        assert not any(links[:-1])
        assert links[-1]
    assert torch.export.export(folded, (x,)).module()(x).shape == (2, 10)
    buffer = io.BytesIO()
    torch.save(folded, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), folded(x))


def test_a_folded_cut_network_is_refused_where_its_plan_counts(cut: Any, tmp_path: Path) -> None:
    dense, small, plan, x = cut
    folded = fold_batchnorm(small, x)
    calls: list[Callable[[], Any]] = [
        lambda: fold_back(folded, plan),
        lambda: save(folded, tmp_path / "folded", plan),
        lambda: compare(dense, folded, x, plan=plan),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"conv.: .* fold_batchnorm folded into it. Pass the cut network from before fold_batchnorm"):
            call()
    assert not (tmp_path / "folded").exists()
    with pytest.raises(ValueError, match="a BatchNorm is folded into this layer in one network only"):
        compare(fold_batchnorm(dense, x), small, x, plan=plan)
    assert compare(fold_batchnorm(dense, x), folded, x, latency=True).latency is not None


def test_folding_commutes_with_fold_back(cut: Any) -> None:
    _, small, plan, x = cut
    torch.testing.assert_close(fold_batchnorm(fold_back(small, plan), x)(x), fold_batchnorm(small, x)(x), rtol=1e-5, atol=1e-6)


def test_a_network_is_folded_and_then_cut(cut: Any, tmp_path: Path) -> None:
    dense, _, _, x = cut
    folded = fold_batchnorm(dense, x)
    plan = make_plan(folded, x, budget=Budget(macs=0.6), rule="uniform", schemes=CLOSED_FORM, exclude=(), cache=False)
    small = apply_plan(folded, plan, x)
    assert compare(folded, small, x, plan=plan).after.params < compare(folded, small, x).before.params
    save(small, tmp_path, plan)
    fresh = randomised(CifarResNet(8))
    assert torch.equal(load(fold_batchnorm(fresh, x), tmp_path)(x), small(x))
    assert count(fold_back(small, plan)) == 0
    with pytest.raises(ValueError, match=r"Only the bias differs: pass fold_batchnorm\(model, ...\)"):
        load(fresh, tmp_path)


def test_load_names_folded_layers_beside_the_cuts(cut: Any, tmp_path: Path) -> None:
    """Only layers outside the plan are folded: the network is saved, and a folded fresh one loads it."""
    dense, _, _, x = cut
    plan = make_plan(dense, x, budget=Budget(params=0.999), rule="uniform", schemes=CLOSED_FORM, include=("linear",), cache=False)
    small = fold_batchnorm(apply_plan(dense, plan, x), x)
    assert [entry.name for entry in plan.cuts] == ["linear"]
    save(small, tmp_path, plan)
    fresh = randomised(CifarResNet(8))
    with pytest.raises(ValueError, match=r"does not fit .* and fold_batchnorm\(fresh_model, ...\) if its BatchNorms were folded"):
        load(fresh, tmp_path)
    assert torch.equal(load(fold_batchnorm(fresh, x), tmp_path)(x), small(x))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "googlenet", "densenet121"])
def test_torchvision_networks(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    settings = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model, x = randomised(models.get_model(name, weights=None, **settings)), torch.rand(1, 3, 48, 48)
    folded = fold_batchnorm(model.requires_grad_(False), x)
    after_other_layers = 62 if name == "densenet121" else 0  # after a concatenation, a sum or a pooling
    assert count(folded) == after_other_layers
    expected, result = model(x), folded(x)
    assert float((expected - result).abs().max()) <= 1e-5 * float(expected.abs().max())
