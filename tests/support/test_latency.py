"""Timing on a machine that other programs use, with clocks that the tests set."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dsconv_surgery import Budget, make_plan
from dsconv_surgery.budget import BudgetError
from dsconv_surgery.network.geometry import ConvSpec
from dsconv_surgery.planning.layer_latency import LayerTimer
from dsconv_surgery.planning.planner import Planner
from dsconv_surgery.planning.settings import PlanSettings
from dsconv_surgery.support import latency
from dsconv_surgery.support.cache import Cache
from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.latency import ATTEMPTS, ROUNDS, Clocks, Stopwatch, measure_latency
from dsconv_surgery.support.runtimes import find_runtime

Load = Callable[[float, float], tuple[float, float]]  # from the present and a call's CPU seconds to its wall seconds and CPU seconds
LONG, SHORT = 0.04, 0.0003


def quiet(_now: float, seconds: float) -> tuple[float, float]:
    return seconds, seconds


class Machine:
    """A machine on which calls take the time that a load gives them; its clocks advance in steps of a tick."""

    def __init__(self, load: Load = quiet, tick: float = 1e-9) -> None:
        self.load, self.now, self.cpu, self.runs = load, 0.0, 0.0, 0
        self.clocks = Clocks(
            wall=lambda: math.floor(self.now / tick) * tick, cpu=lambda: math.floor(self.cpu / tick) * tick, wall_tick=tick, cpu_tick=tick
        )

    def run(self, seconds: float) -> None:
        wall, cpu = self.load(self.now, seconds)
        self.now, self.cpu, self.runs = self.now + wall, self.cpu + cpu, self.runs + 1

    def time(self, *seconds: float, device: str = "cpu") -> tuple[list[float], float]:
        """Seconds of calls that take so long on a quiet machine, and their disturbance."""
        watch = Stopwatch(self.clocks)
        timings = watch.time([lambda s=s: self.run(s) for s in seconds], device, ROUNDS)  # type: ignore[misc]
        return [timing.milliseconds / 1e3 for timing in timings], watch.disturbance


def test_a_quiet_machine_is_timed_exactly_and_without_a_warning() -> None:
    machine = Machine()
    times, disturbance = machine.time(LONG, SHORT)
    assert times == pytest.approx([LONG, SHORT])
    assert disturbance == pytest.approx(1)
    assert machine.time(LONG, SHORT)[0] == pytest.approx(times)
    runs = machine.runs
    machine.time(LONG)
    assert machine.runs - runs <= ROUNDS + 3  # nothing is repeated


@pytest.mark.parametrize("threads", [1, 8])
def test_a_constant_load_is_found_by_cpu_time(threads: int) -> None:
    """All runs agree, so that only the thread's CPU time shows that all take 1.8 times as long. Waiting workers do not change it."""
    machine = Machine(lambda _now, seconds: (1.8 * seconds, seconds))
    times, disturbance = machine.time(LONG, SHORT, *[LONG] * (threads - 1))
    assert times[:2] == pytest.approx([LONG, SHORT], rel=1e-3)
    assert disturbance == pytest.approx(1.8, rel=1e-3)


def slices(now: float, seconds: float) -> tuple[float, float]:
    """Two other programs in turn with this one: 3 ms for this one, then 6 ms for them. Short calls often fit into 3 ms."""
    position = now % 0.009
    wait = max(0.0, position - 0.003) and 0.009 - position
    start = 0.0 if wait else position
    interruptions = max(0, math.ceil((start + seconds - 1e-12) / 0.003) - 1)
    return wait + seconds + 0.006 * interruptions, seconds


def test_a_load_that_stretches_long_calls_alone_leaves_their_ratio() -> None:
    """As a scheduler does: a long call takes three times as long, a short one as long as ever."""
    assert slices(0.0, LONG)[0] > 2.9 * LONG
    assert slices(0.0, SHORT)[0] == SHORT
    (long, short), disturbance = Machine(slices).time(LONG, SHORT)
    assert long / short == pytest.approx(LONG / SHORT, rel=0.05)
    assert disturbance == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize(("end", "attempts"), [(0.2, 1), (1.5, 1), (1.85, 2)])
def test_a_burst_is_outlasted(end: float, attempts: int) -> None:
    """In a burst, long calls alone take three times as long, and as much CPU time, as beside a program that fills the caches.

    A quarter of quiet rounds is enough; with fewer, the rounds are repeated.
    """
    machine = Machine(lambda now, seconds: (3 * seconds,) * 2 if now < end and seconds == LONG else (seconds,) * 2)
    times, disturbance = machine.time(LONG)
    assert times == pytest.approx([LONG])
    assert disturbance == pytest.approx(1)
    assert machine.runs == 3 + attempts * ROUNDS


def test_runs_that_never_agree_are_given_up_with_a_figure() -> None:
    """Every run takes another time, so that no time is the right one; the runs end."""
    numbers = count()
    machine = Machine(lambda _now, seconds: (seconds * 1.5 ** (next(numbers) % 40),) * 2)
    disturbance = machine.time(LONG)[1]
    assert machine.runs <= ATTEMPTS * ROUNDS + 3
    assert disturbance > 1.5


def test_drift_affects_all_calls_alike() -> None:
    """A machine that becomes slower, or faster, by a fifth during the rounds: the ratio of the first call and the last stays."""
    for speed in (-0.1, 0.1):
        machine = Machine(lambda now, seconds, speed=speed: (seconds * math.exp(speed * now),) * 2)  # type: ignore[misc]
        first, *_, last = machine.time(LONG, *[LONG / 50] * 20, 0.98 * LONG)[0]
        assert last / first == pytest.approx(0.98, abs=0.03)


@pytest.mark.parametrize("tick", [0.001, 1 / 64])
def test_a_coarse_clock_gets_longer_runs(tick: float) -> None:
    times, disturbance = Machine(tick=tick).time(LONG, SHORT)
    assert times == pytest.approx([LONG, SHORT], rel=0.1)
    assert disturbance <= latency.TOLERANCE


def test_a_clock_that_stands_still_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "MOST_CALLS", 100)
    assert Machine(lambda _now, _seconds: (0.0, 0.0)).time(LONG) == ([0.0], 1.0)


def test_a_gpu_is_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """The times are those between events on the device's stream; the calls' CPU time means nothing."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.when, self.waited = math.nan, False

        def record(self, stream: str) -> None:
            assert stream == "stream of cuda:1"
            self.when = machine.now

        def synchronize(self) -> None:
            self.waited = True

        def elapsed_time(self, end: Event) -> float:
            assert end.waited
            return 1e3 * (end.when - self.when)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    machine = Machine(lambda _now, seconds: (seconds, 1e-6))
    times, disturbance = machine.time(LONG, SHORT, device="cuda:1")
    assert times == pytest.approx([LONG, SHORT])
    assert disturbance == pytest.approx(1)
    numbers = count()
    machine.load = lambda _now, seconds: (seconds * (1 if next(numbers) % 20 == 5 else 1.5),) * 2
    times, disturbance = machine.time(LONG, device="cuda:1")
    assert times == pytest.approx([LONG])
    assert disturbance == pytest.approx(1.5)  # known from runs that do not agree


def test_timing_leaves_the_garbage_collector_as_it_was() -> None:
    collecting: list[bool] = []
    Stopwatch().time([lambda: collecting.append(gc.isenabled())], "cpu", 1)
    assert not any(collecting)
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        Stopwatch().time([lambda: 1 / 0], "cpu", 1)
    assert gc.isenabled()


# ---- plans and reports


class Net(nn.Module):
    """Two layers of one geometry and another, whose calls take time on a machine in proportion to their MACs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 32, 3)

    def forward(self, x: Any) -> Any:
        return self.c(self.b(self.a(x)))


X = torch.zeros(1, 16, 12, 12)
SECONDS_PER_MAC = 1e-9


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    result, conv2d = Machine(), nn.functional.conv2d

    def timed(x: Any, weight: Any, *rest: Any) -> Any:
        y = conv2d(x, weight, *rest)
        if torch.is_inference_mode_enabled():
            result.run(SECONDS_PER_MAC * weight[0].numel() * y.numel())
        return y

    monkeypatch.setattr(nn.functional, "conv2d", timed)
    monkeypatch.setattr(latency, "CLOCKS", result.clocks)
    return result


def plan(**settings: Any) -> Any:
    return make_plan(Net(), X, budget=Budget(latency=0.6), schemes=["spatial", "cp"], **settings)


def test_plans_are_the_same_on_a_quiet_and_on_a_busy_machine(machine: Machine) -> None:
    """Clocks decide all that differs between two plans: equal clocks, equal plans. A busy machine is warned of once, with the figure."""
    torch.manual_seed(0)
    first = plan(cache=False)
    assert first.cuts
    assert first.timing.after <= 0.62 * first.timing.before
    assert first.timing.after == pytest.approx(first.timing.predicted)
    torch.manual_seed(0)
    second = plan(cache=False)
    assert [cut.rank for cut in first.cuts] == [cut.rank for cut in second.cuts]
    assert second.timing.after == pytest.approx(first.timing.after)
    machine.load = lambda _now, seconds: (1.7 * seconds, seconds)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"too busy .* 1\.70 times as long") as group:
        busy = plan(cache=False)
    assert sum("too busy" in str(warning.message) for warning in group) == 1
    assert [cut.rank for cut in first.cuts] == [cut.rank for cut in busy.cuts]
    assert busy.timing.after == pytest.approx(first.timing.after, rel=1e-3)


def test_budgets_out_of_reach_come_with_the_warning(machine: Machine) -> None:
    machine.load = lambda _now, seconds: (1.7 * seconds, seconds)
    settings = PlanSettings(budget=Budget(latency=0.01), schemes="channel")
    with pytest.warns(UserWarning, match="too busy"), pytest.raises(BudgetError):
        make_plan(Net(), X, budget=settings.budget, schemes="channel")
    planner = Planner(Net(), Inputs(X), settings, None, cache=False)
    with pytest.warns(UserWarning, match="too busy"), pytest.raises(BudgetError):
        planner.check(Budget(latency=0.01))


def test_disturbed_times_are_not_cached(machine: Machine, tmp_path: Path) -> None:
    machine.load = lambda _now, seconds: (1.7 * seconds, seconds)
    with pytest.warns(UserWarning, match="too busy"):
        plan(cache=tmp_path)
    assert not list(tmp_path.glob("latency/*"))
    machine.load = quiet
    plan(cache=tmp_path)
    files = list(tmp_path.glob("latency/*"))
    assert files
    plan(cache=tmp_path)
    assert list(tmp_path.glob("latency/*")) == files


def test_chains_are_scaled_to_a_reference_from_the_cache(machine: Machine, tmp_path: Path) -> None:
    """A machine that became twice as slow after the layer was timed: its chain is timed as if it had not."""
    spec = ConvSpec.of(nn.Conv2d(16, 16, 3))
    dense, chain = {"dense": spec}, {"first": ConvSpec.of(nn.Conv2d(16, 4, 1)), "last": ConvSpec.of(nn.Conv2d(4, 16, 3))}
    timer = LayerTimer(Net(), Inputs(X), Cache(tmp_path), Stopwatch(), find_runtime("eager"))
    sizes = [(1, 12, 12), (1, 24, 24)]
    expected = LayerTimer(Net(), Inputs(X), Cache(False), Stopwatch(), find_runtime("eager")).time([dense, chain], sizes)
    assert expected[0] == pytest.approx(1e3 * SECONDS_PER_MAC * sum(spec.macs(size) for size in sizes), rel=1e-3)
    (reference,) = timer.time([dense], sizes)
    machine.load = lambda _now, seconds: (2 * seconds,) * 2
    assert timer.time([dense, chain], sizes) == pytest.approx([reference, expected[1]], rel=1e-3)
    runs = machine.runs
    assert timer.time([dense, chain], sizes) == pytest.approx([reference, expected[1]], rel=1e-3)
    assert machine.runs == runs  # from the cache


def test_networks_are_timed_in_turn(machine: Machine) -> None:
    """A slow half of the rounds is slow for both; without a stopwatch to remember it, the warning is given at once."""
    once, twice = nn.Conv2d(16, 16, 3), nn.Sequential(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before, after = measure_latency([once, twice], Inputs(X))
    assert after / before == pytest.approx(2 * 144 / (9 * 100), rel=1e-3)
    machine.load = lambda _now, seconds: (1.7 * seconds, seconds)
    with pytest.warns(UserWarning, match="too busy"):
        measure_latency([once, twice], Inputs(X))
