"""After Ctrl-C at any moment nothing is left behind, and the next call continues from the cache and gets the same result."""

from __future__ import annotations

import copy
import gc
import json
import logging
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _len_torch_function_stack
from torch.utils._python_dispatch import _len_torch_dispatch_stack

import dsconv_surgery
from dsconv_surgery import Budget, Calibration, compress
from dsconv_surgery.compression import Compressed
from dsconv_surgery.support import modes
from dsconv_surgery.support.cache import Cache

PACKAGE = str(Path(dsconv_surgery.__file__).parent)
INTERRUPTIONS = 6  # of a call, which then runs to its end


class Branching(nn.Module):
    """Cannot be traced, so it is calibrated with hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.body = traceable()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x if float(x.sum()) > -1e9 else -x)


def traceable() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2, bias=False), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


class Case:
    """A call of `compress` with a cache in a folder; the model is in training mode, which the call must not change."""

    def __init__(self, make: Callable[[], nn.Module], calibrated: bool, folder: Path) -> None:
        self.model, self.calibrated, self.folder = make(), calibrated, folder
        self.images = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        self.model.train()
        self.before = copy.deepcopy(self.model)

    def run(self, folder: Path) -> Compressed:
        # So little memory that activations go to temporary files.
        calibration = Calibration([self.images], memory=1) if self.calibrated else None
        return compress(
            self.model, self.images[:1], budget=Budget(macs=0.5), schemes=["cp", "bottleneck"], calibration=calibration, cache=folder
        )

    def continued(self, interruptions: Iterator[Any]) -> Compressed:
        """The result after interrupted calls; what each left behind is checked."""
        before, count = process_state(), 0
        for interrupt in interruptions:
            try:
                with interrupt:
                    self.run(self.folder)
            except KeyboardInterrupt:
                count += 1
            gc.collect()
            assert process_state() == before
            self.check_nothing_left()
        assert count, "no call was interrupted"
        return self.run(self.folder)

    def check_nothing_left(self) -> None:
        assert_same_state(self.model, self.before)
        modules = dict(self.model.named_modules())
        for name, original in self.before.named_modules():
            assert vars(modules[name]).keys() == vars(original).keys(), name
            assert type(modules[name]) is type(original)
            assert modules[name].training
            assert not modules[name]._forward_hooks
            assert not modules[name]._forward_pre_hooks
        assert not list(Path(tempfile.gettempdir()).glob("dsconv-surgery-*"))
        assert all(path.suffix == ".json" for path in self.folder.rglob("*") if path.is_file())
        for path in self.folder.rglob("*.json"):
            assert json.loads(path.read_text()).keys() == {"value", "sha256"}


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    states = model.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def process_state() -> dict[str, Any]:
    """Everything global that the library changes for a while."""
    return {
        "switches": [getattr(operation, name) for operation, name, _ in modes._SWITCHES],
        "callers": modes._callers.get(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "stacks": (_len_torch_dispatch_stack(), _len_torch_function_stack()),
        "patches": (nn.Module.__call__, nn.Module.__getattr__),
        "threads": torch.get_num_threads(),
        "random": (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()),
        "gc": gc.isenabled(),
        "loggers": [logging.getLogger(name).disabled for name in ("torch.fx", "torch._dynamo")],
    }


@contextmanager
def interrupted_at(number: int) -> Iterator[list[int]]:
    """Raise KeyboardInterrupt at the n-th start of a function of the package, or return of a C function to it; yields their number.

    At such moments Python looks for signals. With n = 0 there is no interruption.
    """
    count = [0]

    def profile(frame: Any, kind: str, _argument: Any) -> None:
        if kind in ("call", "c_return") and frame.f_code.co_filename.startswith(PACKAGE):
            count[0] += 1
            if count[0] == number:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        yield count
    finally:
        sys.setprofile(None)


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Send a signal that raises KeyboardInterrupt, as Ctrl-C does."""
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


@pytest.fixture(params=[(traceable, True), (Branching, True), (traceable, False)], ids=["images", "hooks", "weights"])
def case(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return Case(*request.param, tmp_path / "cache")


def test_interrupted_at_random_events(case: Case, tmp_path: Path) -> None:
    with interrupted_at(0) as events:
        expected = case.run(tmp_path / "fresh")
    draws = random.Random(0)
    result = case.continued(interrupted_at(draws.randrange(1, events[0])) for _ in range(INTERRUPTIONS))
    assert result.plan == expected.plan
    assert_same_state(result.model, expected.model)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Python drops exceptions in finalisers
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
def test_interrupted_by_signals(case: Case, tmp_path: Path) -> None:
    start = time.perf_counter()
    expected = case.run(tmp_path / "fresh")
    duration, draws = time.perf_counter() - start, random.Random(0)
    result = case.continued(interrupted_after(draws.uniform(0.0, duration)) for _ in range(INTERRUPTIONS))
    assert result.plan == expected.plan
    assert_same_state(result.model, expected.model)


def test_an_interrupted_call_is_continued(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was stored before an interruption is not computed again."""
    computed: list[str] = []
    get = Cache.get

    def counted(cache: Cache, kind: str, key: Any, compute: Callable[[], Any]) -> Any:
        def interruptible() -> Any:
            if len(computed) % 2 == 1:
                computed.append("interrupted")
                raise KeyboardInterrupt
            value = compute()
            computed.append(json.dumps([kind, key]))
            return value

        return get(cache, kind, key, interruptible)

    monkeypatch.setattr(Cache, "get", counted)
    for _ in range(100):
        try:
            case.run(case.folder)
            break
        except KeyboardInterrupt:
            case.check_nothing_left()
    values = [key for key in computed if key != "interrupted"]
    assert "interrupted" in computed
    assert len(set(values)) == len(values) == len(list(case.folder.rglob("*.json")))
