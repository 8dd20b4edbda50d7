"""The same results on every device, to stated tolerances; only the order of sums differs, as TF32 is off."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsconv_surgery import Budget, FineTune, apply_plan, compare, compress, fine_tune, fold_back, load, make_plan, save
from dsconv_surgery.calibration.hooks import HookedPair
from dsconv_surgery.calibration.images import Images
from dsconv_surgery.calibration.moments import Moments, positions_of
from dsconv_surgery.calibration.output_metric import output_metrics
from dsconv_surgery.calibration.side_by_side import SideBySide, network_pair
from dsconv_surgery.network.geometry import ConvSpec
from dsconv_surgery.schemes import fit, get_scheme, kernel_of, kernel_tensor, refusal, scheme_names
from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.modes import standard_modes

IMAGES = torch.rand(48, 3, 12, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(10, (48,), generator=torch.Generator().manual_seed(1))
SETTINGS: dict[str, Any] = {"budget": Budget(macs=0.5), "schemes": ("cp", "spatial"), "exclude": (), "cache": False}


class Residual(nn.Module):
    """A BatchNorm, a ReLU, a sum, a stride, a bias and a linear layer; `branches` stops torch.fx."""

    def __init__(self, branches: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv3, self.linear = nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.Linear(16, 10)
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        if self.branches and bool(x.sum() < -1):
            return x
        x = F.relu(self.bn2(self.conv2(x)) + x)
        return self.linear(F.relu(self.conv3(x)).mean((2, 3)))


def network(branches: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = Residual(branches).train()
    with torch.no_grad():
        for _ in range(3):
            model(IMAGES)
    return model.eval()


@pytest.fixture(autouse=True)
def _fast_modes() -> Iterator[None]:
    """What many users set: TF32 wherever torch allows it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def moments_on(device: torch.device, layer: nn.Module) -> Moments:
    spec = ConvSpec.of(layer)
    x = torch.randn(20, 6, 9, 9, generator=torch.Generator().manual_seed(2)) + 3
    with torch.no_grad():
        target = torch.sin(copy.deepcopy(layer).cpu()(x))
    weight = kernel_tensor(spec, layer.get_parameter("weight"))
    moments = Moments(spec, weight, positions_of(spec, [(20, 9, 9)]), 600, 0, hold=True)
    for first in range(0, 20, 6):
        moments.add(x[first : first + 6].to(device), target[first : first + 6].to(device), first)
    return moments


def assert_close(result: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to the norm of the expected tensor."""
    difference = float(torch.linalg.vector_norm(result.detach().cpu().double() - expected.detach().cpu().double()))
    assert difference <= tolerance * float(torch.linalg.vector_norm(expected.detach().double()))


@standard_modes()
def test_moments(device: torch.device) -> None:
    """Sums over 600 drawn patches: to 1e-6 with the mean, and 1e-5 about it."""
    layer = nn.Conv2d(6, 8, 3, padding=1)
    expected, result = moments_on(torch.device("cpu"), layer), moments_on(device, copy.deepcopy(layer).to(device))
    for fold in ("fit", "held", "all"):
        assert result.count(fold) == expected.count(fold)
        for centred, tolerance in ((False, 1e-6), (True, 1e-5)):
            sides = [moments.objective(fold, centred) for moments in (result, expected)]
            for name in ("gram", "cross", "spread"):
                assert getattr(sides[0], name).device.type == device.type
                assert_close(getattr(sides[0], name), getattr(sides[1], name), tolerance)


@pytest.mark.parametrize("name", scheme_names())
@standard_modes()
def test_fits(name: str, device: torch.device) -> None:
    """The error of the fitted factors of every scheme, to a hundredth: searches take other paths after other roundings."""
    layer = nn.Conv2d(6, 8, 1 if name == "bottleneck" else 3, padding=0 if name == "bottleneck" else 1)
    scheme, spec = get_scheme(name), ConvSpec.of(layer)
    assert refusal(scheme, spec) is None
    full = scheme.full_rank(spec)
    rank = max(1, full // 2) if isinstance(full, int) else (3, 4)
    errors = []
    for place in (torch.device("cpu"), device):
        objective, weight = moments_on(place, copy.deepcopy(layer).to(place)).objective(), layer.weight.detach().to(place)
        factors = fit(scheme, spec, weight, rank, objective.ridged(0.1 * objective.scale))
        assert all(factor.device.type == place.type for factor in factors.values())
        errors.append(objective.value(kernel_of(scheme, spec, factors).unsqueeze(0)))
    assert errors[1] == pytest.approx(errors[0], rel=1e-2)
    assert errors[0] < 0.9


@standard_modes()
def test_output_metrics(device: torch.device) -> None:
    """Second moments of gradients of the same drawn directions, to 1e-4."""
    model, names = network(), ("conv1", "conv3", "linear")
    images = Images(IMAGES.split(24), Inputs(IMAGES[:1]))
    expected, result = output_metrics(model, images, names), output_metrics(copy.deepcopy(model).to(device), images, names)
    for name in names:
        assert result[name].device.type == device.type
        assert_close(result[name], expected[name], 1e-4)


def test_plans(device: torch.device) -> None:
    """The same MACs and sum of errors, to one percent; inputs and network are on the device."""
    model = network()
    expected = make_plan(model, IMAGES[:1], **SETTINGS)
    plan = make_plan(copy.deepcopy(model).to(device), IMAGES[:1].to(device), **SETTINGS)
    assert plan.total_after.macs == pytest.approx(expected.total_after.macs, rel=1e-2)
    errors = [sum(cut.error or 0.0 for cut in p.cuts) for p in (plan, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


@pytest.mark.parametrize("branches", [False, True], ids=["traced", "hooked"])
def test_calibrated_cuts(branches: bool, device: torch.device) -> None:
    """With one plan, the same output error to five percent, and outputs to two percent of the dense network's."""
    model = network(branches)
    placed, batches = copy.deepcopy(model).to(device), IMAGES.split(24)
    images = Images(batches, Inputs(IMAGES[:1]))
    assert isinstance(network_pair(placed, images, ["conv2"]), HookedPair if branches else SideBySide)
    plan = make_plan(model, IMAGES[:1], calibration=batches, **SETTINGS)
    expected, result = (apply_plan(net, plan, calibration=batches) for net in (model, placed))
    assert {tensor.device.type for tensor in result.state_dict().values()} == {device.type}
    sides = (model, expected, IMAGES[:1]), (placed, result, IMAGES[:1].to(device))
    reports = [compare(dense, small, x, plan=plan, data=batches) for dense, small, x in sides]
    errors = [report.fidelity.error for report in reports if report.fidelity]
    assert errors[1] == pytest.approx(errors[0], rel=5e-2)
    with torch.no_grad():
        difference = result(IMAGES.to(device)).cpu() - expected(IMAGES)
        assert float(difference.norm()) <= 2e-2 * float(model(IMAGES).norm())


def test_calibrated_plan_and_cut_in_one_call(device: torch.device) -> None:
    model = network().to(device)
    small = compress(model, IMAGES[:1].to(device), calibration=IMAGES.split(24), **SETTINGS)
    assert small.report.macs_saved == pytest.approx(0.5, abs=0.1)
    folded = fold_back(small.model, small.plan)
    with standard_modes(), torch.no_grad():
        x = IMAGES.to(device)
        assert_close(folded(x), small.model(x).cpu(), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_and_channels_last(dtype: torch.dtype, device: torch.device) -> None:
    """The self-check passes, and dtype and memory format stay."""
    model, x = network().to(device, dtype, memory_format=torch.channels_last), IMAGES[:2].to(device, dtype)
    small = compress(model, x.to(memory_format=torch.channels_last), **SETTINGS)
    assert {p.dtype for p in small.model.parameters()} == {dtype}
    assert small.model(x).isfinite().all()


def test_the_self_check_finds_another_result(device: torch.device) -> None:
    class ByType(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 24, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * (1 if isinstance(self.layer, nn.Conv2d) else 1.01)

    model = ByType().to(device)
    plain = nn.Sequential()
    plain.layer = nn.Conv2d(3, 24, 3)  # type: ignore[assignment]
    plan = make_plan(plain, IMAGES[:1], schemes="spatial", rule="fixed", rank=2, exclude=(), cache=False)
    with pytest.raises(ValueError, match="does not compute what the dense network computes"):
        apply_plan(model, plan, IMAGES[:1].to(device))


def tuned(place: torch.device, checkpoint: Path, stop_after: int | None = None) -> list[float]:
    """The losses of six steps; with `stop_after`, of a run that was interrupted after that step and resumed."""
    dense = network().to(place)
    small = apply_plan(dense, make_plan(network(), IMAGES[:1], **SETTINGS))
    losses: list[float] = []

    def interrupt(step: int, values: Any) -> None:
        losses.append(values["loss"])
        if step == stop_after and len(losses) == stop_after:
            raise KeyboardInterrupt

    batches, settings = [*zip(IMAGES.split(16), LABELS.split(16), strict=True)], FineTune(epochs=2, save_every=2)
    for _ in range(1 if stop_after is None else 2):
        with suppress(KeyboardInterrupt):
            fine_tune(small, batches, teacher=dense, settings=settings, callback=interrupt, checkpoint=checkpoint)
    assert {tensor.device.type for tensor in small.state_dict().values()} == {place.type}
    return losses


def test_fine_tuning(device: torch.device, tmp_path: Path) -> None:
    """With batches on the CPU: the loss of the first step to 1e-3, of the others to five percent; a resumed run ends the same."""
    expected, losses = tuned(torch.device("cpu"), tmp_path / "cpu.pt"), tuned(device, tmp_path / "device.pt")
    assert len(losses) == 6
    assert losses[0] == pytest.approx(expected[0], rel=1e-3)
    assert losses == pytest.approx(expected, rel=5e-2)
    resumed = tuned(device, tmp_path / "resumed.pt", stop_after=5)
    assert len(resumed) == 7  # the fifth step was not saved
    assert resumed[-1] == pytest.approx(losses[-1], rel=1e-3)


def test_save_and_load_across_devices(device: torch.device, tmp_path: Path) -> None:
    """Bit for bit, from the device to the CPU and back."""
    model = network()
    small = compress(copy.deepcopy(model).to(device), IMAGES[:1].to(device), **SETTINGS)
    save(small, tmp_path / "net")
    for fresh in (model, copy.deepcopy(model).to(device)):
        loaded = load(fresh, tmp_path / "net")
        place = next(fresh.parameters()).device
        assert all(value.device == place for value in loaded.state_dict().values())
        for name, value in small.model.state_dict().items():
            assert torch.equal(value.cpu(), loaded.state_dict()[name].cpu())


def test_latency(device: torch.device) -> None:
    """Layers and networks are timed on the device of the inputs."""
    model, x = network().to(device), IMAGES[:4].to(device)
    make_plan(model, x, schemes="spatial", budget=Budget(latency=1.0), exclude=(), cache=False)
    small = compress(model, x, schemes="spatial", rule="fixed", rank=2, cache=False)
    latency = compare(model, small.model, x, plan=small.plan, latency=True).latency
    assert latency is not None
    assert min(latency.before, latency.after) > 0
    assert latency.conditions.device == str(x.device)


def test_the_random_state_of_the_device_stays(device: torch.device) -> None:
    model, x = network().to(device), IMAGES[:1].to(device)
    draws = []
    for used in (False, True):
        torch.manual_seed(5)
        if used:
            compress(model, x, calibration=IMAGES.split(24), schemes="spatial", rule="fixed", rank=2, cache=False)
        draws.append(torch.rand(4, device=device))
    assert torch.equal(*draws)


def test_inputs_and_networks_on_different_devices(device: torch.device) -> None:
    """Batches are moved to the network; for example inputs, the error names both devices and the call."""
    model, batches = network(), [part.to(device) for part in IMAGES.split(24)]
    small = compress(model, IMAGES[:1], calibration=batches, schemes="spatial", rule="fixed", rank=2, cache=False)
    assert next(small.model.parameters()).device.type == "cpu"
    with pytest.raises(ValueError, match=r"on meta.*The network is on cpu.*inputs\.to\('cpu'\)"):
        make_plan(model, IMAGES[:1].to("meta"), **SETTINGS)
