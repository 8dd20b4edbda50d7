"""Latency: calls timed in turn, the disturbance by other programs, and the conditions that a time holds for."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.modes import callers_precision
from dsconv_surgery.support.random_state import preserve_random_state
from dsconv_surgery.support.records import record
from dsconv_surgery.support.runtimes import Call, Runtime, find_runtime
from dsconv_surgery.support.user_warning import warn_user

ROUNDS = 15  # runs of each network
ATTEMPTS = 3  # disturbed calls are timed again, for up to this many times the rounds
SHORTEST_RUN, SHORTEST_TICKS = 1e-3, 20  # shorter calls are repeated until a run lasts so many seconds, and so many ticks of the clock
MOST_CALLS = 10**6  # in a run, for a clock that stands still
TOLERANCE = 1.1  # a disturbance up to this factor is ignored; quiet machines stay below it


@record
class Conditions:
    """What a time holds for."""

    threads: int
    batch: int
    dtype: str
    device: str
    memory_format: str
    runtime: str = "eager"
    runtime_version: str = ""  # of eager mode, and of a user's function, none
    batchnorm_folded: bool = False  # before the networks were timed

    def comparable(self, other: Conditions) -> bool:
        """Whether networks were timed in the same way."""
        return (self.runtime, self.batchnorm_folded) == (other.runtime, other.batchnorm_folded)

    def __str__(self) -> str:
        runtime = f"{self.runtime} {self.runtime_version}".rstrip() + ", BatchNorms folded" * self.batchnorm_folded
        return f"batch {self.batch}, {self.threads} threads, {self.dtype}, {self.memory_format}, {self.device}, {runtime}"


@record
class Latency:
    """Milliseconds of the dense and the cut network, timed in turn, and the time that was predicted for the cut one.

    They hold without interruptions by other programs, and come from the fastest quarter of at least so many rounds; zero rounds if a
    user's function measured them.
    """

    before: float
    after: float
    conditions: Conditions
    rounds: int
    predicted: float | None = None

    def __str__(self) -> str:
        """Both times, and by which factor the cut network is faster or slower."""
        slower = self.after > self.before
        ratio = f"{max(self.after, self.before) / min(self.after, self.before):.2f}"
        verdict = "as fast as" if ratio == "1.00" else f"{ratio}x slower than" if slower else f"{ratio}x faster than"
        return f"{self.before:.2f} -> {self.after:.2f} ms, {verdict} the dense network"

    def with_conditions(self) -> str:
        """A line with the times, the predicted one, and what they hold for."""
        predicted = "" if self.predicted is None else f", predicted {self.predicted:.2f} ms"
        rounds = f"fastest quarter of at least {self.rounds} rounds, " if self.rounds else ""
        return f"latency {self}{predicted} ({rounds}{self.conditions})"


def timing_conditions(inputs: Inputs, runtime: Runtime, batchnorm_folded: bool = False) -> Conditions:
    """The inputs' device, dtype, batch and memory format, torch's current thread count, and the runtime."""
    first = next(iter(inputs.tensors), None)
    if first is None:
        raise ValueError("latency: the example inputs hold no tensor, so there is no batch to time. Pass the tensors of the network.")
    channels_last = first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last) and not first.is_contiguous()
    batch, dtype = first.shape[0] if first.ndim else 1, str(first.dtype).removeprefix("torch.")
    memory_format = "channels_last" if channels_last and runtime.name != "onnxruntime" else "contiguous"  # onnxruntime gets NCHW arrays
    threads = torch.get_num_threads()
    return Conditions(threads, batch, dtype, str(first.device), memory_format, runtime.name, runtime.version, batchnorm_folded)


@record
class Clocks:
    """Functions that read the wall time and the CPU time of the calling thread, in seconds, and the steps that these advance by.

    The thread's CPU time tells interruptions from work for any number of threads: the calling thread takes part in parallel work, and
    waits actively for the others. It waits passively, for long, only where another program holds up one of them.
    """

    wall: Callable[[], float] = time.perf_counter
    cpu: Callable[[], float] = time.thread_time
    wall_tick: float = time.get_clock_info("perf_counter").resolution
    cpu_tick: float = 1 / 64 if time.get_clock_info("thread_time").implementation.startswith("GetThreadTimes") else 1e-6


CLOCKS = Clocks()


@record
class Timing:
    """Milliseconds of a call without interruptions, and the factor by which these stretched its runs: 1 on a quiet machine."""

    milliseconds: float
    disturbance: float


class Stopwatch:
    """Times calls in turn, and remembers how much other programs disturbed them.

    `disturbance = max(q / t_1, sum_i t_i / sum_i c_i)` for a call whose runs took t_1 <= t_2 <= ... seconds of wall time and c_i of the
    thread's CPU time, with their lower quartile q and sums over the runs up to it. The first factor shows that too few runs agree. The
    second, on CPUs only, shows interruptions even if they stretch all runs alike. The call's time is `q / disturbance`.
    """

    def __init__(self, clocks: Clocks | None = None) -> None:
        self._clocks = clocks or CLOCKS
        self.disturbance = 1.0  # the largest of all turns since the last warning

    def time(self, calls: Sequence[Callable[[], Any]], device: torch.device | str, rounds: int) -> list[Timing]:
        """Time calls in turn, round after round, so that drift and bursts of load affect all; repeat those that were disturbed."""
        run = partial(self._run_cuda if torch.device(device).type == "cuda" else self._run, torch.device(device))
        collects = gc.isenabled()
        try:
            gc.disable()
            numbers = [self._calls_per_run(partial(run, call)) for call in calls]
            runs: list[list[tuple[float, float]]] = [[] for _ in calls]
            timings = [Timing(0.0, math.inf) for _ in calls]
            for _ in range(ATTEMPTS):
                again = [index for index, timing in enumerate(timings) if timing.disturbance > TOLERANCE]
                for _ in range(rounds):
                    for index in again:
                        runs[index].append(run(calls[index], numbers[index]))
                for index in again:
                    timings[index] = self._judge(runs[index], numbers[index])
        finally:
            if collects:
                gc.enable()
        # Over a whole turn, so that a single odd call among many is not taken for a busy machine.
        if undisturbed := sum(timing.milliseconds for timing in timings):
            disturbed = sum(timing.milliseconds * timing.disturbance for timing in timings)
            self.disturbance = max(self.disturbance, disturbed / undisturbed)
        return timings

    def warn(self) -> None:
        """Warn, with the figure, if anything timed since the last warning was disturbed too much."""
        disturbance, self.disturbance = self.disturbance, 1.0
        if disturbance > TOLERANCE:
            warn_user(
                f"latency: the machine was too busy to measure it well. Interruptions made runs {disturbance:.2f} times as long. Times are "
                "corrected, but may be wrong by up to this factor. Close other programs and run this again.",
            )

    def _run(self, device: torch.device, call: Callable[[], Any], number: int) -> tuple[float, float]:
        """Seconds of wall time of so many calls, and of the thread's CPU time if the CPU runs them, else of wall time again."""
        clocks, on_cpu = self._clocks, device.type in ("cpu", "meta")
        synchronize = (lambda: None) if on_cpu else torch.get_device_module(device).synchronize
        synchronize()
        wall, cpu = clocks.wall(), clocks.cpu()
        for _ in range(number):
            call()
        synchronize()
        cpu, wall = clocks.cpu() - cpu, clocks.wall() - wall
        return wall, cpu if on_cpu else wall

    def _run_cuda(self, device: torch.device, call: Callable[[], Any], number: int) -> tuple[float, float]:
        """The same between two events on the GPU, where no CPU time shows interruptions."""
        stream = torch.cuda.current_stream(device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(stream)
        for _ in range(number):
            call()
        end.record(stream)
        end.synchronize()
        return (seconds := start.elapsed_time(end) / 1e3), seconds

    def _calls_per_run(self, run: Callable[[int], tuple[float, float]]) -> int:
        """How many calls make up a run that is long enough for the clock; they warm up the call as well."""
        number, shortest = 1, max(SHORTEST_RUN, SHORTEST_TICKS * self._clocks.wall_tick)
        run(number)
        while (seconds := min(run(number)[0] for _ in range(2))) < shortest and number < MOST_CALLS:
            number *= 10 if seconds * 10 < shortest else math.ceil(shortest / seconds)
        return number

    def _judge(self, runs: list[tuple[float, float]], number: int) -> Timing:
        fastest = sorted(runs)[: (len(runs) - 1) // 4 + 1]
        wall, cpu = (sum(seconds) for seconds in zip(*fastest, strict=True))
        quartile, shortest = fastest[-1][0], max(fastest[0][0], self._clocks.wall_tick)
        disturbance = max(1.0, quartile / shortest, wall / (cpu + len(fastest) * self._clocks.cpu_tick))
        return Timing(1e3 * quartile / number / disturbance, disturbance)


def time_in_runtime(
    runtime: Runtime, prepared: Sequence[Call], device: torch.device | str, rounds: int, stopwatch: Stopwatch
) -> list[Timing]:
    """Time calls that a runtime prepared, in turn; a user's function measures each by itself."""
    if runtime.measures:
        with torch.no_grad():  # not inference_mode, as the function may export the network
            return [Timing(call(), 1.0) for call in prepared]
    with torch.inference_mode():
        return stopwatch.time(prepared, device, rounds)


def measure_latency(
    models: Sequence[nn.Module],
    inputs: Inputs,
    rounds: int = ROUNDS,
    stopwatch: Stopwatch | None = None,
    runtime: Runtime | None = None,
) -> list[float]:
    """Milliseconds of copies of networks, end to end in evaluation mode, timed in turn on torch's current thread count.

    Args:
        stopwatch: remembers disturbances, for one warning about several measurements. Without it, the warning is given here.
        runtime: executes the copies; eager mode if not given. It keeps what it prepared for a network.
    """
    watch, runtime = stopwatch or Stopwatch(), runtime or find_runtime("eager")
    device = timing_conditions(inputs, runtime).device
    with preserve_random_state(), callers_precision():  # torch.export runs in no other
        timings = time_in_runtime(runtime, [runtime.network_call(model, inputs) for model in models], device, rounds, watch)
    if stopwatch is None:
        watch.warn()
    return [timing.milliseconds for timing in timings]
