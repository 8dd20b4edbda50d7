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
    printed = run(sys.executable, "examples/deploy.py", "--latency", "0.9", "--out", str(tmp_path))
    assert re.search(r"latency [\d.]+ -> [\d.]+ ms, .*, predicted [\d.]+ ms.*, onnxruntime [\d.]+, BatchNorms folded\)", printed)
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


DETECTION = (
    *("detection.py", "--name", "ssdlite320_mobilenet_v3_large", "--size", "96", "--count", "4", "--macs", "0.8"),
    *("--schemes", "bottleneck", "--include", "detector.head", "detector.backbone.extra"),
)


@pytest.mark.usefixtures("nms")
def test_detection_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal boxes at full rank, then the MACs that were asked for. It runs in this process, for its non-maximum suppression."""
    import detection

    monkeypatch.setattr(sys, "argv", [*DETECTION, "--out", str(tmp_path)])
    detection.main()
    printed = capsys.readouterr().out
    difference = re.search(r"(\d+) layers cut at full rank: largest difference of boxes (\S+) pixels", printed)
    assert difference is not None
    assert int(difference[1]) > 10
    assert 0 < float(difference[2]) < 0.01
    before, after = (int(text.replace(",", "")) for text in re.findall(r"^MACs ([\d,]+) -> ([\d,]+)", printed, re.M)[0])
    assert 0.75 < after / before < 0.8
    assert re.search(r"outputs on 4 images: squared relative error 0\.\d+", printed)
    assert re.search(r"latency [\d.]+ -> [\d.]+ ms", printed)
    assert re.search(r"finds [1-9]\d* boxes", printed)
    assert (tmp_path / "plan.json").exists()


@pytest.mark.usefixtures("nms")
def test_detection_example_notices_other_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    import detection

    monkeypatch.setattr(sys, "argv", [*DETECTION])
    monkeypatch.setattr(detection, "at_full_rank", lambda plan: plan)
    with pytest.raises(SystemExit, match="boxes differ"):
        detection.main()


def psnr(printed: str) -> list[float]:
    """Of the noisy images, the dense network and the cut one."""
    return [float(text) for text in re.findall(r"([\d.]+) dB", printed)]


def test_denoising_example() -> None:
    """It learns to remove noise in a few steps, and the cut network still does."""
    printed = run(sys.executable, "examples/denoising.py", "--steps", "60", "--crops", "16")
    noisy, dense, cut = psnr(printed)
    assert dense > noisy + 2
    assert cut > dense - 0.5
    assert "(-50." in printed


def test_denoising_example_takes_weights_and_images(tmp_path: Path) -> None:
    import torch
    from denoising import DnCNN, small_images
    from PIL import Image
    from safetensors.torch import save_file

    save_file(DnCNN(depth=4, width=8).state_dict(), tmp_path / "dncnn.safetensors")
    for name in ("calibration", "set12"):
        (tmp_path / name).mkdir()
        for index, rows in enumerate(small_images("test")[:18].view(2, 3, 3, 32, 32)):
            pixels = (255 * rows.permute(0, 2, 1, 3).reshape(96, 96)).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / name / f"{index}.png")
    data = ("--weights", str(tmp_path / "dncnn.safetensors"), "--data", str(tmp_path))
    printed = run(sys.executable, "examples/denoising.py", *data, "--crops", "4")
    assert "PSNR on 2 images" in printed
    assert "body.6" in printed


@pytest.mark.slow
def test_denoising_example_with_trained_weights(shared: Path) -> None:
    """DnCNN at half of its MACs loses less than 0.2 dB on Set12."""
    data = ("--weights", str(shared / "weights" / "dncnn_gray_sigma25.safetensors"), "--data", str(shared / "denoising"))
    _, dense, cut = psnr(run(sys.executable, "examples/denoising.py", *data))
    assert dense == pytest.approx(30.43, abs=0.01)
    assert cut > dense - 0.2


def test_training_example_learns(tmp_path: Path) -> None:
    """Two epochs on the 5,000 images of this repository are far better than chance, and the checkpoint loads."""
    from cifar import accuracy, demo_images, load_resnet

    out = tmp_path / "net.safetensors"
    settings = ("--out", str(out), "--epochs", "2", "--depth", "8", "--batch", "64")
    run(sys.executable, "examples/train_cifar.py", "--data", "examples/assets", *settings)
    assert accuracy(load_resnet(out, depth=8), *demo_images("test")) > 25
