"""Networks and chains as ONNX: their outputs in onnxruntime are those in torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsconv_surgery import Budget, apply_plan, fold_batchnorm, make_plan
from dsconv_surgery.support import onnx_export
from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.onnx_export import chain_to_onnx, network_to_onnx, network_to_onnx_for_any_batch, session_call

GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "stride and dilation": {"kernel_size": (3, 2), "stride": (2, 1), "dilation": (1, 3), "padding": (2, 1)},
    "groups without bias": {"kernel_size": 3, "groups": 2, "bias": False, "padding": 1},
    "same": {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": (0, 1), "padding_mode": "replicate"},
    "circular and same": {"kernel_size": (4, 3), "padding": "same", "padding_mode": "circular"},
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", GEOMETRIES)
def test_chains_compute_what_torch_computes(name: str) -> None:
    """Without an export: the graph is written node by node."""
    chain = nn.Sequential(nn.Conv2d(4, 6, 1, bias=False), nn.Conv2d(6, 8, **GEOMETRIES[name]), nn.Conv2d(8, 3, 1)).eval()
    x = torch.randn(2, 4, 9, 11)
    (result,) = session_call(chain_to_onnx(chain, Inputs(x)), Inputs(x))()
    assert torch.allclose(torch.from_numpy(result), chain(x), atol=1e-5)


def test_linear_chains_compute_what_torch_computes() -> None:
    chain, x = nn.Sequential(nn.Linear(5, 3, bias=False), nn.Linear(3, 7)), torch.randn(4, 5)
    (result,) = session_call(chain_to_onnx(chain, Inputs(x)), Inputs(x))()
    assert torch.allclose(torch.from_numpy(result), chain(x), atol=1e-5)


class Nested(nn.Module):
    """Takes a list, keyword arguments, a number and None, and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, pair: list[Tensor], *, scale: Tensor, power: int, mask: Any = None) -> dict[str, Tensor]:
        return {"first": self.conv(pair[0]) ** power, "second": pair[1].mean() * scale}


def test_a_network_with_nested_inputs() -> None:
    model, a, b, scale = Nested().eval(), torch.rand(1, 3, 6, 6), torch.rand(2, 3), torch.rand(2)
    inputs = Inputs([a, b], scale=scale, power=2, mask=None)
    first, second = session_call(network_to_onnx(model, inputs), inputs)()
    expected = model(*inputs.args, **inputs.kwargs)
    assert torch.allclose(torch.from_numpy(first), expected["first"], atol=1e-5)
    assert torch.allclose(torch.from_numpy(second), expected["second"], atol=1e-5)


def test_the_model_keeps_its_mode_and_its_values() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    before = copy.deepcopy(model.state_dict())
    inputs = Inputs(torch.rand(1, 3, 8, 8))
    with torch.inference_mode():  # as in a script for deployment
        network_to_onnx(model, inputs)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_other_outputs_in_onnxruntime_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exporter that changes a weight."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    export = torch.onnx.export

    def wrong(network: Any, *rest: Any, **options: Any) -> Any:
        network[0].weight.data.mul_(1.001)
        return export(network, *rest, **options)

    monkeypatch.setattr(torch.onnx, "export", wrong)
    with pytest.raises(ValueError, match=r"outputs in onnxruntime differ from torch's by [\d.e-]+ of the largest value, expected up to"):
        network_to_onnx_for_any_batch(model, Inputs(torch.rand(1, 3, 8, 8)))


def test_a_network_for_one_batch_size_is_refused() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(2, 3, 8, 8)

    with pytest.raises(ValueError, match=r"ONNX export: Fixed does not run with a batch of 1: shape .* invalid"):
        network_to_onnx_for_any_batch(Fixed(), Inputs(torch.rand(1, 3, 8, 8)))


# ---- ten networks, cut, for any batch size

FAST = ["resnet20", "squeezenet1_1"]
SLOW = [
    "resnet18", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5", "efficientnet_b0", "regnet_y_400mf",
    "densenet121",
]  # fmt: skip


def cut_network(name: str) -> tuple[nn.Module, Tensor]:
    """A network with random weights, cut to 70 % of its parameters without images, with BatchNorms folded."""
    if name == "resnet20":
        from cifar import demo_resnet20

        model, x = demo_resnet20(), torch.randn(1, 3, 32, 32)
    else:
        import torchvision

        model, x = torchvision.models.get_model(name, weights=None).eval(), torch.randn(1, 3, 64, 64)
    plan = make_plan(model, x, budget=Budget(params=0.7), rule="uniform", schemes=["spatial", "channel", "bottleneck"], exclude=())
    assert plan.cuts
    return fold_batchnorm(apply_plan(model, plan), x), x


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_cut_network_runs_in_onnxruntime_with_any_batch(name: str) -> None:
    deployed, x = cut_network(name)
    data = network_to_onnx_for_any_batch(deployed, Inputs(x))
    for batch in (1, 2, 5):
        images = torch.randn(batch, *x.shape[1:])
        with torch.no_grad():
            expected = deployed(images)
        (result,) = session_call(data, Inputs(images))()
        assert float((torch.from_numpy(result) - expected).abs().max() / expected.abs().max()) < onnx_export.TOLERANCE
