"""Times of layers inside a network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dsconv_surgery.support import layer_times
from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.layer_times import measure_layer_times

STEP = 0.25  # seconds that a fake clock adds with each reading


class Net(nn.Module):
    """Layer "a" is called twice, "c" never."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.a(x)))


def test_calls_are_summed_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call lasts one step of the clock: it is read before and after."""
    seconds = iter(index * STEP for index in range(10**6))
    monkeypatch.setattr(layer_times.time, "perf_counter", lambda: next(seconds))
    model = Net().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert measure_layer_times(model, ["a", "b", "c"], Inputs(torch.rand(1, 4, 8, 8))) == {"a": 500.0, "b": 250.0, "c": 0.0}
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_larger_layer_takes_longer() -> None:
    model = nn.Sequential(nn.Conv2d(4, 256, 3), nn.Conv2d(256, 256, 3))
    times = measure_layer_times(model, ["0", "1"], Inputs(torch.rand(1, 4, 32, 32)))
    assert times["1"] > times["0"] > 0
