"""The example of a new scheme, examples/tensor_train.py: run as a script, and held to what every scheme must do."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import tensorly
import torch
from torch import Tensor, nn

from dsconv_surgery import Budget, apply_plan, compress, fold_back, make_plan, register_scheme, schemes
from dsconv_surgery.network.geometry import ConvSpec
from dsconv_surgery.schemes import Scheme, registry

ROOT = Path(__file__).resolve().parents[2]
LAYERS = {
    "plain": nn.Conv2d(6, 10, 3, padding=1),
    "grouped": nn.Conv2d(8, 12, (3, 2), groups=2, padding=(1, 0)),
    "strided": nn.Conv2d(5, 7, (3, 5), stride=(2, 3), padding=2, dilation=(2, 1)),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4),
}


@pytest.fixture
def scheme() -> Iterator[Scheme]:
    """The example's scheme, registered for one test."""
    from tensor_train import TensorTrain

    register_scheme(TensorTrain())
    yield schemes.get_scheme("tensor_train")
    del registry._SCHEMES["tensor_train"]


def _full_rank(scheme: Scheme, spec: ConvSpec) -> int:
    return schemes.single_rank(scheme.full_rank(spec.one_group()))


def _kernels(scheme: Scheme, layer: nn.Conv2d, ranks: list[int]) -> list[Tensor]:
    spec = ConvSpec.of(layer)
    return [schemes.kernel_of(scheme, spec, factors) for factors in schemes.factorize(scheme, spec, layer.weight, ranks)]


def test_the_script_runs() -> None:
    """Its network is cut to the budget, and folding back changes outputs by rounding errors only."""
    result = subprocess.run([sys.executable, "examples/tensor_train.py"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("tensor_train") == 2
    (saved,) = re.findall(r"^MACs .*\(-(.*) %\)", result.stdout, re.M)
    assert float(saved) >= 60
    (difference,) = re.findall(r"outputs differ by (\S+)", result.stdout)
    assert float(difference) < 1e-5
    assert len((ROOT / "examples" / "tensor_train.py").read_text().splitlines()) <= 80


@pytest.mark.parametrize("name", LAYERS)
def test_full_rank_is_exact(name: str, scheme: Scheme) -> None:
    """At the full rank, and not at the rank below."""
    layer = LAYERS[name].double()
    full = _full_rank(scheme, ConvSpec.of(layer))
    exact, *below = (schemes.relative_error(layer.weight, kernel) for kernel in _kernels(scheme, layer, [full, full - 1][:full]))
    assert exact < 1e-10
    assert all(error > 1e-6 for error in below)


@pytest.mark.parametrize("name", LAYERS)
def test_error_falls_with_rank(name: str, scheme: Scheme) -> None:
    layer = LAYERS[name].double()
    ranks = list(range(1, _full_rank(scheme, ConvSpec.of(layer)) + 1))
    errors = [schemes.relative_error(layer.weight, kernel) for kernel in _kernels(scheme, layer, ranks)]
    assert all(error < previous for previous, error in pairwise(errors))


@pytest.mark.parametrize("name", LAYERS)
def test_chain_computes_what_its_kernel_does(name: str, scheme: Scheme) -> None:
    """The chain has the outputs of a dense layer with the kernel of its factors; geometry and bias are those of the layer."""
    layer = LAYERS[name].double()
    spec, x = ConvSpec.of(layer), torch.randn(2, layer.in_channels, 13, 17, dtype=torch.float64)
    for rank in range(1, _full_rank(scheme, spec) + 1):
        factors = next(schemes.factorize(scheme, spec, layer.weight, [rank]))
        chain = schemes.build(schemes.chain_of(scheme, spec, rank), layer, factors)
        expected = layer._conv_forward(x, schemes.kernel_of(scheme, spec, factors), layer.bias)
        assert [type(link) for link in chain] == [nn.Conv2d] * 4
        assert torch.allclose(chain(x), expected, atol=1e-10)


@pytest.mark.parametrize("name", ["plain", "grouped", "strided"])
def test_a_cut_network_folds_back(name: str, scheme: Scheme) -> None:
    """A plan at a fixed rank is applied, and the network folded back has the cut network's outputs."""
    layer = LAYERS[name].double()
    x = torch.randn(2, layer.in_channels, 13, 17, dtype=torch.float64)
    dense = nn.Sequential(layer, nn.ReLU())
    plan = make_plan(dense, x, schemes="tensor_train", rule="fixed", rank=2)
    assert [(cut.scheme, cut.rank) for cut in plan.cuts] == [("tensor_train", 2)]
    small = apply_plan(dense, plan)
    folded = fold_back(small, plan)
    assert type(folded[0]) is nn.Conv2d
    assert torch.allclose(folded(x), small(x), atol=1e-10)
    assert not torch.allclose(folded(x), dense(x), atol=1e-2)


def test_it_is_fitted_to_calibration_images(scheme: Scheme) -> None:
    """The search that all schemes share lowers the error of outputs."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2)).eval()
    images = torch.rand(64, 3, 15, 15).cumsum(2)
    settings = {"budget": Budget(macs=0.5), "schemes": "tensor_train", "exclude": "0"}
    free, fitted = (compress(model, images[:1], calibration=batches, **settings).model for batches in (None, [images]))
    with torch.no_grad():
        errors = [float((small(images) - model(images)).square().mean()) for small in (free, fitted)]
    assert errors[1] < 0.5 * errors[0]


def test_tensorly_backend_is_unchanged(scheme: Scheme) -> None:
    """In this thread and in others: tensorly's backend is global."""
    backends = [tensorly.get_backend()]
    next(schemes.factorize(scheme, ConvSpec.of(LAYERS["plain"]), LAYERS["plain"].weight, [3]))
    other = threading.Thread(target=lambda: backends.append(tensorly.get_backend()))
    other.start()
    other.join()
    assert [*backends, tensorly.get_backend()] == ["numpy"] * 3
