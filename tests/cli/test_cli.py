"""The command line: the commands on networks from each source, and every mistake as one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from dsconv_surgery import compress, find_convs, load
from dsconv_surgery.budget import Budget
from dsconv_surgery.checkpoint import read_plan
from dsconv_surgery.cli.commands import app, main
from dsconv_surgery.cli.inputs import image_batches, named_model, shuffled
from dsconv_surgery.report import Report
from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.onnx_export import session_call
from dsconv_surgery.sweep import Sweep

RESNET = ["torchvision:resnet18", "--input", "1,3,64,64"]
HOME_MADE = """
import torch
import torch._dynamo
from torch import nn

def small():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1))

def normed():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1))

def five():
    return nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(5)))

class Wide(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 32, 3))

not_a_model = dict
constant = 3
"""
INPUT = ["--input", "1,3,12,12"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the current folder, as a user has one."""
    name = f"home_made_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(HOME_MADE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    sys.modules.pop(name, None)


def run(*words: Any) -> str:
    """What a command that works prints on the standard output."""
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


Fails = Callable[..., str]


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs `main` on a mistake: exit status 1, one line on the standard error, which is returned."""

    def fail(*words: Any) -> str:
        monkeypatch.setattr(sys, "argv", ["dsconv-surgery", *(str(word) for word in words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        assert caught.value.code == 1
        assert out == ""
        assert "Traceback" not in err
        others = ("network: ", "weights: ", "images: ", "plan: ", "time: ")  # what the command said before it began
        lines = [line for line in err.splitlines() if line.strip() and "layer/s" not in line and "options:" not in line]
        lines = [line for line in lines if not line.startswith(others)]
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        return lines[0]

    return fail


# ---- what works


def test_inspect_a_network_of_torchvision() -> None:
    """Every layer once, the whole network at the end."""
    import torchvision

    text = run("inspect", *RESNET)
    model = torchvision.models.resnet18()
    layers = find_convs(model, torch.zeros(1, 3, 64, 64))
    assert len(layers) == 21
    for layer in layers:
        assert sum(line.split()[:1] == [layer.name] for line in text.splitlines()) == 1
    assert "7x7 3 -> 64, stride 2x2, padding 3x3" in text
    assert f"{sum(p.numel() for p in model.parameters()):,}" in text.splitlines()[-1]


def test_compress_and_report_a_network_of_torchvision(tmp_path: Path) -> None:
    """The saved network loads into torchvision's class, and report tells the same as compress did."""
    import torchvision

    out = tmp_path / "cut"
    torch.manual_seed(1)
    result = Report.from_json(run("compress", *RESNET, "-o", out, "--macs", 0.6, "--schemes", "channel", "--exclude", "conv1", "--json"))
    assert result.after.macs <= 0.6 * result.before.macs
    plan = read_plan(out)
    assert {cut.scheme for cut in plan.cuts} == {"channel"}
    assert "excluded by 'conv1'." in {skip.reason for skip in plan.skips}
    small = load(torchvision.models.resnet18(), out)
    assert sum(p.numel() for p in small.parameters()) == result.after.params
    torch.manual_seed(1)  # the same random weights, so that the errors agree as well
    again = Report.from_json(run("report", *RESNET[:1], out, *RESNET[1:], "--json"))
    assert (again.before, again.after) == (result.before, result.after)
    for row, other in zip(again.rows, result.rows, strict=True):
        assert (row.name, row.scheme, row.rank, row.skipped) == (other.name, other.scheme, other.rank, other.skipped)
        assert row.error == (None if other.error is None else pytest.approx(other.error, abs=1e-6))


def test_a_network_of_timm(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    words = ["timm:lcnet_035", "--input", "1,3,64,64"]
    assert "conv_stem" in run("inspect", *words)
    text = run("compress", *words, "--out", tmp_path, "--rule", "energy", "--energy", 0.8, "--schemes", "bottleneck")
    assert "bottleneck" in text
    assert "whole network" in run("report", words[0], tmp_path, *words[1:])


def test_a_callable_of_ones_own(home: str, tmp_path: Path) -> None:
    """From the current folder; a function or a class."""
    assert "3x3 8 -> 12" in run("inspect", f"{home}:small", *INPUT)
    assert "3x3 3 -> 32" in run("inspect", f"{home}:Wide", *INPUT)
    text = run("compress", f"{home}:small", *INPUT, "--out", tmp_path / "out", "--rule", "fixed", "--rank", 2, "--include", "2")
    assert [(cut.name, cut.rank) for cut in read_plan(tmp_path / "out").cuts] == [("2", 2)]
    assert "MACs" in text


def test_the_first_and_the_last_layer_stay_dense_without_images(home: str, tmp_path: Path) -> None:
    """Not if --exclude is empty or has another name, if --include names them, or with images."""
    torch.save(torch.rand(8, 3, 12, 12), images := tmp_path / "images.pt")
    words = ["compress", f"{home}:five", *INPUT, "--rule", "fixed", "--rank", 1, "--schemes", "channel", "--no-cache", "--out"]
    for index, (more, expected) in enumerate(
        [
            ([], "123"),
            (["--exclude", ""], "01234"),
            (["--exclude", "2"], "0134"),
            (["--include", "0", "--include", "1"], "01"),
            (["--calibration", images], "01234"),
        ]
    ):
        text = run(*words, out := tmp_path / f"out{index}", *more)
        assert "".join(cut.name for cut in read_plan(out).cuts) == expected, more
        assert ("the first convolution and the last layer stay dense" in text) == (expected == "123")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_from_a_file(suffix: str, home: str, tmp_path: Path) -> None:
    """The network that is cut is the one with these weights, and its errors are against them."""
    named_model(f"{home}:small", "none")  # so that it can be imported
    model = named_model(f"{home}:small", "none")
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(model.state_dict(), path)
    else:
        save_file(model.state_dict(), path)
    words = [*INPUT, "--weights", path]
    result = Report.from_json(
        run("compress", f"{home}:small", *words, "--out", tmp_path / "out", "--macs", 0.6, "--schemes", "channel", "--json")
    )
    expected = compress(model, torch.zeros(1, 3, 12, 12), schemes="channel", budget=Budget(macs=0.6))
    assert result == expected.report
    x = torch.rand(1, 3, 12, 12)
    assert torch.equal(load(named_model(f"{home}:small", "none"), tmp_path / "out")(x), expected.model(x))
    again = Report.from_json(run("report", f"{home}:small", tmp_path / "out", *words, "--json"))
    assert again == result
    other = Report.from_json(run("report", f"{home}:small", tmp_path / "out", *INPUT, "--json"))
    assert other.after == result.after
    assert any(row.error is not None and row.error > 0.5 for row in other.rows)  # other, random weights: nothing to do with these


def test_json_and_markdown(home: str, tmp_path: Path) -> None:
    """JSON is a Report, whole; Markdown is its table; nothing else is on the standard output."""
    text = run("compress", f"{home}:small", *INPUT, "--out", tmp_path / "out", "--macs", 0.6, "--params", 0.7, "--json")
    report = Report.from_json(text)
    assert json.loads(text) == json.loads(report.to_json())
    markdown = run("report", f"{home}:small", tmp_path / "out", *INPUT, "--markdown")
    assert markdown.startswith("| layer | scheme |")
    assert f"{report.after.macs:,}" in markdown
    latency = Report.from_json(run("report", f"{home}:small", tmp_path / "out", *INPUT, "--measure-latency", "--json")).latency
    assert latency is not None
    assert latency.conditions.batch == 1
    assert latency.conditions.memory_format == "contiguous"
    words = ("report", f"{home}:small", tmp_path / "out", *INPUT, "--measure-latency", "--channels-last", "--json")
    last = Report.from_json(run(*words))
    assert last.latency is not None
    assert last.latency.conditions.memory_format == "channels_last"
    assert (last.before, last.after) == (report.before, report.after)


def test_a_runtime_for_plans_and_reports(home: str, tmp_path: Path, fails: Fails) -> None:
    """Every command that measures takes it; without a measurement it is refused."""
    start = ["compress", f"{home}:small", *INPUT, "--schemes", "channel", "--exclude", "", "--out", tmp_path / "out", "--json"]
    run(*start, "--latency", 1.0, "--runtime", "onnxruntime")
    timing = read_plan(tmp_path / "out").timing
    assert timing is not None
    assert timing.conditions.runtime == "onnxruntime"
    timed = Report.from_json(run(*start, "--macs", 0.8, "--runtime", "onnxruntime", "--measure-latency")).latency
    assert timed is not None
    assert timed.conditions.runtime == "onnxruntime"
    words = ("sweep", f"{home}:small", *INPUT, "--schemes", "channel", "--exclude", "", "--fractions", 0.8, "--runtime", "onnxruntime")
    run(*words, "--measure-latency", "--out", tmp_path / "sweep")
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["conditions"]["runtime"] == "onnxruntime"
    words = ("report", f"{home}:small", tmp_path / "out", *INPUT, "--runtime", "onnxruntime")
    timed = Report.from_json(run(*words, "--measure-latency", "--json")).latency
    assert timed is not None
    assert timed.conditions.runtime == "onnxruntime"
    assert "(--measure-latency), or leave runtime out" in fails(*words)
    assert "--runtime goes with a budget on latency" in fails(*start, "--macs", 0.8, "--runtime", "onnxruntime")
    assert "Did you mean 'onnxruntime'?" in fails(*start, "--latency", 0.8, "--runtime", "onnxruntim")


def test_a_saved_network_is_exported(home: str, tmp_path: Path, fails: Fails) -> None:
    """For any batch size, by default with the plan's input shape; what was in the file before is replaced, or kept after an error."""
    network, folder, file = f"{home}:normed", tmp_path / "out", tmp_path / "small.onnx"
    run("compress", network, *INPUT, "--schemes", "channel", "--out", folder, "--macs", 0.8, "--exclude", "")
    file.write_text("old")
    assert "--onnx" in fails("export", network, folder, "--onnx", file / "below.onnx")
    assert "plan.json: not there" in fails("export", network, tmp_path / "none", "--onnx", file)
    assert "does not run on the example inputs" in fails("export", network, folder, "--onnx", file, "--input", "1,3,12,12,1")
    assert file.read_text() == "old"
    text = run("export", network, folder, "--onnx", file)
    assert text.startswith(f"{file}: 0.0 MB, input (batch, 3, 12, 12), outputs in onnxruntime equal to torch's")
    loaded, x = load(named_model(network, "none"), folder), torch.rand(5, 3, 12, 12)
    (result,) = session_call(file.read_bytes(), Inputs(x))()
    assert torch.allclose(torch.from_numpy(result), loaded(x), atol=1e-5)
    graph = onnx.load(file).graph
    assert {node.op_type for node in graph.node} == {"Conv", "Relu"}  # no BatchNorm
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_it_runs_as_a_module(home: str) -> None:
    """`python -m dsconv_surgery`, in a process of its own, on a mistake."""
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}

    words = [sys.executable, "-m", "dsconv_surgery", "inspect", f"{home}:smal", *INPUT]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: model '{home}:smal': {home} has no callable 'smal'. Did you mean 'small'?\n"


# ---- what does not


def test_names_that_are_wrong(fails: Fails, home: str) -> None:
    for name, message in (
        ("resnet18", "model 'resnet18': expected torchvision:NAME, timm:NAME or package.module:callable."),
        ("torchvision:resnet19", "resnet19"),
        ("timm:resnet19", "model 'timm:resnet19': Unknown model (resnet19)"),
        ("nowhere_at_all:net", "nowhere_at_all cannot be imported"),
        (f"{home}:smal", f"{home} has no callable 'smal'. Did you mean 'small'?"),
        (f"{home}:constant", "has no callable 'constant'."),
        (f"{home}:not_a_model", "expected an nn.Module, found dict."),
    ):
        if name.startswith("timm"):
            pytest.importorskip("timm")
        assert message in fails("inspect", name, *INPUT)


def test_inputs_that_do_not_fit(fails: Fails, home: str) -> None:
    for shape in ("1,3", "1,4,12,12", "1,3,1,1,1"):
        assert "does not run on the example inputs of --input" in fails("inspect", f"{home}:Wide", "--input", shape)
    for shape in ("", "1,3,x", "1 3 12 12", "-1,3,12,12"):
        assert "expected sizes separated by commas" in fails("inspect", f"{home}:small", f"--input={shape}")


def test_settings_that_are_wrong(fails: Fails, home: str, tmp_path: Path) -> None:
    """Each message is the library's own; nothing is written."""
    start = ["compress", f"{home}:small", *INPUT, "--out", tmp_path / "out"]
    for words, message in (
        (["--schemes", "chanel"], "unknown scheme 'chanel'. Did you mean 'channel'?"),
        (["--macs", 1.5], "error: --macs=1.5: expected the fraction to keep, in (0, 1]"),
        (["--params", 0], "params=0.0: expected the fraction to keep, in (0, 1]"),
        (["--macs", 0.001], "is out of reach: with every layer at its cheapest"),
        (["--rule", "best"], "unknown rule 'best'. Did you mean 'budget'? Known: budget, uniform, equal_error"),
        (["--rule", "fixed"], "error: --rank goes with rule='fixed'"),
        (["--rule", "fixed", "--rank", 0], "error: --rank=0: expected a rank of 1 or more"),
        (["--rule", "fixed", "--rank", "8;8"], "--rank '8;8': expected a whole number, or two with a comma"),
        (["--energy", 0.9], "error: --energy goes with rule='energy'"),
        (["--include", "layer9*"], "error: --include: no layer matches 'layer9*'"),
        (["--exclude", "x"], "error: --exclude: no layer matches 'x'"),
    ):
        assert message in fails(*start, *words)
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit(fails: Fails, home: str, tmp_path: Path) -> None:
    """No such file, files of no kind, another network's, and pretrained ones where there are none."""
    (tmp_path / "bad.pt").write_bytes(b"rubbish")
    (tmp_path / "none.pt").write_bytes(b"")
    (tmp_path / "bad.safetensors").write_bytes(b"rubbish")
    torch.save({"state_dict": {}}, tmp_path / "nested.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(nn.Conv2d(3, 8, 3), tmp_path / "model.pt")
    save_file({"0.weight": torch.rand(2, 2)}, tmp_path / "other.safetensors")
    for weights in ("bad.pt", "none.pt", "bad.safetensors", "nested.pt", "list.pt", "model.pt", "other.safetensors"):
        assert f"--weights {weights}: not a state_dict of {home}:small" in fails("inspect", f"{home}:small", *INPUT, "--weights", weights)
    assert "--weights gone.pt: expected none, DEFAULT or a file" in fails("inspect", f"{home}:small", *INPUT, "--weights", "gone.pt")
    assert "--weights DEFAULT is for torchvision and timm" in fails("inspect", f"{home}:small", *INPUT, "--weights", "DEFAULT")


def test_folders_that_are_wrong(fails: Fails, home: str, tmp_path: Path) -> None:
    """Nothing there, another network's, and a file where a folder should be made."""
    assert "plan.json: not there" in fails("report", f"{home}:small", tmp_path / "none", *INPUT)
    run("compress", f"{home}:small", *INPUT, "--out", tmp_path / "out", "--schemes", "channel")
    assert "the plan was made for another network" in fails("report", f"{home}:Wide", tmp_path / "out", *INPUT)
    (tmp_path / "file").write_text("in the way")
    for command in ("compress", "sweep"):  # before anything is computed
        assert "is a file, expected a folder" in fails(command, "none:such", *INPUT, "--out", tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "in the way"


def test_words_that_are_wrong() -> None:
    """Unknown options and commands are typer's to refuse: status 2, with the usage."""
    for words in (["inspect"], ["cut"], ["inspect", "torchvision:resnet18", "--imput", "1"]):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 2
        assert "Usage" in result.output


@pytest.fixture(params=["folder", "pt", "safetensors", "npy"])
def pictures(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Twenty images, in each form that --calibration takes."""
    images = torch.rand(20, 3, 14, 18)
    if request.param == "folder":
        (tmp_path / "pictures" / "deeper").mkdir(parents=True)
        for at, image in enumerate(images):
            pixels = (255 * image).byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(tmp_path / "pictures" / ("deeper" if at % 2 else ".") / f"{at}.png")
        (tmp_path / "pictures" / "notes.txt").write_text("not a picture")
        return tmp_path / "pictures"
    path = tmp_path / f"images.{request.param}"
    images = images[..., :12, :12].contiguous()
    if request.param == "pt":
        torch.save(images, path)
    elif request.param == "safetensors":
        save_file({"images": images}, path)
    else:
        np.save(path, images.numpy())
    return path


def test_compress_calibrates(home: str, pictures: Path) -> None:
    """The plan says so, errors of outputs are shown, and the saved network can be compared on images."""
    words = ("--calibration", pictures, "--images", 16)
    printed = run("compress", f"{home}:small", *INPUT, "--schemes", "cp", "--macs", 0.6, "--out", "out", *words)
    assert "outputs on 16 images: squared relative error" in printed
    assert read_plan("out").calibrated
    again = run("report", f"{home}:small", "out", *INPUT, "--data", pictures, "--images", 7)
    assert "outputs on 7 images" in again


def test_compress_recovers(home: str, tmp_path: Path) -> None:
    """The report keeps the line when the outputs are compared, and JSON holds it."""
    torch.save(torch.rand(20, 3, 12, 12), tmp_path / "images.pt")
    words = (f"{home}:small", *INPUT, "--schemes", "cp", "--macs", 0.6, "--calibration", "images.pt", "--recover")
    assert "recovered on 15 calibration images: squared relative error on 5 others" in run("compress", *words, "--out", "out")
    assert Report.from_json(run("compress", *words, "--out", "again", "--json")).recovery is not None


@pytest.mark.filterwarnings("ignore:.*the network has no BatchNorm statistics")
def test_synthetic_images(home: str, tmp_path: Path) -> None:
    """By this name, with --mean, --std and --images; a folder of this name is ./synthetic."""
    words = (f"{home}:small", *INPUT, "--schemes", "cp", "--macs", 0.6, "--calibration")
    printed = run("compress", *words, "synthetic", "--images", 16, "--out", "out")
    assert "calibrated on synthetic images" in printed
    assert read_plan("out").calibrated == "synthetic"
    assert "outputs compared on synthetic images" in run(
        "sweep", *words[:-3], *words[-1:], "synthetic", "--fractions", 0.8, "--out", "swept"
    )
    (tmp_path / "synthetic").mkdir()
    Image.fromarray(np.zeros((12, 12, 3), dtype=np.uint8)).save(tmp_path / "synthetic" / "black.png")
    assert "outputs on 1 images" in run("compress", *words, "./synthetic", "--out", "real")
    assert read_plan("real").calibrated is True


def test_pictures_are_scaled_cropped_and_normalised(tmp_path: Path) -> None:
    """A grey picture of another shape becomes one number per channel, everywhere."""
    Image.fromarray(np.full((40, 70, 3), 128, dtype=np.uint8)).save(tmp_path / "grey.png")
    (batch,) = image_batches(tmp_path, torch.zeros(1, 3, 12, 16), 8, "0.5,0.4,0.3", "0.1,0.2,0.5")
    expected = (128 / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.1, 0.2, 0.5])
    torch.testing.assert_close(batch, expected.view(1, 3, 1, 1).expand(1, 3, 12, 16))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--calibration", "nowhere"], "nowhere: not there. Expected a folder of pictures"),
        (["--calibration", "empty"], "no pictures in this folder"),
        (["--calibration", "text.pt"], "text.pt: expected a .pt, .safetensors or .npy file with one tensor"),
        (["--calibration", "whole.npy"], "found torch.int64, expected a tensor of normalised images"),
        (["--calibration", "folder", "--mean", "0.5,x"], "error: --mean '0.5,x': expected one number, or 3 with commas"),
        (["--calibration", "folder", "--std", "0"], "error: --std '0': expected one positive number, or 3 with commas"),
        (["--calibration", "folder", "--input", "1,2,9,9"], "error: --input 1,2,9,9: pictures of a folder need a batch"),
    ],
)
def test_calibration_that_cannot_be_read(home: str, fails: Fails, words: list[str], message: str) -> None:
    Path("empty").mkdir()
    Path("text.pt").write_text("no tensor")
    np.save("whole.npy", np.arange(4))
    Path("folder").mkdir()
    Image.fromarray(np.zeros((9, 9, 3), dtype=np.uint8)).save("folder/black.png")
    assert message in fails("compress", f"{home}:small", *INPUT, "--out", "out", *words)
    assert not Path("out").exists()


def test_sweep_writes_a_table_and_a_plot(home: str, tmp_path: Path) -> None:
    """JSON, Markdown and a picture of every budget asked for; images compare outputs."""
    torch.save(torch.rand(20, 3, 12, 12), tmp_path / "images.pt")
    out = tmp_path / "swept"
    words = ("--fractions", "0.8,0.6", "--calibration", tmp_path / "images.pt", "--schemes", "channel", "--measure", "params")
    printed = run("sweep", f"{home}:small", *INPUT, *words, "--out", out)
    assert "budgets on params" in printed
    points = Sweep.from_json((out / "sweep.json").read_text()).points
    assert [point.fraction for point in points] == [1.0, 0.8, 0.6]
    assert all(point.error is not None for point in points)
    assert sum(line.startswith("|") for line in (out / "sweep.md").read_text().splitlines()) == 5
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_recipe_runs_from_the_shell(home: str, tmp_path: Path, fails: Fails) -> None:
    """The recipe's model, or another; its calibration images; what is saved loads."""
    torch.save(torch.rand(40, 3, 12, 12), tmp_path / "images.pt")
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        f'model = "{home}:small"\ninput = [1, 3, 12, 12]\nschemes = ["channel"]\n[budget]\nmacs = 0.8\n[calibration]\nimages = 16\n'
    )
    saved = tmp_path / "saved"
    report = Report.from_json(run("run", recipe, "--calibration", tmp_path / "images.pt", "--out", saved, "--json"))
    assert report.macs_saved >= 0.2
    assert read_plan(saved).calibrated
    assert "asks for 16 calibration images" in fails("run", recipe, "--out", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    recipe.write_text(f'model = "{home}:small"\ninput = [1, 3, 12, 12]\n[budget]\nmacs = 0.8\n[fine_tune]\nepochs = 2\n')
    assert "asks for training batches" in fails("run", recipe, "--out", tmp_path / "other")
    run("run", recipe, "--train", tmp_path / "images.pt", "--out", tmp_path / "tuned")
    untuned = tmp_path / "untuned"
    recipe.write_text(recipe.read_text().split("[fine_tune]")[0])
    run("run", recipe, "--out", untuned)
    first, second = (load_file(next(folder.glob("*.safetensors"))) for folder in (tmp_path / "tuned", untuned))
    assert list(first) == list(second)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    recipe.write_text("channels_last = true\n" + recipe.read_text())
    again = run("run", recipe, "--out", tmp_path / "last", "--measure-latency")
    assert "channels_last" in again
    last = load(named_model(f"{home}:small", "none"), tmp_path / "last")
    convolutions = [m.weight for m in last.modules() if isinstance(m, torch.nn.Conv2d)]
    assert convolutions
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)
    assert "is a file, expected a folder" in fails("run", recipe, "--out", tmp_path / "images.pt")
    recipe.write_text("[budget]\nmacs = 0.8\n")
    assert "names no model" in fails("run", recipe, "--out", tmp_path / "other")
    assert "no such file or recipe" in fails("run", "resnet-fifty", "--out", tmp_path / "other")


def test_training_images_come_in_another_order_each_time() -> None:
    """Files are sorted, often by what they show."""
    loader = shuffled(list(torch.arange(200.0).split(64)))
    first, again = list(loader), list(loader)
    assert [len(batch) for (batch,) in first] == [64, 64, 64, 8]
    assert not any(torch.equal(a, b) for (a,), (b,) in zip(first, again, strict=True))
    assert sorted(torch.cat([batch for (batch,) in first]).tolist()) == list(range(200))
    assert len(first[0][0].diff().unique()) > 10


def test_recipes_are_listed_with_their_schema() -> None:
    assert "add [calibration]" in run("recipes")  # not taken for markup
    assert "resnet20-cifar10-macs-50" in run("recipes")
    assert "budget" in json.loads(run("recipes", "--schema"))["properties"]


def test_native_libraries_cannot_write_into_the_result() -> None:
    """What is written to file descriptor 1 past Python's sys.stdout goes to the standard error."""
    code = """
import os, sys, typer
from dsconv_surgery.cli import commands

@commands.app.command()
def noisy():
    os.write(1, b"from C\\n")
    typer.echo("{}")

sys.argv = ["dsconv-surgery", "noisy"]
commands.main()
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, "{}\n", "from C\n")


def test_weights_inside_a_checkpoint(fails: Fails, home: str, tmp_path: Path) -> None:
    """A state_dict beside other things is used; of several, none; a whole model is named as such, without torch's advice."""
    state = named_model(f"{home}:small", "none").state_dict()
    for name, content in {"model": {"model": state, "epoch": 3}, "state": {"state_dict": state, "optimizer": {"lr": 0.1}}}.items():
        torch.save(content, tmp_path / f"{name}.pt")
        run("inspect", f"{home}:small", *INPUT, "--weights", tmp_path / f"{name}.pt")
    torch.save({"model": state, "ema": state}, tmp_path / "two.pt")
    words = ("inspect", f"{home}:small", *INPUT, "--weights")
    assert "the file holds several, under 'model', 'ema'. Save the right" in fails(*words, tmp_path / "two.pt")
    torch.save(nn.Conv2d(3, 8, 3), tmp_path / "whole.pt")
    (tmp_path / "bad.pt").write_bytes(b"rubbish")
    for file, problem in {
        "whole": "such as a whole model, which are not loaded. Save model.state_dict() instead.",
        "bad": "is damaged",
    }.items():
        message = fails(*words, tmp_path / f"{file}.pt")
        assert problem in message
        assert "weights_only" not in message
