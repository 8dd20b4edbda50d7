"""Latency of single layers on this machine, each geometry timed once, in turn with the chains that may replace it."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from dsconv_surgery.network.geometry import ConvSpec, Size
from dsconv_surgery.schemes import make_layer
from dsconv_surgery.support import distributed
from dsconv_surgery.support.cache import Cache, json_sha256
from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.latency import TOLERANCE, Conditions, Stopwatch, time_in_runtime, timing_conditions
from dsconv_surgery.support.modes import callers_precision
from dsconv_surgery.support.random_state import preserve_random_state
from dsconv_surgery.support.runtimes import Call, Runtime

ROUNDS = 7  # runs of each chain
ALIGNMENT = 64  # numbers; weights begin at multiples of it


class LayerTimer:
    """Times chains of layers outside the network, on the inputs' device with torch's current thread count.

    Args:
        model, inputs: their dtype, device, memory format and batch are used for all timings.
        cache: stores timings by geometry, conditions (with the runtime and its version) and machine, unless other programs disturbed
            them. What a user's function measures is kept in memory, as nothing tells whether the function is the same next time.
        stopwatch: remembers disturbances, for one warning.
        runtime: executes the chains.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, cache: Cache, stopwatch: Stopwatch, runtime: Runtime) -> None:
        self.conditions: Conditions = timing_conditions(inputs, runtime)
        parameter = next(model.parameters(), torch.zeros((), dtype=torch.float32, device="cpu"))
        self._example = torch.empty((), dtype=parameter.dtype, device=parameter.device)
        self._cache, self._stopwatch, self._runtime = cache, stopwatch, runtime
        self._measured: dict[str, float] = {}  # by a user's function
        device = torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else f"{platform.processor()} {platform.machine()}"
        self._environment = {**asdict(self.conditions), "dtype": str(parameter.dtype), "machine": device, "node": platform.node()}

    def time(self, chains: Sequence[Mapping[str, ConvSpec]], sizes: Sequence[Size]) -> list[float]:
        """Milliseconds of chains, each summed over inputs of these sizes; the first chain is the reference of the others.

        Chains that are not in the cache are timed in turn with the reference. If the reference is in the cache, their times are scaled
        by how much longer it takes now, so that drift of the machine between measurements does not favour some chains.
        """
        # Names of layers are not part of the key, so layers of one geometry share their timings.
        shared = {"sizes": [list(size) for size in sizes], **self._environment}
        keys = [{"links": [str(link) for link in chain.values()], **shared} for chain in chains]
        times = [self._read(key) for key in keys]
        missing = [index for index, milliseconds in enumerate(times) if milliseconds is None]
        if missing:
            indices = sorted({0, *missing})
            with preserve_random_state(), callers_precision():
                measured = dict(zip(indices, self._measure([list(chains[index].values()) for index in indices], sizes), strict=True))
            reference, disturbance = measured[0]
            scale = 1.0 if times[0] is None else times[0] / reference
            for index in missing:
                times[index] = measured[index][0] * scale
                if max(disturbance, measured[index][1]) <= TOLERANCE:
                    self._write(keys[index], times[index])
        return [distributed.all_reduce_mean(milliseconds) for milliseconds in times]

    def _read(self, key: Any) -> Any:
        return self._measured.get(json_sha256(key)) if self._runtime.measures else self._cache.read("latency", key)

    def _write(self, key: Any, milliseconds: float) -> None:
        if self._runtime.measures:
            self._measured[json_sha256(key)] = milliseconds
        else:
            self._cache.write("latency", key, milliseconds)

    def _measure(self, chains: Sequence[Sequence[ConvSpec]], sizes: Sequence[Size]) -> list[tuple[float, float]]:
        """Each chain's milliseconds, and the largest disturbance of its runs."""
        # All chains share the memory of their weights. Two parameters of a link may each need up to one ALIGNMENT more.
        weights = self._random(max(sum(link.params + 2 * ALIGNMENT for link in links) for links in chains)).mul_(0.05)
        calls: list[Call] = []
        for batch, *space in sizes:
            inputs: dict[str, Inputs] = {}
            for links in chains:
                shape = (batch, links[0].in_channels) if links[0].kind == "linear" else (batch, links[0].in_channels, *space)
                x = inputs.setdefault(str(shape), Inputs(self._random(*shape)))
                calls.append(self._runtime.prepare_chain(self._build(links, weights), x))
        timings = time_in_runtime(self._runtime, calls, self._example.device, ROUNDS, self._stopwatch)
        groups = [timings[index :: len(chains)] for index in range(len(chains))]
        return [(sum(timing.milliseconds for timing in group), max(timing.disturbance for timing in group)) for group in groups]

    def _random(self, *shape: int) -> Tensor:
        x = torch.randn(shape, device=self._example.device, dtype=torch.float32).to(self._example.dtype)
        return x.contiguous(memory_format=torch.channels_last) if self._channels_last and x.ndim == 4 else x

    @property
    def _channels_last(self) -> bool:
        # In compiled networks, activations are channels_last. A layer compiled alone would convert its contiguous input and output.
        return self.conditions.memory_format == "channels_last" or self._runtime.name == "compile"

    def _build(self, links: Sequence[ConvSpec], weights: Tensor) -> nn.Module:
        """The layers of a chain, with parts of `weights` as their parameters."""
        layers = nn.Sequential(*(make_layer(link, self._example.to("meta")) for link in links)).eval()
        if self._channels_last:
            layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        state: dict[str, Tensor] = {}
        start = 0
        for name, parameter in layers.state_dict().items():
            part = weights.as_strided(parameter.shape, parameter.stride(), start)
            state[name] = part.clone() if self._runtime.measures else part  # a user's function may store the layers
            start += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        layers.load_state_dict(state, assign=True)
        return layers
