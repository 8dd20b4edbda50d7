"""Lint, types, the README and the examples, each run as a user runs it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMAND_LINES = re.findall(r"^dsconv-surgery .+$", README, re.M)

# Runs before the README's Python code: the names that the README describes in words, and a small network, so that all is quick.
PREPARATION = f"""\
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}, {str(ROOT / "examples")!r}]
import conftest, torch, torchvision
from collections import OrderedDict
from types import SimpleNamespace
from dsconv_surgery.support.latency import Stopwatch, Timing
from torch import nn


def count_parameters(stopwatch, calls, device, rounds):
    '''Takes the number of a network's parameters for its time, so that a budget on time is met on a busy machine, too.'''
    return [Timing(1e-3 * sum(p.numel() for p in call.func.parameters()), 1.0) for call in calls]


class SmallResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(nn.Sequential(OrderedDict(conv1=nn.Conv2d(8, 8, 3), relu=nn.ReLU())))
        self.layer2 = nn.Sequential(nn.Sequential(OrderedDict(conv1=nn.Conv2d(8, 16, 3), relu=nn.ReLU())))
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(self.conv1(x))).mean((2, 3)))


class KeywordNet(SmallResNet):
    def forward(self, *, pixel_values):
        return SimpleNamespace(logits=super().forward(pixel_values))


Stopwatch.time = count_parameters
torch.manual_seed(0)
torch.set_num_threads(1)
torchvision.models.resnet18 = lambda weights: SmallResNet()
images = torch.rand(24, 3, 8, 8)
labels = torch.randint(10, (24,))
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=8)
training_batches = loader
vit = KeywordNet().eval()
dict_batches = [dict(pixel_values=x, labels=y) for x, y in loader]


def accuracy(network):
    return 100.0 * (network.eval()(images).argmax(1) == model(images).argmax(1)).float().mean().item()


"""


def run(*command: str, cwd: Path = ROOT) -> str:
    """What a process prints to its standard output; it has to exit with 0."""
    environment = {**os.environ, "TQDM_DISABLE": "1", "COLUMNS": "200"}
    process = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900, env=environment, check=False)
    assert process.returncode == 0, f"{' '.join(command)}\n{process.stdout}\n{process.stderr}"
    return process.stdout


def test_lint() -> None:
    run(sys.executable, "-m", "ruff", "check", ".")
    run(sys.executable, "-m", "ruff", "format", "--check", ".")


def test_types() -> None:
    run(sys.executable, "-m", "mypy")


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 180


def test_readme_links_to_files_that_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_readme_names_every_scheme() -> None:
    from dsconv_surgery.schemes import scheme_names

    for name in scheme_names():
        assert f"| `{name}` |" in README


def test_quickstart_prints_what_the_readme_shows() -> None:
    """Every line of the README is printed: totals to the digit, accuracies to one point, other lines up to their numbers.

    Errors and ranks of single layers are not compared, as their last digits differ between machines.
    """
    block = re.search(r"<!-- quickstart -->\n```\n(.*?)```", README, re.S)
    assert block is not None
    shown = block[1].splitlines()
    printed = run(sys.executable, "examples/quickstart.py").splitlines()
    assert len(shown) > 25
    for line in shown:
        matches = [other for other in printed if without_numbers(other) == without_numbers(line)]
        assert matches, line
        if line.startswith("accuracy"):
            accuracies = [[float(text) for text in re.findall(r"([\d.]+) %", other)] for other in (line, *matches)]
            assert all(accuracies[0] == pytest.approx(values, abs=1.0) for values in accuracies[1:]), line
        elif line.startswith(("parameters", "MACs", "saved")):
            assert line in matches


def without_numbers(line: str) -> str:
    """A line with # for every number; digits in names of layers stay."""
    return " ".join(re.sub(r"(?<![\w.])\d[\d,.]*", "#", line).split())


def test_python_code_in_the_readme_runs(tmp_path: Path) -> None:
    """All of it, in its order and in one process, in an empty folder; only the network, the images and the clock are replaced."""
    code = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    assert len(code) >= 2
    script = tmp_path / "readme.py"
    script.write_text(PREPARATION + "\n".join(code))
    assert "MACs" in run(sys.executable, str(script), cwd=tmp_path)
    assert (tmp_path / "resnet18-half" / "plan.json").exists()
    assert (tmp_path / "small.pt2").exists()


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_command_lines_in_the_readme_use_options_that_exist(line: str) -> None:
    assert len(COMMAND_LINES) > 1
    words = line.split()
    text = run(sys.executable, "-m", "dsconv_surgery", words[1], "--help")
    assert [word for word in words if word.startswith("--") and not re.search(rf"{word}\b(?!-)", text)] == []


def test_recipes_in_the_readme_exist() -> None:
    from dsconv_surgery import Recipe

    names = [line.split()[2] for line in COMMAND_LINES if line.split()[1] == "run"]
    assert names
    assert set(names) <= set(Recipe.known())


def test_deployment_example(tmp_path: Path) -> None:
    """With a budget that is met on a busy machine, too."""
    printed = run(sys.executable, "examples/deploy.py", "--keep", "0.9", "--out", str(tmp_path))
    assert re.search(r"latency [\d.]+ -> [\d.]+ ms, .*, predicted [\d.]+ ms.*, onnxruntime [\d.]+\)", printed)
    for way in ("BatchNorm folded", "onnxruntime, any batch size", "torch.export, any batch size", "torch.compile"):
        assert f"{way}: " in printed
    assert {path.name for path in tmp_path.iterdir()} == {"network", "small.onnx", "small.pt2"}


def test_quantization_example(tmp_path: Path) -> None:
    """The cut network keeps in int8 what it has in float32, to five points: without the penalty on terms it would lose thirty."""
    words = ("--calibration", "64", "--train-images", "256", "--json", str(tmp_path / "out.json"))
    printed = run(sys.executable, "examples/quantize.py", *words)
    with_torchao = importlib.util.find_spec("torchao") is not None
    assert ("torchao is left out: No module named 'torchao'" in printed) != with_torchao
    rows = {row["network"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert list(rows) == ["dense", "cut, weights alone", "cut, calibrated", "cut, fine-tuned"]
    for row in rows.values():
        assert row["float32"] - row["int8"] < 5
        assert not with_torchao or row["float32"] - row["torchao_int8"] < 5
        assert row["float32"] > 80


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
    """A state_dict of ten classes in half precision."""
    weights = str(shared / "weights" / "torchvision_resnet18_cifar10_64px.safetensors")
    command = ("examples/torchvision_resnet.py", "--weights", weights, "--size", "64", "--out", str(tmp_path / "out"))
    printed = run(sys.executable, *command, "--schemes", "spatial", "channel", "bottleneck")
    assert "same outputs: True" in printed


def test_training_example_learns(tmp_path: Path) -> None:
    """Two epochs on the 5,000 images of this repository are far better than chance, and the checkpoint loads."""
    from cifar import accuracy, demo_images, load_resnet

    out = tmp_path / "net.safetensors"
    settings = ("--out", str(out), "--epochs", "2", "--depth", "8", "--batch", "64")
    run(sys.executable, "examples/train_cifar.py", "--data", "examples/assets", *settings)
    assert accuracy(load_resnet(out, depth=8), *demo_images("test")) > 25
