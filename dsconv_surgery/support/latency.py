"""Latency of whole networks: measured in turn, with the conditions that a time holds for."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dsconv_surgery.support.records import record


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


def timing_conditions(inputs: Sequence[Any]) -> Conditions:
    """The inputs' device, dtype, batch and memory format, and torch's current thread count."""
    first = next(t for t in pytree.tree_leaves(tuple(inputs)) if isinstance(t, Tensor))
    channels_last = first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last) and not first.is_contiguous()
    return Conditions(
        threads=torch.get_num_threads(),
        batch=first.shape[0] if first.ndim else 1,
        dtype=str(first.dtype).removeprefix("torch."),
        device=str(first.device),
        memory_format="channels_last" if channels_last else "contiguous",
    )


def measure_latency(models: Sequence[nn.Module], inputs: Sequence[Any], rounds: int = 15) -> list[float]:
    """Median milliseconds of networks timed side by side, end to end in evaluation mode, on torch's current thread count."""
    from torch.utils.benchmark import Timer

    threads = torch.get_num_threads()
    times: list[list[float]] = [[] for _ in models]
    timers = [Timer("model(*inputs)", globals={"model": model, "inputs": tuple(inputs)}, num_threads=threads) for model in models]
    with _evaluation_mode(*models), torch.inference_mode():
        for timer in timers:
            timer.timeit(2)  # warm-up; Timer synchronises CUDA itself
        for _ in range(rounds):  # in turn, so that a busy moment of the machine affects all networks
            for timer, samples in zip(timers, times, strict=True):
                samples.append(1e3 * timer.timeit(1).median)
    return [statistics.median(samples) for samples in times]


@contextmanager
def _evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module has its earlier training flag."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training
