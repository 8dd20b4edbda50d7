"""Moments of patches: exact for every geometry, accurate for a small variance, and defined where there is none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsconv_surgery import compare, compress
from dsconv_surgery.calibration.moments import Moments, extract_patches, positions_of
from dsconv_surgery.network.geometry import ConvSpec
from dsconv_surgery.network.layers import check_finite_state
from dsconv_surgery.schemes import get_scheme, kernel_tensor, naming_layer, refusal, scheme_names
from dsconv_surgery.schemes.objective import LinAlgError, ridged_cholesky

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

MODES = ("zeros", "reflect", "replicate", "circular")
KERNELS = ((1, 1), (2, 2), (3, 3), (4, 4), (6, 6), (2, 3), (4, 1), (1, 2), (3, 4))
PADDINGS: tuple[Any, ...] = ("same", "valid", 0, 1, (2, 1), (0, 2))


def moments_of(layer: nn.Module, x: Tensor, with_targets: bool = False, patches: int = 10**6) -> Moments:
    spec = ConvSpec.of(layer)
    size = (len(x), *(x.shape[-2:] if x.ndim == 4 else (1, 1)))
    moments = Moments(spec, kernel_tensor(spec, layer.get_parameter("weight")), positions_of(spec, [size]), patches, 0, False)
    with torch.no_grad():
        moments.add(x, layer(x) if with_targets else None, 0)
    return moments


def assert_patches_reproduce(layer: nn.Conv2d, x: Tensor) -> None:
    """The kernel times the patches is the layer's output."""
    spec = ConvSpec.of(layer)
    kernel = kernel_tensor(spec, layer.weight).flatten(2).float()
    with torch.no_grad():
        output = layer(x)
    product = (extract_patches(spec, x, None) @ kernel.mT).mT.flatten(1, 2).reshape(output.shape)
    torch.testing.assert_close(product, output, rtol=1e-4, atol=1e-5, msg=f"{layer} on {tuple(x.shape)}")


@pytest.mark.parametrize("mode", MODES)
def test_kernels_times_patches_are_outputs(mode: str) -> None:
    for kernel in KERNELS:
        for padding in PADDINGS:
            for stride, dilation, groups in ((1, 1, 1), (1, 2, 2), (2, 1, 4), ((1, 2), (2, 1), 1)):
                if padding != "same" or stride == 1:
                    layer = nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups, False, mode)
                    assert_patches_reproduce(layer, torch.randn(2, 4, 12, 13))


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)])
def test_patches_of_inputs_with_one_row_or_column(shape: tuple[int, int]) -> None:
    for mode in ("zeros", "replicate"):
        for kernel in ((3, 3), (4, 4), (2, 5)):
            layer = nn.Conv2d(4, 6, kernel, padding="same", bias=False, padding_mode=mode)
            assert_patches_reproduce(layer, torch.randn(2, 4, *shape))
    assert_patches_reproduce(nn.Conv2d(4, 6, 3, padding=1, bias=False), torch.randn(3, 4, *shape))


def test_patches_of_views() -> None:
    """Memory formats, slices and expanded inputs."""
    layer = nn.Conv2d(4, 6, (4, 3), padding="same", bias=False)
    valid = nn.Conv2d(4, 6, 3, bias=False)
    x = torch.randn(4, 8, 9, 11)
    for view in (x[1:, 2:6], x[:, ::2, 1:, ::2], x[:, :4].contiguous(memory_format=torch.channels_last), x[:1, :4].expand(3, -1, -1, -1)):
        assert_patches_reproduce(layer, view)
        assert_patches_reproduce(valid, view)


@pytest.mark.parametrize("kernel", [2, 4, (4, 3), 5])
@pytest.mark.parametrize("mode", MODES)
def test_errors_of_plans_for_same_kernels_are_measured_ones(kernel: Any, mode: str) -> None:
    layer = nn.Conv2d(4, 12, kernel, padding="same", padding_mode=mode, dilation=2 if kernel == 4 else 1)
    x = torch.rand(8, 4, 10, 10)
    for scheme in ("channel", "spatial"):
        small = compress(nn.Sequential(layer), x[:1], calibration=[x], rule="fixed", rank=3, schemes=scheme, cache=False)
        with torch.no_grad():
            a, b = (y - y.mean((0, 2, 3), keepdim=True) for y in (layer(x), small.model(x)))
        assert small.plan.cuts[0].error == pytest.approx(float((a - b).square().sum() / a.square().sum()), rel=1e-3)


@pytest.mark.parametrize("patches", [10**6, 20], ids=["gram", "rows"])
@pytest.mark.parametrize("offset", [0.0, 1.0, 1e3])
def test_a_small_variance_beside_a_large_mean(offset: float, patches: int) -> None:
    """The moments equal those of float64 sums about the mean."""
    layer = nn.Conv2d(3, 5, 3, bias=True)
    x = torch.randn(6, 3, 8, 8) * 1e-2 + offset
    moments = moments_of(layer, x, with_targets=True, patches=patches)
    objective = moments.objective("all", centred=True)
    spec = ConvSpec.of(layer)
    if not moments.as_rows:
        p = extract_patches(spec, x, None).transpose(0, 1).flatten(1, 2).double()
        c = p - p.mean(1, keepdim=True)
        exact = c.mT @ c / c.shape[1]
        torch.testing.assert_close(objective.gram, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
    gram = objective.gram.mT @ objective.gram if moments.as_rows else objective.gram
    assert float(torch.linalg.eigvalsh(gram).min()) > -1e-6 * float(gram.abs().max())
    own = float((objective.weight @ gram @ objective.weight.mT).diagonal(dim1=1, dim2=2).sum())
    assert objective.energy == pytest.approx(own, rel=1e-2 if offset > 1 else 1e-4)  # float32 outputs near 1,000 resolve 1e-4 only


@pytest.mark.parametrize("with_targets", [False, True])
@pytest.mark.parametrize("patches", [10**6, 4], ids=["gram", "rows"])
def test_variance_of_rounding_errors_counts_as_none(patches: int, with_targets: bool) -> None:
    """One image, one patch, constant and zero images: errors are 0 for the same kernel, and 0 or 1 for others."""
    for x in (torch.full((4, 3, 8, 8), 0.7), torch.zeros(4, 3, 8, 8), torch.rand(1, 3, 3, 3), 0.3 + 1e-8 * torch.rand(2, 3, 8, 8)):
        layer = nn.Conv2d(3, 5, 3)
        objective = moments_of(layer, x, with_targets, patches).objective("all", centred=True, exact=not with_targets)
        assert objective.energy == 0.0
        assert objective.value(objective.weight) == 0.0
        for kernel in (objective.weight * 0, torch.randn_like(objective.weight)):
            assert objective.value(kernel) in (0.0, 1.0)
        assert bool(objective.target().isfinite().all())


def test_errors_are_never_negative() -> None:
    layer = nn.Conv2d(3, 5, 3)
    objective = moments_of(layer, torch.rand(2, 3, 8, 8) + 100, with_targets=True).objective()
    for scale in (0.0, 1e-4, 1e-8):
        value = objective.value(objective.weight + scale * torch.randn_like(objective.weight))
        assert 0 <= value < math.inf


def test_moments_that_are_not_finite_name_the_layer() -> None:
    for x in (torch.full((2, 3, 8, 8), math.inf), torch.rand(2, 3, 8, 8) * 1e30):
        with pytest.raises(ValueError, match=r"features.0: cannot be fitted .* not finite, or too large"), naming_layer("features.0"):
            moments_of(nn.Conv2d(3, 5, 3), x, with_targets=True).objective()


def test_ridges_grow_until_a_matrix_is_positive_definite() -> None:
    vectors = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    matrix = vectors @ torch.diag(torch.tensor([1.0, 1e-3, 0.0, -1e-6], dtype=torch.float64)) @ vectors.mT
    factor = ridged_cholesky(matrix, torch.full((4,), 1e-9, dtype=torch.float64))
    torch.testing.assert_close(factor @ factor.mT, matrix, rtol=0, atol=2e-3)
    with pytest.raises(LinAlgError, match="not positive definite"):
        ridged_cholesky(torch.full((2, 2), math.nan), torch.ones(2))


def networks_with_little_to_fit() -> dict[str, tuple[nn.Module, Tensor]]:
    def net(**options: Any) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, **options)).eval()

    x = torch.rand(6, 3, 7, 7)
    zero, dead, part = net(), net(), net(groups=2)
    nn.init.zeros_(zero[2].weight)
    nn.init.constant_(dead[0].bias, -9.0)
    nn.init.constant_(part[0].bias[:5], -9.0)
    one = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3), nn.Flatten(), nn.Linear(9, 1)).eval()
    grouped = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3, groups=2)).eval()
    return {
        "zero weight": (zero, x),
        "dead inputs": (dead, x),
        "dead channels": (part, x),
        "duplicates": (net(), x[:1].expand(6, -1, -1, -1).clone()),
        "one image": (net(bias=False), x[:1]),
        "zero images": (net(), 0 * x),
        "constant images": (net(), 0 * x + 0.7),
        "one output": (one, x),
        "one output per group": (grouped, x),
    }


@pytest.mark.parametrize("case", networks_with_little_to_fit())
def test_every_scheme_on_networks_with_little_to_fit(case: str) -> None:
    model, x = networks_with_little_to_fit()[case]
    for scheme in scheme_names():
        layer = ConvSpec.of(model[2])
        if refusal(get_scheme(scheme), layer):
            continue
        rank: Any = (1, 1) if scheme == "tucker" else 1
        small = compress(model, x[:1], calibration=[x], rule="fixed", rank=rank, schemes=scheme, include="2", cache=False)
        assert all(cut.error is not None and math.isfinite(cut.error) and cut.error >= 0 for cut in small.plan.cuts), small.plan
        fidelity = compare(model, small.model, x[:1], plan=small.plan, data=[x]).fidelity
        assert fidelity is not None
        assert all(math.isfinite(error) and error >= 0 for error in (fidelity.error, *fidelity.layer_errors.values()))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_biases_and_statistics_that_are_not_finite(value: float) -> None:
    for key in ("0.bias", "1.running_mean", "1.running_var", "1.weight", "1.bias", "2.bias"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8))
        check_finite_state(model)
        module, _, name = key.partition(".")
        getattr(model[int(module)], name).data[3] = value
        with pytest.raises(ValueError, match=f"{key}: 1 of 8 entries are NaN or infinite"):
            check_finite_state(model)
    check_finite_state(nn.Conv2d(3, 8, 3, device="meta"))


def test_a_buffer_of_another_module_may_be_infinite() -> None:
    module = nn.Module()
    module.register_buffer("mask", torch.full((2, 2), -math.inf))
    check_finite_state(module)
