"""Bars in a terminal, a line in the log for every phase, and an estimate of the remaining time."""

from __future__ import annotations

import inspect
import io
import logging
import re
import sys
from typing import Any

import pytest
import torch
from torch import nn

from dsconv_surgery import Budget, FineTune, Recipe, apply_plan, compress, fine_tune, make_plan, pareto
from dsconv_surgery.support import distributed
from dsconv_surgery.support.progress import Progress

X = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IMAGES = [torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="dsconv_surgery")
    return caplog


def a_network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()


def shown(stream: io.StringIO) -> list[str]:
    """The titles of the bars, in their order."""
    return list(dict.fromkeys(re.findall(r"([^\r\n\x1b]+):\s+\d+%", stream.getvalue())))


@pytest.mark.parametrize("function", [make_plan, apply_plan, compress, pareto, Recipe.run, fine_tune])
def test_the_default_shows_bars_in_a_terminal_only(function: Any) -> None:
    assert inspect.signature(function).parameters["progress"].default is None


def test_bars_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    compress(a_network(), X, calibration=IMAGES, schemes="cp")
    assert shown(terminal) == ["1/2 judge options", "gather moments", "2/2 calibrate"]
    assert re.search(r"1/2 judge options:.*\| \d\d:\d\d<(\d\d:\d\d|\?), layer 2 of 2: 3", terminal.getvalue())
    assert re.search(r"2/2 calibrate: 100%", terminal.getvalue())


@pytest.mark.parametrize(("progress", "is_terminal", "expected"), [(None, False, []), (False, True, []), (True, False, ["phase"])])
def test_no_bars_elsewhere_or_as_asked(
    progress: bool | None, is_terminal: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(progress).bar("phase", 2, "layer"):
        pass
    assert shown(stream) == expected


@pytest.mark.parametrize("closed", [True, False])
def test_without_a_standard_error(closed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stderr", stream if closed else None)
    with Progress().bar("phase", 2, "layer") as bar:
        bar.update()


def test_nothing_is_printed_by_default(capfd: pytest.CaptureFixture[str]) -> None:
    """Neither a bar nor the log, where standard error is a file and logging is not configured."""
    compress(a_network(), X, calibration=IMAGES, schemes="cp")
    assert capfd.readouterr() == ("", "")


def test_the_log_has_a_line_for_every_phase_of_a_plan_and_a_cut(log: pytest.LogCaptureFixture) -> None:
    model = a_network()
    plan = make_plan(model, X, schemes="cp")
    assert log.messages == ["1/2 judge options: 2 layers", "2/2 compute factors: 2 layers"]
    log.clear()
    apply_plan(model, plan, X)
    assert log.messages == ["compute factors: 2 layers"]
    log.clear()
    calibrated = make_plan(model, X, schemes="cp", calibration=IMAGES)
    assert log.messages == ["judge options: 2 layers", "gather moments: 16 images"]
    log.clear()
    apply_plan(model, calibrated, X, calibration=IMAGES)
    assert log.messages == ["calibrate: 2 layers"]


def test_the_log_of_compress_and_of_fine_tune(log: pytest.LogCaptureFixture) -> None:
    small = compress(a_network(), X, schemes="cp")
    assert log.messages == ["1/2 judge options: 2 layers", "2/2 compute factors: 2 layers"]
    log.clear()
    fine_tune(small.model, IMAGES, teacher=a_network(), settings=FineTune(epochs=2, batchnorm="frozen"))
    assert log.messages == ["fine-tune: 2 steps"]


def test_the_log_of_a_time_budget(log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "dsconv_surgery.planning.layer_latency.LayerTimer.time", lambda _timer, chains, _sizes: [1.0] + [0.5] * (len(chains) - 1)
    )
    monkeypatch.setattr("dsconv_surgery.planning.cut_latency.measure_latency", lambda models, *_, **__: [3.0, 2.0][: len(models)])
    make_plan(a_network(), X, schemes="cp", budget=Budget(latency=2 / 3), exclude=())
    titles = [
        "1/4 time layers: 3 layers",
        "2/4 judge options: 2 layers",
        "3/4 compute factors: 2 layers",
        "4/4 time the cut network: 1 network",
    ]
    assert log.messages == titles


def test_several_budgets_are_counted(log: pytest.LogCaptureFixture) -> None:
    model = a_network()
    pareto(model, X, schemes="cp", fractions=(0.6, 0.7))
    phases = ["1/3 judge options", "2/3 compute factors", "3/3 measure the result"]
    budgets = [f"budget {number} of 2, {phase}" for number in (1, 2) for phase in phases]
    assert [message.split(":")[0] for message in log.messages] == ["dense network, 3/3 measure the result", *budgets]
    log.clear()
    compress(model, X, schemes="cp", max_drop=0.5, evaluate=lambda _: 1.0)
    assert log.messages[0] == "try 1 of at most 7, 1/2 judge options: 2 layers"


@pytest.mark.parametrize("rule", ["budget", "uniform", "equal_error"])
def test_every_rule_moves_the_bar(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    make_plan(a_network(), X, schemes=["cp", "tucker"], rule=rule, calibration=IMAGES, progress=True)
    assert "layer 2 of 2: 3" in terminal.getvalue()


def test_only_the_first_process_shows_progress(log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    for process in (1, 0):
        monkeypatch.setattr(distributed, "process_and_world_size", lambda process=process: (process, 2))
        with Progress(True).bar("phase", 2, "layer"):
            pass
        assert bool(log.messages) == bool(terminal.getvalue()) == (process == 0)


def test_the_estimate_weighs_layers_by_their_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    with Progress(True, ("phase",)).layers("phase", {"small": 1, "large": 3}) as begin:
        for name in ("small", "small", "large"):
            begin(name)
    percentages = [int(text) for text in re.findall(r"(\d+)%", terminal.getvalue())]
    assert (percentages[0], percentages[-1]) == (0, 100)
    assert set(percentages) == {0, 38, 100}  # (1 / 2 + 1 / 4) / 2


def test_the_estimate_leaves_out_a_bar_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    a_terminal(monkeypatch)
    progress, seconds = Progress(True), 0.0
    with progress.bar("outer", 2, "layer") as bar:
        bar._time = lambda: seconds
        bar.start_t = bar.last_print_t = 0.0
        with progress.bar("inner", 1, "image"):
            seconds = 100.0
        seconds = 101.0
        assert bar.format_dict["elapsed"] == 1.0


def test_a_bar_of_nothing_is_left_out(log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    with Progress(True).layers("phase", {}):
        pass
    assert not log.messages
    assert not terminal.getvalue()
