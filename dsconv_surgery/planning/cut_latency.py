"""Latency of whole networks: the dense one, and cut ones with random weights, in turn."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from dsconv_surgery.network.batchnorm_folding import folded_for_timing
from dsconv_surgery.network.geometry import ConvSpec
from dsconv_surgery.plan import Plan
from dsconv_surgery.support import distributed
from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.latency import ROUNDS, Latency, Stopwatch, measure_latency, timing_conditions
from dsconv_surgery.support.progress import Progress
from dsconv_surgery.support.random_state import preserve_random_state
from dsconv_surgery.support.runtimes import Runtime
from dsconv_surgery.support.user_warning import warn_user
from dsconv_surgery.surgery import build_cut_model

MISSED = 1.05  # a plan that takes more than this factor of its budget is warned of


class CutTimer:
    """Times a network and the networks that plans cut from it, end to end, with BatchNorms folded.

    Args:
        stopwatch: remembers disturbances, for one warning.
        runtime: executes the networks.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, stopwatch: Stopwatch, runtime: Runtime) -> None:
        self._inputs, self._stopwatch, self._runtime = inputs, stopwatch, runtime
        (self._model,) = folded_for_timing([model], inputs)
        self._conditions = timing_conditions(inputs, runtime, self._model is not model)
        (self.dense,) = self._measure([self._model])  # milliseconds

    def time(self, plan: Plan, predicted: float) -> Latency:
        """The latency of the network cut by a plan, relative to the dense time that the budget was set by."""
        with preserve_random_state():
            cut = _random_cut(self._model, plan)
        dense, after = self._measure([self._model, cut])
        after *= self.dense / dense  # the machine may be busier than when the budget was set
        rounds = 0 if self._runtime.measures else ROUNDS
        return Latency(self.dense, after, self._conditions, rounds, predicted)

    def _measure(self, models: list[nn.Module]) -> list[float]:
        times = measure_latency(models, self._inputs, stopwatch=self._stopwatch, runtime=self._runtime)
        return [distributed.all_reduce_mean(milliseconds) for milliseconds in times]


def warn_of_missed_budget(timing: Latency, fraction: float) -> None:
    """Warn if the best plan takes longer than its budget on latency, or than the dense network."""
    actual, runtime = timing.after / timing.before, timing.conditions.runtime
    if actual <= MISSED * fraction:
        return
    slower = "No plan that was tried is faster than the dense network. " if actual >= 1 else ""
    warn_user(
        f"latency: the budget keeps {fraction:g} of the time, but the best plan takes {actual:.2f} of it ({timing.before:.3g} -> "
        f"{timing.after:.3g} ms in {runtime}), as times of single layers do not add up to the network's. {slower}Raise the budget, allow "
        "more schemes, or compare other runtimes.",
    )


def _random_cut(model: nn.Module, plan: Plan) -> nn.Module:
    """A network cut by a plan, with random weights in the new links; layers may have the biases of folded BatchNorms."""
    cuts = tuple(replace(c, spec=ConvSpec.of(model.get_submodule(c.name))) for c in plan.cuts)
    cut = build_cut_model(model, replace(plan, cuts=cuts), "empty", {}, Progress(False), check_on=None)
    for name in (c.name for c in plan.cuts):
        for link in cut.get_submodule(name).children():
            weight = link.get_parameter("weight")
            with torch.no_grad():
                weight.normal_(std=weight[0].numel() ** -0.5)
    return cut
