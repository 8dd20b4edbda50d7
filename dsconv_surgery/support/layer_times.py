"""Milliseconds that layers take inside a running network."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from dsconv_surgery.support.copies import evaluation_copy, run_model
from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.latency import timing_conditions
from dsconv_surgery.support.modes import callers_precision
from dsconv_surgery.support.random_state import preserve_random_state
from dsconv_surgery.support.runtimes import find_runtime

WARM_UP, ROUNDS = 2, 9  # runs of the network: before any is timed, and timed


def measure_layer_times(model: nn.Module, names: Iterable[str], inputs: Inputs) -> dict[str, float]:
    """Milliseconds of layers, each the lower quartile over runs of the sum of its calls.

    Args:
        model: it runs as a copy in evaluation mode, eagerly, on torch's current thread count.
        names: layers. The few microseconds of the hooks that time them are part of their times.
    """
    device = torch.device(timing_conditions(inputs, find_runtime("eager")).device)
    network, runs = evaluation_copy(model), dict[str, list[float]]()
    moment: Callable[[], Any] = time.perf_counter if device.type == "cpu" else partial(_event, device)
    calls: list[tuple[str, Any, Any]] = []
    begun: dict[str, Any] = {}
    for name in (names := list(names)):
        layer = network.get_submodule(name)
        layer.register_forward_pre_hook(lambda *_, name=name: begun.__setitem__(name, moment()))
        layer.register_forward_hook(lambda *_, name=name: calls.append((name, begun[name], moment())))
    with torch.inference_mode(), preserve_random_state(), callers_precision():
        for number in range(WARM_UP + ROUNDS):
            calls.clear()
            run_model(network, inputs)
            if device.type != "cpu":
                torch.get_device_module(device).synchronize()
            sums = dict.fromkeys(names, 0.0)
            for name, start, end in calls:
                sums[name] += 1e3 * (end - start) if device.type == "cpu" else start.elapsed_time(end)
            for name in names if number >= WARM_UP else ():
                runs.setdefault(name, []).append(sums[name])
    return {name: sorted(times)[len(times) // 4] for name, times in runs.items()}


def _event(device: torch.device) -> Any:
    """A moment on a GPU's stream."""
    module = torch.get_device_module(device)
    event = module.Event(enable_timing=True)
    event.record(module.current_stream(device))
    return event
