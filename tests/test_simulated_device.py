"""Every public function on a simulated GPU: no operation mixes devices, and no loop over batches or steps waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from simulated_device import SimulatedDevice
from test_devices import IMAGES, LABELS, SETTINGS, network
from torch import Tensor, nn

from dsconv_surgery import Budget, FineTune, apply_plan, compare, compress, find_convs, fine_tune, fold_back, load, make_plan, save
from dsconv_surgery.calibration import reconstruct
from dsconv_surgery.calibration.images import Images
from dsconv_surgery.calibration.output_metric import output_metrics
from dsconv_surgery.planning import option_fits
from dsconv_surgery.schemes import als, fitting, scheme_names
from dsconv_surgery.support import distributed, modes, random_state
from dsconv_surgery.support.copies import own_copy, to_device
from dsconv_surgery.support.fidelity import OutputComparison, measure_fidelity
from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.latency import measure_latency
from dsconv_surgery.support.outputs import OutputSelector

BATCHES = IMAGES[:32].split(16)
FIXED: dict[str, Any] = {"rule": "fixed", "exclude": ("linear",), "cache": False, "calibration": BATCHES}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedDevice]:
    """A simulated GPU; searches are short, as each of their operations is checked."""
    monkeypatch.setattr(fitting, "ITERATIONS", 1)
    monkeypatch.setattr(als, "SWEEPS", 1)
    monkeypatch.setattr(reconstruct, "TRIAL", 1)
    monkeypatch.setattr(option_fits, "ITERATIONS", 1)
    device = SimulatedDevice()
    with device.active():
        yield device


def off_device(gpu: SimulatedDevice, model: nn.Module) -> list[str]:
    """The names of tensors that are not on the device."""
    return [name for name, tensor in model.state_dict().items() if not gpu.holds(tensor)]


def test_the_simulated_device_behaves_like_a_gpu(gpu: SimulatedDevice) -> None:
    x, y = gpu.put(torch.ones(3)), torch.ones(3)
    for mixed in (lambda: x + y, lambda: x.add_(y), lambda: torch.cat([x, torch.ones(1)]), lambda: x.new_zeros(3) + torch.zeros(3)):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device=x.device, generator=torch.Generator())
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    assert x.device.type == "cuda"
    assert y.device.type == (x + 1).cpu().device.type == "cpu"
    for made in (x * 2, x[1:], y.to(x), y.to(x.device), torch.zeros(2, device=x.device), x + torch.tensor(2.0), x[torch.tensor([0])]):
        assert gpu.holds(made)
    copied = y.clone()
    copied.copy_(x * 3)
    assert not gpu.holds(copied)
    assert copied.tolist() == [3.0] * 3


def test_data_free_plan_cut_and_fold_back(gpu: SimulatedDevice) -> None:
    model, x = gpu.put(network()), gpu.put(IMAGES[:1])
    assert len(find_convs(model, x)) == 4
    plan = make_plan(model, x, **{**SETTINGS, "schemes": ("channel", "spatial")})
    small = apply_plan(model, plan, x)
    assert off_device(gpu, small) == off_device(gpu, fold_back(small, plan)) == []
    with pytest.raises(ValueError, match=r"on cpu.*The network is on cuda:0.*inputs\.to\('cuda:0'\)"):
        make_plan(model, IMAGES[:1], **SETTINGS)


@pytest.mark.parametrize("scheme", scheme_names())
def test_calibrated_cuts_of_every_scheme(scheme: str, gpu: SimulatedDevice) -> None:
    model = gpu.put(network())
    rank = (2, 2) if scheme == "tucker" else 2
    small = compress(model, gpu.put(IMAGES[:1]), schemes=scheme, rank=rank, **FIXED)
    assert off_device(gpu, small.model) == []


@pytest.mark.parametrize("branches", [False, True], ids=["traced", "hooked"])
def test_calibrated_plan_comparison_and_files(branches: bool, gpu: SimulatedDevice, tmp_path: Path) -> None:
    model, x = gpu.put(network(branches)), gpu.put(IMAGES[:1])
    small = compress(model, x, budget=Budget(macs=0.6), schemes=("spatial",), exclude=(), cache=False, calibration=BATCHES)
    assert compare(model, small.model, x, plan=small.plan, data=BATCHES).fidelity is not None
    save(small, tmp_path / "net")
    assert off_device(gpu, load(gpu.put(network(branches)), tmp_path / "net")) == []


@pytest.mark.parametrize("settings", [FineTune(epochs=2), FineTune(epochs=2, optimizer="adamw", accumulate=2)], ids=["soap", "accumulated"])
def test_a_step_of_fine_tuning_waits_once(settings: FineTune, gpu: SimulatedDevice, tmp_path: Path) -> None:
    """To read the loss and the norm of the gradient; images are mixed on the device."""
    model = gpu.put(network())
    small = apply_plan(model, make_plan(model, gpu.put(IMAGES[:1]), schemes="spatial", rule="fixed", rank=2, cache=False))
    batches, gpu.waits = [*zip(IMAGES.split(16), LABELS.split(16), strict=True)], type(gpu.waits)()
    history = fine_tune(small, batches, teacher=model, settings=settings, checkpoint=tmp_path / "run.pt")
    waits = {place: count for place, count in gpu.waits.items() if place.startswith("finetuning/") and "checkpoint" not in place}
    assert waits == {"finetuning/loop.py:_step": history.epochs[-1].steps}
    assert off_device(gpu, small) == []


def test_passes_over_images_do_not_wait(gpu: SimulatedDevice) -> None:
    """Fidelity, output metrics and the data of moments: as many waits for eight batches as for two."""
    model, names = gpu.put(network()), ("conv1", "conv3", "linear")
    plan = make_plan(model, gpu.put(IMAGES[:1]), schemes="spatial", rule="fixed", rank=2, exclude=("linear",), cache=False)
    small = apply_plan(model, plan)
    counts: list[dict[str, int]] = []
    for size in (24, 6):
        batches = gpu.put(IMAGES).split(size)
        images = Images(batches, Inputs(gpu.put(IMAGES[:1])))
        gpu.waits.clear()
        measure_fidelity(model, small, images, OutputSelector(), {"conv1": "conv1"})
        assert set(output_metrics(model, images, names)) == set(names)
        apply_plan(model, plan, calibration=batches)
        checks = ("support/inputs.py", "support/cache.py", "schemes/")  # a search takes as many steps as it needs
        counts.append({place: count for place, count in gpu.waits.items() if not place.startswith(checks)})
    assert counts[0] == counts[1]


def test_a_network_on_the_cpu_with_images_on_the_device(gpu: SimulatedDevice) -> None:
    """The copies have arrived before they are read."""
    x = gpu.put(IMAGES[:4])
    assert torch.equal(to_device(x, torch.device("cpu")), IMAGES[:4])
    assert torch.equal(own_copy(Inputs(x), torch.device("cpu")).args[0], IMAGES[:4])
    small = compress(network(), IMAGES[:1], schemes="spatial", rank=2, **{**FIXED, "calibration": gpu.put(BATCHES)})
    assert not any(map(gpu.holds, small.model.state_dict().values()))


def test_sums_over_processes_of_a_group_without_the_cpu(gpu: SimulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """nccl alone sums nothing on the CPU, so such values travel over the device."""

    def add_the_same_of_another_process(value: Tensor) -> None:
        assert gpu.holds(value)
        value.mul_(2)

    monkeypatch.setattr(distributed, "process_and_world_size", lambda: (0, 2))
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "all_reduce", add_the_same_of_another_process)
    for value in (torch.tensor([1.0, 2.0]), gpu.put(torch.tensor([1.0, 2.0]))):
        total = distributed.all_reduce_sum(value)
        assert gpu.holds(total) == gpu.holds(value)
        assert total.tolist() == [2.0, 4.0]
        assert value.tolist() == [1.0, 2.0]
    assert distributed.all_reduce_mean(3.0) == 3.0


def test_comparisons_without_infinite_entries() -> None:
    """Entries that are the same infinity in both networks add nothing, of any shape and precision."""
    a, b = torch.tensor([[1.0, float("inf")], [2.0, -float("inf")]]), torch.tensor([[3.0, float("inf")], [2.0, -float("inf")]])
    for target, output in ((a, b), (a.half(), b.half())):
        comparison = OutputComparison(OutputSelector(lambda y: y[None]))
        comparison.add(target, output, 2)
        assert comparison.squared_error == 4.0
        assert comparison.error == 4 / 5


def test_seeds_do_not_reach_a_cuda_that_is_not_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed notes seeds for the first use of CUDA. Then they would replace the caller's, long after the block."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    for initialised in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda initialised=initialised: initialised)
        random_state.seed_torch(7)
        assert (7 in seeds) == initialised
        first = torch.rand(2)
        random_state.seed_torch(7)
        assert torch.equal(first, torch.rand(2))


def test_tf32_is_off_except_for_training_and_timings() -> None:
    """The caller's switches are set back, and nested calls know them, too."""

    class Watch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            precisions.append([getattr(operation, name) for operation, name, _ in modes._SWITCHES])
            return self.layer(x).mean((2, 3))

    precisions: list[Any] = []
    model, off = Watch(), [value for *_, value in modes._SWITCHES]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        callers = [getattr(operation, name) for operation, name, _ in modes._SWITCHES]
        small = compress(model, IMAGES[:1], schemes="spatial", rule="fixed", rank=2, exclude=(), cache=False, calibration=BATCHES)
        assert callers != off
        assert all(state == off for state in precisions)
        precisions.clear()
        fine_tune(small.model, BATCHES, teacher=model, settings=FineTune(epochs=1, optimizer="adamw"))
        measure_latency([model], Inputs(IMAGES[:1]), rounds=1)
        with modes.standard_modes(), modes.standard_modes():
            measure_latency([model], Inputs(IMAGES[:1]), rounds=1)
        assert all(state == callers for state in precisions)
        assert [getattr(operation, name) for operation, name, _ in modes._SWITCHES] == callers
    finally:
        torch.set_float32_matmul_precision(before)
