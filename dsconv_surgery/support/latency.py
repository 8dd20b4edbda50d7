"""Latency of whole networks: measured in turn, with the conditions that a time holds for."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import nn

from dsconv_surgery.support.copies import evaluation_copy
from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.random_state import preserve_random_state
from dsconv_surgery.support.records import record

ROUNDS = 15  # forward passes of each network


@record
class Conditions:
    """What a time holds for."""

    threads: int
    batch: int
    dtype: str
    device: str
    memory_format: str

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.threads} threads, {self.dtype}, {self.memory_format}, {self.device}"


@record
class Latency:
    """Median milliseconds of the dense and the cut network, timed in turn, and the time that was predicted for the cut one."""

    before: float
    after: float
    conditions: Conditions
    rounds: int
    predicted: float | None = None


def timing_conditions(inputs: Inputs) -> Conditions:
    """The inputs' device, dtype, batch and memory format, and torch's current thread count."""
    first = next(iter(inputs.tensors), None)
    if first is None:
        raise ValueError("latency: the example inputs hold no tensor, so there is no batch to time. Pass the tensors of the network.")
    channels_last = first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last) and not first.is_contiguous()
    batch, dtype = first.shape[0] if first.ndim else 1, str(first.dtype).removeprefix("torch.")
    memory_format = "channels_last" if channels_last else "contiguous"
    return Conditions(torch.get_num_threads(), batch, dtype, str(first.device), memory_format)


def measure_latency(models: Sequence[nn.Module], inputs: Inputs, rounds: int = ROUNDS) -> list[float]:
    """Median milliseconds of copies of networks, end to end in evaluation mode, on torch's current thread count."""
    from torch.utils.benchmark import Timer

    threads, arguments = torch.get_num_threads(), {"args": inputs.args, "kwargs": inputs.kwargs}
    call = "model(*args, **kwargs)"
    timers = [Timer(call, globals=arguments | {"model": evaluation_copy(model)}, num_threads=threads) for model in models]
    with torch.inference_mode(), preserve_random_state():
        for timer in timers:
            timer.timeit(2)  # warm-up; Timer synchronises CUDA itself
        # In turn, so that a busy moment of the machine affects all networks.
        times = [[1e3 * timer.timeit(1).median for timer in timers] for _ in range(rounds)]
    return [statistics.median(samples) for samples in zip(*times, strict=True)]
