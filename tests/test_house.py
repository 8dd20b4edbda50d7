"""The house: lint, types, what the README shows, and the examples, each run as a user would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def run(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900, env={**os.environ, "TQDM_DISABLE": "1"})
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_lint() -> None:
    run(sys.executable, "-m", "ruff", "check", ".")
    run(sys.executable, "-m", "ruff", "format", "--check", ".")


def test_types() -> None:
    run(sys.executable, "-m", "mypy")


def test_quickstart_prints_what_the_readme_shows() -> None:
    """Costs to the digit; accuracies to a point, as they differ between machines in the last bits; the rest to the letter."""
    shown = re.search(r"<!-- quickstart -->\n```\n(.*?)```", README, re.S)
    assert shown is not None
    printed = run(sys.executable, "examples/quickstart.py").splitlines()
    for line in shown[1].splitlines():
        if "accuracy" in line:
            found = next(p for p in printed if p.split("%")[-1] == line.split("%")[-1] and p.startswith("accuracy"))
            was, now = (re.findall(r"([\d.]+) %", text) for text in (line, found))
            assert [float(a) for a in was] == pytest.approx([float(a) for a in now], abs=1.0)
        else:
            assert line in printed


def test_six_lines_print_what_the_readme_shows(tmp_path: Path) -> None:
    """The README's own code, run to the letter in an empty folder."""
    code = re.search(r"<!-- run with torchvision -->\n```python\n(.*?)```.*?```\n(.*?)```", README, re.S)
    assert code is not None
    script = tmp_path / "six.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import conftest\n" + code[1])
    assert run(sys.executable, str(script), cwd=tmp_path).strip() == code[2].strip()
    assert (tmp_path / "resnet18-half" / "plan.json").exists()


def test_torchvision_example(tmp_path: Path) -> None:
    command = (
        "examples/torchvision_resnet.py",
        "--weights",
        "none",
        "--size",
        "64",
        "--schemes",
        "channel",
        "--out",
        str(tmp_path / "out"),
    )
    printed = run(sys.executable, *command)
    assert "same outputs: True" in printed
    assert re.search(r"latency [\d.]+ -> [\d.]+ ms", printed)


def test_torchvision_example_takes_trained_weights(shared: Path, tmp_path: Path) -> None:
    """A state_dict of ten classes in half precision; spatial and channel, as they come."""
    weights = str(shared / "weights" / "torchvision_resnet18_cifar10_64px.safetensors")
    command = ("examples/torchvision_resnet.py", "--weights", weights, "--size", "64", "--out", str(tmp_path / "out"))
    printed = run(sys.executable, *command, "--schemes", "spatial", "channel", "bottleneck")
    assert "same outputs: True" in printed


def test_training_example_learns(tmp_path: Path) -> None:
    """One epoch on the shipped images alone already beats chance by far, and its checkpoint loads."""
    from cifar import accuracy, demo_images, load_resnet

    out = tmp_path / "net.safetensors"
    run(
        sys.executable,
        "examples/train_cifar.py",
        "--data",
        "examples/assets",
        "--out",
        str(out),
        "--epochs",
        "2",
        "--depth",
        "8",
        "--batch",
        "64",
    )
    assert accuracy(load_resnet(out, depth=8), *demo_images("test")) > 25


def test_readme_names_every_scheme() -> None:
    from dsconv_surgery.schemes import scheme_names

    for name in scheme_names():
        assert f"| `{name}` |" in README
