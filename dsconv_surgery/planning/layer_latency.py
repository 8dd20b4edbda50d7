"""Latency of single layers on this machine, each geometry timed once."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import nn

from dsconv_surgery.network.geometry import ConvSpec, Size
from dsconv_surgery.schemes import make_layer
from dsconv_surgery.support import distributed
from dsconv_surgery.support.cache import Cache
from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.latency import Conditions, timing_conditions
from dsconv_surgery.support.random_state import preserve_random_state

SECONDS = 0.03  # of timed runs for one geometry


class LayerTimer:
    """Times chains of layers outside the network, on the inputs' device with torch's current thread count.

    Args:
        model, inputs: their dtype, device, memory format and batch are used for all timings.
        cache: stores timings by geometry, conditions and machine.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, cache: Cache) -> None:
        self.conditions: Conditions = timing_conditions(inputs)
        parameter = next(model.parameters(), torch.zeros((), dtype=torch.float32, device="cpu"))
        self._example = torch.empty((), dtype=parameter.dtype, device=parameter.device)
        self._cache = cache
        device = torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else f"{platform.processor()} {platform.machine()}"
        self._environment = {**asdict(self.conditions), "dtype": str(parameter.dtype), "machine": device, "node": platform.node()}

    def time(self, chain: Mapping[str, ConvSpec], sizes: Sequence[Size]) -> float:
        """Median milliseconds of the links run in order, summed over inputs of these sizes."""
        links = list(chain.values())
        # Names of layers are not part of the key, so layers of one geometry share their timings.
        key = {"links": [str(link) for link in links], "sizes": [list(size) for size in sizes], **self._environment}
        with preserve_random_state():
            return distributed.all_reduce_mean(self._cache.get("latency", key, lambda: sum(self._measure(links, size) for size in sizes)))

    def _measure(self, links: Sequence[ConvSpec], size: Size) -> float:
        layers = nn.Sequential(*(make_layer(link, self._example) for link in links)).eval()
        for parameter in layers.parameters():
            nn.init.normal_(parameter, std=0.05)
        batch, *space = size
        shape = (batch, links[0].in_channels) if links[0].kind == "linear" else (batch, links[0].in_channels, *space)
        x = torch.randn(shape, device=self._example.device, dtype=torch.float32).to(self._example.dtype)
        if self.conditions.memory_format == "channels_last" and x.ndim == 4:
            layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            x = x.contiguous(memory_format=torch.channels_last)
        from torch.utils.benchmark import Timer  # here, as it takes long to import

        timer = Timer("layers(x)", globals={"layers": layers, "x": x}, num_threads=self.conditions.threads)
        with torch.inference_mode():
            timer.timeit(3)  # warm-up; Timer synchronises CUDA itself
            return 1e3 * timer.blocked_autorange(min_run_time=SECONDS).median
