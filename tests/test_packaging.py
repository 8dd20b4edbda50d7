"""The wheel: its content, and the command line where it is installed without the extras."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from dsconv_surgery.checkpoint import read_plan

ROOT = Path(__file__).resolve().parent.parent
EXTRA_MODULES = (
    "PIL", "hatchling", "hypothesis", "matplotlib", "mypy", "onnx", "onnxruntime", "onnxscript", "opt_einsum", "pytest", "timm",
    "torchvision",
)  # fmt: skip

SMALL_NET = """\
from torch import nn


def build():
    convolutions = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3)
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))
"""


def run(*command: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A finished process that exited with 0; it does not see this checkout through PYTHONPATH."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, f"{command}\n{process.stdout}\n{process.stderr}"
    return process


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout. `hatchling`, the build backend, comes with the test extra, so no network is needed."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ".")
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts folder of a virtual environment with the wheel and its dependencies, in which no module of an extra can be imported.

    The dependencies are those of the running environment, added by a .pth file, which spares the installation of torch.
    """
    folder = tmp_path_factory.mktemp("bare") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    scripts = folder / "bin"
    run(sys.executable, "-m", "pip", "--python", scripts / "python", "install", "--quiet", "--no-deps", "--no-index", wheel)
    site_packages = run(scripts / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    running = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *(path for path in sys.path if "-packages" in path)})
    blocked = f"import sys; sys.modules.update(dict.fromkeys({EXTRA_MODULES}))"  # None in sys.modules makes an import fail
    (Path(site_packages) / "dependencies.pth").write_text("\n".join([*running, blocked]) + "\n")
    return scripts


def test_wheel_holds_the_package_the_recipes_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dsconv_surgery").rglob("*") if path.suffix in (".py", ".typed")}
    recipes = {name.removeprefix("dsconv_surgery/recipes/") for name in names if name.startswith("dsconv_surgery/recipes/")}
    assert names - {f"dsconv_surgery/recipes/{name}" for name in recipes} == files
    stems = {path.stem for path in (ROOT / "recipes").glob("*.toml")}
    assert len(stems) > 5
    assert recipes == {f"{stem}{suffix}" for stem in stems for suffix in (".toml", ".json")} | {"README.md"}


def test_wheel_asks_for_its_dependencies_and_offers_the_extras(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    needed = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.M)
    assert {"torch", "numpy", "scipy", "tensorly", "typer"} <= set(needed)
    assert not {"matplotlib", "pillow", "timm", "torchvision"} & set(needed)
    assert set(re.findall(r"^Provides-Extra: (\w+)$", metadata, re.M)) == {"examples", "onnx", "plot", "test"}


def test_command_line_works_without_the_extras(bare: Path, tmp_path: Path) -> None:
    """In a folder that has nothing but a module with a small network."""
    (tmp_path / "small_net.py").write_text(SMALL_NET)
    command, network = bare / "dsconv-surgery", ("small_net:build", "--input", "1,3,12,12")
    file = run(bare / "python", "-c", "import dsconv_surgery; print(dsconv_surgery.__file__)", cwd=tmp_path).stdout
    assert str(bare.parent) in file
    assert "compress" in run(command, "--help", cwd=tmp_path).stdout
    assert "resnet20-cifar10-macs-50" in run(command, "recipes", cwd=tmp_path).stdout
    assert "3x3 8 -> 12" in run(command, "inspect", *network, cwd=tmp_path).stdout
    settings = ("--macs", "0.6", "--schemes", "channel", "--rule", "uniform", "--out", "small")
    assert "MACs" in run(command, "compress", *network, *settings, cwd=tmp_path).stdout
    assert read_plan(tmp_path / "small").cuts


@pytest.mark.parametrize("module", EXTRA_MODULES)
def test_modules_of_the_extras_are_not_importable_there(module: str, bare: Path) -> None:
    """Without this, the test above would prove nothing."""
    process = subprocess.run([bare / "python", "-c", f"import {module}"], capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert "ModuleNotFoundError" in process.stderr


def test_a_plot_without_matplotlib_names_it(bare: Path, tmp_path: Path) -> None:
    code = """
import torch
from small_net import build
from dsconv_surgery import pareto
sweep = pareto(build(), torch.zeros(1, 3, 12, 12), fractions=[0.8], schemes="channel", evaluate=lambda model: 1.0)
try:
    sweep.plot("sweep.png")
except ValueError as error:
    print(error)
"""
    (tmp_path / "small_net.py").write_text(SMALL_NET)
    (tmp_path / "draw.py").write_text(code)
    assert "matplotlib" in run(bare / "python", "draw.py", cwd=tmp_path).stdout
    assert not (tmp_path / "sweep.png").exists()


def test_a_plan_for_onnxruntime_without_it_names_the_command(bare: Path, tmp_path: Path) -> None:
    (tmp_path / "small_net.py").write_text(SMALL_NET)
    words = ("small_net:build", "--input", "1,3,12,12", "--latency", "0.9", "--runtime", "onnxruntime", "--out", "small")
    process = subprocess.run([bare / "dsconv-surgery", "compress", *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1] == "error: ONNX needs onnx: pip install 'dsconv_surgery[onnx]'."
    assert not (tmp_path / "small").exists()


def test_help_does_not_import_torch() -> None:
    """`dsconv-surgery --help` answers at once: the package and the command line import torch only once a command needs it."""
    code = """
import sys
sys.argv = ["dsconv-surgery", "--help"]
from dsconv_surgery.cli.commands import main
try:
    main()
except SystemExit:
    pass
print("torch imported:", "torch" in sys.modules)
"""
    printed = run(sys.executable, "-c", code).stdout
    assert "compress" in printed
    assert printed.endswith("torch imported: False\n")
