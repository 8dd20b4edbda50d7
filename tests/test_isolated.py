"""A cut network loads, runs and computes the same in a process that cannot import this library."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cifar import CifarResNet
from torch import Tensor, nn

from dsconv_surgery import Budget, apply_plan, make_plan

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCHEMES = ["depthwise", "tucker", "spatial", "bottleneck"]

PROLOGUE = """
import sys
sys.modules["dsconv_surgery"] = None
try:
    import dsconv_surgery
except ImportError:
    print("it cannot be imported")
else:
    raise SystemExit("dsconv_surgery is there: this process proves nothing")
import torch
folder = sys.argv[1]
x = torch.load(folder + "/x.pt")
"""
EPILOGUE = """
loaded = [name for name, module in sys.modules.items() if name.startswith("dsconv_surgery") and module is not None]
assert not loaded, loaded
torch.save(y, folder + "/y.pt")
"""


def elsewhere(folder: Path, body: str) -> Any:
    """Run `body`, which computes `y` from `x`, in a process without the library, and return `y`."""
    threads = f"torch.set_num_threads({torch.get_num_threads()})\n"  # the same order of sums as here
    run = subprocess.run(
        [sys.executable, "-c", PROLOGUE + threads + body + EPILOGUE, str(folder)],
        cwd=folder, env={"PYTHONPATH": str(EXAMPLES), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "it cannot be imported" in run.stdout
    return torch.load(folder / "y.pt")


@pytest.fixture(scope="module")
def cut() -> nn.Module:
    """A ResNet-20 with cuts of four schemes and updated BatchNorm statistics."""
    torch.manual_seed(0)
    model = CifarResNet(20)
    with torch.no_grad():
        model(torch.rand(8, 3, 32, 32))
    model.eval()
    plan = make_plan(model, torch.rand(1, 3, 32, 32), schemes=SCHEMES, budget=Budget(macs=0.6), rule="uniform")
    for name, scheme, rank in (("layer1.0.conv1", "depthwise", 2), ("layer1.0.conv2", "tucker", (4, 5)), ("layer1.1.conv1", "spatial", 6)):
        plan = plan.replace(name, scheme=scheme, rank=rank)
    assert {c.scheme for c in plan.cuts} >= set(SCHEMES[:3])
    return apply_plan(model, plan)


@pytest.fixture
def x(tmp_path: Path) -> Tensor:
    images = torch.rand(2, 3, 32, 32)
    torch.save(images, tmp_path / "x.pt")
    return images


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def test_a_blocked_import_is_noticed(tmp_path: Path, x: Tensor) -> None:
    """Code that needs the library fails in the isolated process."""
    with pytest.raises(AssertionError, match="ModuleNotFoundError"):
        elsewhere(tmp_path, "from dsconv_surgery.separable import DepthwiseConv2d\ny = x\n")


def test_a_pickled_cut_network_needs_only_its_own_class(cut: nn.Module, tmp_path: Path, x: Tensor) -> None:
    """After torch.save of the module, outputs are equal bit for bit, and training works."""
    torch.save(cut, tmp_path / "model.pt")
    y = elsewhere(
        tmp_path,
        "model = torch.load(folder + '/model.pt', weights_only=False)\n"
        "with torch.no_grad():\n    y = model(x)\n"
        "model.train()(x).sum().backward()\n"
        "assert all(p.grad is not None for p in model.parameters())\n",
    )
    assert torch.equal(y, run(cut, x))


def test_a_state_dict_holds_tensors_only(cut: nn.Module, tmp_path: Path, x: Tensor) -> None:
    """It loads with `weights_only=True`."""
    torch.save(cut.state_dict(), tmp_path / "state.pt")
    y = elsewhere(tmp_path, "y = torch.load(folder + '/state.pt', weights_only=True)\n")
    assert list(y) == list(cut.state_dict())
    assert all(torch.equal(y[name], value) for name, value in cut.state_dict().items())


def test_an_exported_cut_network_needs_no_class_at_all(cut: nn.Module, tmp_path: Path, x: Tensor) -> None:
    """With torch.export and a dynamic batch size."""
    program = torch.export.export(cut, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    torch.export.save(program, tmp_path / "model.pt2")
    body = (
        "model = torch.export.load(folder + '/model.pt2').module()\n"
        "assert 'cifar' not in sys.modules\n"
        "with torch.no_grad():\n    y = model(x), model(x.repeat(2, 1, 1, 1))\n"
    )
    y, twice = elsewhere(tmp_path, body)
    torch.testing.assert_close(y, run(cut, x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(twice, run(cut, x).repeat(2, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_scripted_cut_network_needs_no_class_at_all(cut: nn.Module, tmp_path: Path, x: Tensor) -> None:
    """With TorchScript."""
    torch.jit.trace(cut, x).save(str(tmp_path / "model.ts"))
    y = elsewhere(tmp_path, "with torch.no_grad():\n    y = torch.jit.load(folder + '/model.ts')(x)\n")
    torch.testing.assert_close(y, run(cut, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_cut_network_compiles(cut: nn.Module, x: Tensor, backend: str) -> None:
    """As one graph, forward and backward."""
    torch.compiler.reset()
    compiled = torch.compile(cut, backend=backend, fullgraph=True)
    torch.testing.assert_close(run(compiled, x), run(cut, x), rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(model(x).square().sum(), list(cut.parameters())) for model in (cut, compiled)]
    for eager, compiled_gradient in zip(*grads, strict=True):
        torch.testing.assert_close(compiled_gradient, eager, rtol=1e-4, atol=1e-4)


def test_a_cut_network_quantises(cut: nn.Module, x: Tensor) -> None:
    """Dynamic quantisation finds the links of a cut linear layer by their type."""
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    small = apply_plan(mlp, make_plan(mlp, x, schemes="bottleneck", budget=Budget(macs=0.5)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated in favour of torchao
        quantised = torch.ao.quantization.quantize_dynamic(small, {nn.Linear})
        kinds = {type(m).__module__ for name, m in quantised.named_modules() if name.endswith(("reduce", "expand"))}
        y = run(quantised, x)
    assert kinds == {"torch.ao.nn.quantized.dynamic.modules.linear"}
    torch.testing.assert_close(y, run(small, x), rtol=0.1, atol=0.05)
