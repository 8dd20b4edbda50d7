"""Options of the command line: settings for some layers, help with schemes and rules, and what a command says before it begins."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from dsconv_surgery import Budget, Calibration, Recipe, compare, compress, pareto
from dsconv_surgery.checkpoint import read_plan
from dsconv_surgery.cli import commands
from dsconv_surgery.cli.commands import app, main
from dsconv_surgery.cli.descriptions import SCHEMES
from dsconv_surgery.cli.options import name_options
from dsconv_surgery.planning.rules import RULES
from dsconv_surgery.recipe import CalibrationSettings
from dsconv_surgery.schemes import registry

ROOT = Path(__file__).resolve().parents[2]
INPUT = ["--input", "1,3,12,12"]
BUILT_IN = {name for name, scheme in registry._SCHEMES.items() if type(scheme).__module__.startswith("dsconv_surgery.")}


def five() -> nn.Module:
    """A network that the command line can name: this module's file is on the path of the tests."""
    return nn.Sequential(*(nn.Conv2d(3 if index == 0 else 8, 8, 3, padding=1) for index in range(5)))


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sys.modules, "networks_of_test_options", sys.modules[__name__])
    monkeypatch.setattr(sys, "path", list(sys.path))
    return "networks_of_test_options:five"


def run(*words: Any) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def error_of(*words: Any) -> str:
    with pytest.raises(ValueError, match=r".+") as caught:
        CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    return str(caught.value)


def test_schemes_ranks_and_multiples_for_some_layers(model: str, tmp_path: Path) -> None:
    words = ["--schemes", "1=spatial,channel", "--schemes", "2=", "--schemes", "*=cp", "--ranks", "4=tucker,3,5", "--ranks", "0=channel,2"]
    run("compress", model, *INPUT, *words, "--rule", "fixed", "--rank", 4, "--multiple", "1=2", "--exclude", "", "--out", tmp_path / "out")
    cuts = {cut.name: (cut.scheme, cut.rank) for cut in read_plan(tmp_path / "out").cuts}
    assert cuts.pop("1") in (("spatial", 4), ("channel", 4))
    assert cuts == {"0": ("channel", 2), "3": ("cp", 4), "4": ("tucker", (3, 5))}


def test_types_in_exclude(model: str, tmp_path: Path) -> None:
    words = ["--exclude", "nn.Conv2d", "--macs", 0.5, "--out", tmp_path / "out"]
    assert "5 x: excluded by 'nn.Conv2d'." in error_of("compress", model, *INPUT, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--schemes", "cp", "--schemes", "1=cp"], "--schemes 'cp': expected a pattern of layer names before '='"),
        (["--schemes", "=cp"], "--schemes '=cp': expected a pattern"),
        (["--schemes", "1=cp", "--schemes", "1=channel"], "--schemes 1=...: given twice"),
        (["--ranks", "cp,12"], "--ranks 'cp,12': expected a pattern of layer names before '=', as in layer1=cp,12"),
        (["--ranks", "1=cp"], "--ranks 1=... '': expected a whole number"),
        (["--ranks", "1=cp,x"], "--ranks 1=... 'x': expected a whole number"),
        (["--multiple", "x"], "--multiple 'x': expected one whole number"),
        (["--multiple", "1=x"], "--multiple 'x': expected one whole number"),
        (["--multiple", "4", "--multiple", "8"], "--multiple '4,8': expected one whole number"),
    ],
)
def test_settings_that_cannot_be_read_name_the_option(words: list[str], message: str, model: str, tmp_path: Path) -> None:
    assert message in error_of("compress", model, *INPUT, "--out", tmp_path / "out", *words)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("schemes: no layer matches 'x'.", "--schemes: no layer matches 'x'."),
        ("macs=1.5: expected", "--macs=1.5: expected"),
        ("rank= goes with rule='fixed'", "--rank goes with rule='fixed'"),
        ("calibration: batch 0", "--calibration: batch 0"),
        ("layer1.0.conv1: rank 12 is above", "layer1.0.conv1: rank 12 is above"),
        ("no message: with a colon", "no message: with a colon"),
        ("nothing", "nothing"),
    ],
)
def test_errors_name_the_option_of_a_setting(message: str, expected: str) -> None:
    assert name_options(message) == expected


# ---- names

OWN_NAMES = {"weights", "out", "json", "markdown", "onnx", "schema"}  # of what Python has no argument for
FORMER_NAMES = {"scheme", "keep"}


@pytest.mark.parametrize("command", ["inspect", "compress", "report", "sweep", "run", "export", "recipes"])
def test_options_have_the_names_of_python(command: str) -> None:
    """Those of settings and arguments, with dashes. --latency is a budget, so the argument `latency` is --measure-latency."""
    functions = (compress, compare, pareto, Recipe.run, Calibration.synthetic)
    arguments = {name for function in functions for name in inspect.signature(function).parameters}
    fields = {field.name for kind in (Budget, Recipe, CalibrationSettings) for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    names = {name.replace("_", "-") for name in arguments | fields} | OWN_NAMES | FORMER_NAMES | {"measure-latency"}
    options = run(command, "--help").output.partition("Options:")[2].partition("\n\n")[0]
    assert set(re.findall(r"^  (?:-\w, )?--([\w-]+)", options, re.M)) - {"help"} - names == set()
    assert not set(re.findall(r"^  --([\w-]+)", options, re.M)) & FORMER_NAMES


def test_former_names_are_still_taken(model: str, tmp_path: Path) -> None:
    """--scheme for --schemes and --keep for --fractions; a list may be written with commas or by repeating the option."""
    start = ["sweep", model, *INPUT, "--out", tmp_path / "out"]
    former = ["--scheme", "cp", "--scheme", "channel", "--keep", 0.8, "--keep", 0.6]
    tables = [run(*start, *words).stdout for words in (former, ["--schemes", "cp,channel", "--fractions", "0.8,0.6"])]
    assert tables[0] == tables[1]
    assert [line.split()[0] for line in tables[0].splitlines() if line.strip()[:1].isdigit()] == ["1", "0.8", "0.6"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fractions", "0.5;0.3"], "--fractions '0.5;0.3': expected numbers with commas between, as in --fractions 0.5,0.3."),
        (["--fractions", "1.5"], "--fractions: macs=1.5: expected the fraction to keep, in (0, 1]"),
        (["--schemes", "cp,,channel"], "unknown scheme ''"),
    ],
)
def test_lists_that_cannot_be_read(words: list[str], message: str, model: str, tmp_path: Path) -> None:
    assert message in name_options(error_of("sweep", model, *INPUT, "--out", tmp_path / "out", *words))


# ---- help


@pytest.mark.parametrize("command", ["compress", "sweep"])
def test_help_lists_every_scheme_and_rule_in_one_line(command: str) -> None:
    text = run(command, "--help").output
    assert set(SCHEMES) == BUILT_IN
    for name in (*SCHEMES, *RULES):
        assert len(re.findall(rf"^ {{2,8}}{name} +\S+ \S+ \S+", text, re.M)) == 1, name


@pytest.mark.parametrize("words", [["--help"], ["compress", "--help"], ["sweep", "--help"], ["run", "--help"]])
def test_help_does_not_import_torch(words: list[str]) -> None:
    code = f"""
import sys
from typer.testing import CliRunner
from dsconv_surgery.cli.commands import app
assert CliRunner().invoke(app, {words!r}).exit_code == 0
assert not {{"torch", "scipy", "tensorly", "matplotlib"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ---- what a command says before it begins


def test_compress_says_first_what_it_will_do(model: str, tmp_path: Path) -> None:
    """On the standard error: the standard output is the result."""
    torch.save(torch.rand(20, 3, 12, 12), tmp_path / "images.pt")
    words = ["--schemes", "channel", "--macs", 0.6, "--calibration", tmp_path / "images.pt", "--images", 16, "--json"]
    result = run("compress", model, *INPUT, *words, "--out", tmp_path / "out")
    assert result.stdout.startswith("{")
    network, weights, images, plan, time = result.stderr.splitlines()[:5]
    total = sum(p.numel() for p in five().parameters())
    assert network.startswith(f"network: {model}, Sequential: 5 layers, {total:,} parameters, ")
    assert network.endswith("MACs for input 1x3x12x12")
    assert weights == f"weights: none: those that {model} makes (see --weights)"
    assert images == f"images:  16 from {tmp_path / 'images.pt'}, used as they are"
    assert plan == "plan:    rule budget, Budget(macs=0.6), schemes channel"
    assert time == "time:    not measured (see --measure-latency and --latency)"


def test_what_is_said_of_weights_ranks_and_time(model: str, tmp_path: Path) -> None:
    words = ["--schemes", "1=channel", "--schemes", "*=", "--ranks", "3=channel,2", "--rule", "fixed", "--rank", 3, "--measure-latency"]
    lines = run("compress", model, *INPUT, *words, "--out", tmp_path / "out").stderr.splitlines()
    assert "images:  none: layers are judged by the error of their weights (see --calibration)" in lines
    assert "plan:    rule fixed rank=3, no budget, schemes 1: channel; *: none, ranks set for 3" in lines
    assert "time:    measured" in lines
    stderr = run("report", "torchvision:resnet18", "--input", "1,3,32,32", *_cut_resnet(tmp_path)).stderr
    assert "weights: none: RANDOM. Errors and ranks for random weights say nothing about trained ones (see --weights)." in stderr
    assert "plan:" not in stderr
    assert "weights: DEFAULT (pretrained)" not in stderr


def _cut_resnet(tmp_path: Path) -> list[Any]:
    words = ["--rule", "fixed", "--rank", 2, "--schemes", "channel", "--include", "layer1.0.conv1"]
    run("compress", "torchvision:resnet18", "--input", "1,3,32,32", *words, "--out", tmp_path / "resnet")
    return [tmp_path / "resnet"]


def test_warnings_are_one_line(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(commands, "app", lambda: warnings.warn("look out", stacklevel=1))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        main()
    assert capsys.readouterr().err == "warning: look out\n"
