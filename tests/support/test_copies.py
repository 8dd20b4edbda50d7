"""Copies of networks that hold more than parameters, and modes of the caller."""

from __future__ import annotations

import copy
import logging
import threading
from collections import deque
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsconv_surgery import Budget, FineTune, apply_plan, compare, compress, find_convs, fine_tune, fold_back, load, make_plan, save
from dsconv_surgery.calibration.images import Images
from dsconv_surgery.calibration.side_by_side import SideBySide, network_pair
from dsconv_surgery.support.copies import CopyError, copy_model, fake_copy, unregistered_tensors
from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.random_state import seeded

X, DATA = torch.rand(1, 3, 10, 10), [torch.rand(24, 3, 10, 10)]


class Slotted:
    __slots__ = ("value",)


class Net(nn.Module):
    """Keeps activations, with their history, in `place`."""

    def __init__(self, place: Any) -> None:
        super().__init__()
        self.first, self.second, self.place = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 24, 3), place

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        keep(self.place, y)
        return self.second(y)


def keep(place: Any, y: Tensor) -> None:
    if isinstance(place, dict):
        place["y"] = [y]
    elif isinstance(place, list | deque):
        place.append({"y": (y, 1)})
    elif isinstance(place, partial):
        place.args[0].append(y)
    else:
        place.value = y


PLACES: dict[str, Any] = {
    "dict": dict,
    "list": list,
    "deque": lambda: deque(maxlen=2),
    "object": SimpleNamespace,
    "slots": Slotted,
    "partial": lambda: partial(print, []),
}


@pytest.mark.parametrize("kind", PLACES)
def test_stored_activations_do_not_break_copies(kind: str) -> None:
    model = Net(PLACES[kind]())
    model(X)
    assert any(not tensor.is_leaf for tensor in unregistered_tensors(model))
    small = compress(model, X, budget=Budget(macs=0.5), schemes="spatial", calibration=DATA, cache=False)
    small.model(X)
    fine_tune(small.model, DATA, teacher=model, settings=FineTune(epochs=1))
    compare(model, small.model, X, plan=small.plan)
    fold_back(small.model, small.plan)
    assert {type(t).__name__ for t in unregistered_tensors(fake_copy(model, Inputs(X))[1])} == {"FakeTensor"}


@pytest.mark.parametrize("kind", ["lock", "file", "generator", "nested"])
def test_what_cannot_be_copied_is_named_by_its_path(kind: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3)))
    value: Any = {
        "lock": threading.Lock(),
        "generator": (n for n in range(3)),
        "nested": {"a": [SimpleNamespace(guard=threading.Lock())]},
    }.get(kind)
    path = {"nested": r"1\.0\.thing\['a'\]\[0\]\.guard"}.get(kind, r"1\.0\.thing")
    with open(__file__) as file:
        model[1][0].thing = file if kind == "file" else value
        for call in (lambda: copy_model(model), lambda: find_convs(model, X), lambda: fake_copy(model, Inputs(X))):
            with pytest.raises(CopyError, match=path):
                call()


def test_failed_fake_runs_leave_no_log(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            y = self.conv(x)
            y = y[y.sum((1, 2, 3)) > -1e9]
            return y if mask is None else y * mask

    (site,) = find_convs(Counting().eval(), X)
    assert site.name == "conv"
    compress(Counting().eval(), X, None, calibration=[(DATA[0], None)], schemes="spatial", rule="fixed", rank=2, cache=False)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert capfd.readouterr() == ("", "")


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16 * 36, 5)
    ).eval()


def results(model: nn.Module, folder: Any) -> tuple[Any, ...]:
    """What the public functions give for a network: plans as text, weights, numbers."""
    settings: dict[str, Any] = {"budget": Budget(macs=0.6), "cache": False}
    free, fitted = compress(model, X, **settings), compress(model, X, calibration=DATA, **settings)
    plan = make_plan(model, X, schemes="cp", **settings)
    fidelity = compare(model, fitted.model, X, plan=fitted.plan, data=DATA).fidelity
    save(fitted, folder)
    again = load(model, folder)
    dense = fold_back(again, fitted.plan)
    fine_tune(free.model, DATA, teacher=model, settings=FineTune(epochs=3))
    weights = [value for net in (free.model, fitted.model, again, dense) for value in net.state_dict().values()]
    return free.plan.to_json(), fitted.plan.to_json(), plan.to_json(), fidelity, weights


def modes() -> dict[str, Any]:
    return {
        "inference_mode": torch.inference_mode,
        "no_grad": torch.no_grad,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "default dtype": lambda: default_dtype(torch.float64),
        "default device": lambda: torch.device("meta"),
        "deterministic seed": lambda: seeded(123),
    }


class default_dtype:  # noqa: N801
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: Any) -> None:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return results(network(), tmp_path_factory.mktemp("expected"))


@pytest.mark.parametrize("mode", [*modes(), "training"])
def test_the_modes_of_the_caller_do_not_change_a_result(mode: str, expected: Any, tmp_path: Any) -> None:
    model = network()
    if mode == "training":
        obtained = results(model.train(), tmp_path)
    else:
        with modes()[mode]():
            obtained = results(model, tmp_path)
    assert obtained[:4] == expected[:4]
    assert len(obtained[4]) == len(expected[4])
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(obtained[4], expected[4], strict=True))


def test_networks_and_images_made_under_inference_mode_are_taken(expected: Any, tmp_path: Any) -> None:
    with torch.inference_mode():
        model, data = network(), [DATA[0].clone()]
    settings: dict[str, Any] = {"budget": Budget(macs=0.6), "cache": False}
    fitted = compress(model, X, calibration=data, **settings)
    assert fitted.plan.to_json() == expected[1]
    fine_tune(fitted.model, data, teacher=network(), settings=FineTune(epochs=1))
    with pytest.raises(ValueError, match="inference_mode"):
        fine_tune(model, data, teacher=network(), settings=FineTune(epochs=1))


class Sampling(nn.Module):
    """Draws in evaluation mode, as a VAE does."""

    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.a, self.b, self.c, self.draw = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 24, 3), nn.Conv2d(24, 24, 3), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.draw(self.a(x))).relu())


DRAWS: dict[str, Any] = {
    "randn_like": lambda h: h + torch.randn_like(h),
    "dropout": lambda h: nn.functional.dropout(h, 0.5, training=True),
    "numpy": lambda h: h + float(__import__("numpy").random.rand()),
    "python": lambda h: h * __import__("random").random(),
    "control flow": lambda h: h + torch.randn_like(h) if float(h.detach().sum()) > -1e9 else h,
}


@pytest.mark.parametrize("kind", DRAWS)
def test_both_networks_draw_the_same_numbers(kind: str) -> None:
    model = Sampling(DRAWS[kind]).eval()
    state = torch.get_rng_state()
    fidelity = compare(model, model, X, data=DATA).fidelity
    assert fidelity is not None
    assert fidelity.error == 0
    settings: dict[str, Any] = {"budget": Budget(macs=0.4), "schemes": "cp", "rule": "uniform", "cache": False}
    free, fitted = compress(model, X, **settings), compress(model, X, calibration=DATA, **settings)
    apply_plan(model, free.plan)
    errors = []
    for net in (free.model, fitted.model):
        fidelity = compare(model, net, X, data=DATA).fidelity
        assert fidelity is not None
        errors.append(fidelity.error)
    assert errors[1] < errors[0]
    assert torch.equal(state, torch.get_rng_state())
    history = fine_tune(model, DATA, teacher=model, settings=FineTune(epochs=1, mix=0.0))
    assert history.epochs[0].loss < 1e-9


@pytest.mark.parametrize("kind", ["randn_like", "dropout"])
def test_both_networks_draw_the_same_numbers_in_step(kind: str) -> None:
    """The inputs of b, behind the draw, for a cut network whose layer a is replaced by an equal one: on the first images and later."""
    model = Sampling(DRAWS[kind]).eval()
    images = Images([X, X + 1, X + 2], Inputs(X[:1]))
    pair = network_pair(model, images, ["a", "b"])
    assert isinstance(pair, SideBySide)
    sizes = []
    for (name,) in pair.groups():
        for call in pair.calls([name]):
            assert torch.equal(call.dense_input, call.cut_input)
            sizes.append(len(call.target))
        pair.install(name, copy.deepcopy(model.get_submodule(name)), None)
    assert sizes == [len(X)] * 6


def test_a_module_that_copies_as_itself_is_refused_and_stays_as_it_was() -> None:
    class Selfish(nn.Sequential):
        def __deepcopy__(self, memo: Any) -> Any:
            return self

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Selfish(nn.Conv2d(8, 8, 3))).train()
    for call in (lambda: find_convs(model, X), lambda: compress(model, X), lambda: copy_model(model)):
        with pytest.raises(CopyError, match="1: a copy of the network holds the same module"):
            call()
    assert type(model[1][0]) is nn.Conv2d
    assert not model[1][0]._forward_hooks
    assert all(module.training for module in model.modules())
