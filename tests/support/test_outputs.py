"""Outputs of any type: their tensors, and networks that have such outputs."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsconv_surgery import Budget, FineTune, Recipe, compare, compress, fine_tune, pareto
from dsconv_surgery.recipe import CalibrationSettings
from dsconv_surgery.support.outputs import OutputSelector, output_tensors

X, DATA = torch.rand(1, 3, 10, 10), torch.rand(16, 3, 10, 10)
Pair = namedtuple("Pair", "a b")


@dataclass
class Result:
    logits: Tensor
    hidden: list[Tensor] = field(default_factory=list)


class Slotted:
    __slots__ = ("name", "value")

    def __init__(self, value: Tensor) -> None:
        self.value, self.name = value, "x"


class ModelOutput(OrderedDict):
    """As that of transformers: keys are attributes, too."""


OUTPUTS: dict[str, Any] = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, None, 3),
    "dict": lambda y: {"a": y, "loss": None},
    "nest": lambda y: [{"a": (y,)}, {"b": [y * 2]}],
    "dataclass": lambda y: Result(y, [y * 2]),
    "namedtuple": lambda y: Pair(y, 1),
    "ModelOutput": lambda y: ModelOutput(logits=y),
    "UserDict": lambda y: UserDict(logits=y),
    "namespace": lambda y: SimpleNamespace(y=y, text="a"),
    "slots": lambda y: Slotted(y),
    "distribution": lambda y: torch.distributions.Normal(y, torch.ones_like(y), validate_args=False),
    "complex": lambda y: torch.complex(y, y),
}


class Net(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.first, self.second, self.wrap = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 24, 3), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.second(self.first(x).relu()))


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_error_is_that_of_all_tensors(kind: str) -> None:
    model = Net(OUTPUTS[kind]).eval()
    small = compress(model, X, budget=Budget(macs=0.2), schemes="spatial", cache=False)
    fidelity = compare(model, small.model, X, plan=small.plan, data=[DATA]).fidelity
    assert fidelity is not None
    plain = [Net(OUTPUTS["tensor"]).eval() for _ in range(2)]
    for network, source in zip(plain, (model, small.model), strict=True):
        network.first, network.second = source.first, source.second
    target, output = (network(DATA).detach() for network in plain)
    truth = float((target - output).square().sum() / target.square().sum())
    if kind != "distribution":  # its deviations are the same in both
        assert fidelity.error == pytest.approx(truth, rel=1e-3)
    assert fidelity.error > 1e-3
    fitted = compress(model, X, budget=Budget(macs=0.2), schemes="spatial", calibration=[DATA], cache=False)
    fitted_fidelity = compare(model, fitted.model, X, plan=fitted.plan, data=[DATA]).fidelity
    assert fitted_fidelity is not None
    assert fitted_fidelity.error < fidelity.error
    before = fitted.model.first[0].weight.detach().clone()
    history = fine_tune(fitted.model, [DATA], teacher=model, settings=FineTune(epochs=3))
    assert history.epochs[0].loss > 0
    assert not torch.equal(before, fitted.model.first[0].weight)


def test_tensors_keep_their_order_and_cycles_end() -> None:
    a, b = torch.ones(2), torch.zeros(3)
    value = SimpleNamespace(first=[a, {"x": (b, 1, "text")}], flag=True, whole=torch.arange(3))
    value.itself = value
    assert output_tensors(value) == [a, b]
    assert [tuple(t.shape) for t in output_tensors([torch.ones(2, dtype=torch.complex64), torch.eye(2).to_sparse()])] == [(2, 2), (2, 2)]


@pytest.mark.parametrize("output", [None, 3, "text", [], {}, torch.arange(3), SimpleNamespace(a=1), nn.Linear(2, 2)])
def test_an_output_without_tensors_is_an_error(output: Any) -> None:
    model = Net(lambda y: output).eval()
    with pytest.raises(ValueError, match="output="):
        compare(model, model, X, data=[DATA])
    with pytest.raises(ValueError, match="output="):
        compress(model, X, calibration=[DATA], schemes="spatial", cache=False)


def boxes(y: Tensor) -> list[dict[str, Tensor]]:
    return [{"scores": row[row > 0.1]} for row in y.flatten(1)]


def test_outputs_of_varying_shapes_need_a_function() -> None:
    class Detector(Net):
        def forward(self, x: Tensor) -> Any:
            y = self.second(self.first(x).relu())
            return boxes(y) if self.wrap else (y, boxes(y))

    for boxes_only in (True, False):
        model = Detector(boxes_only).eval()
        settings: dict[str, Any] = {"schemes": "spatial", "budget": Budget(macs=0.3), "cache": False}
        with pytest.raises(ValueError, match="output="):
            compress(model, X, calibration=[DATA], **settings)
    small = compress(model, X, calibration=[DATA], output=lambda result: result[0], **settings)
    fidelity = compare(model, small.model, X, plan=small.plan, data=[DATA], output=lambda result: result[0]).fidelity
    assert fidelity is not None
    assert 0 < fidelity.error < 1
    with pytest.raises(ValueError, match="output="):
        fine_tune(small.model, [DATA], teacher=model, settings=FineTune(epochs=1))
    fine_tune(small.model, [DATA], teacher=model, output=lambda result: result[0], settings=FineTune(epochs=1))


def test_pairs_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\).*output="):
        OutputSelector().pairs(torch.ones(2), torch.ones(3))


def test_tensors_of_short_lived_containers_and_of_sets() -> None:
    class Rows(Sequence):  # type: ignore[type-arg]
        def __getitem__(self, index: int) -> list[Tensor]:  # type: ignore[override]
            if index >= len(self):
                raise IndexError
            return [torch.ones(2)]

        def __len__(self) -> int:
            return 6

    assert len(output_tensors([Rows(), Rows(), range(10**9)])) == 12
    assert len(output_tensors({torch.ones(1)})) == 1
    with pytest.raises(ValueError, match="no order"):
        output_tensors({torch.ones(1), torch.ones(2)})


def test_classifiers_may_have_several_rows_for_each_image() -> None:
    class Video(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 16, 3), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x.flatten(0, 1)).mean((2, 3)))

    model, clips = Video().eval(), torch.rand(5, 6, 3, 8, 8)
    small = compress(model, clips[:1], budget=Budget(macs=0.4), schemes="spatial", cache=False)
    fidelity = compare(model, small.model, clips[:1], plan=small.plan, data=[clips]).fidelity
    assert fidelity is not None
    p, q = (network(clips).detach().log_softmax(1) for network in (model, small.model))
    assert fidelity.agreement == pytest.approx(float((p.argmax(1) == q.argmax(1)).double().mean()))
    assert fidelity.divergence == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            lambda result: result.nothing,
            r"output= failed on the network's output \(.*\): AttributeError: .*nothing'\. Correct the function\.$",
        ),
        (
            lambda result: [1, "a"],
            r"output= returned list of 2 \(1, str\) for the network's output \(.*\), expected floating-point tensors\.$",
        ),
        (lambda result: {result, result + 1}, r"a set of 2 tensors.* as a list"),
    ],
)
def test_a_function_for_the_output_that_fails_is_named(output: Any, message: str) -> None:
    """By every function that takes it, with the argument that holds the batches; nobody is told to pass what was passed."""
    model = Net(lambda y: y).eval()
    calls = {
        "calibration: ": lambda: compress(model, X, calibration=[DATA], output=output, schemes="spatial", cache=False),
        "data: ": lambda: compare(model, model, X, data=[DATA], output=output),
        "fine_tune: ": lambda: fine_tune(Net(lambda y: y), [DATA], teacher=model, output=output),
    }
    for place, call in calls.items():
        with pytest.raises(ValueError, match=message.rstrip("$") if place == "fine_tune: " else message) as caught:
            call()
        assert str(caught.value).startswith(place)
        assert "Pass output=" not in str(caught.value)


def test_a_function_for_the_batches_that_fails_is_named() -> None:
    model, error = Net(lambda y: y).eval(), r"prepare= failed on \(16, 3, 10, 10\) torch\.float32: IndexError: .*\. Correct the function\.$"
    settings: dict[str, Any] = {"prepare": lambda batch: batch["image"]}
    recipe = Recipe(calibration=CalibrationSettings(images=4))
    for place, call in {
        "calibration: batch 0": lambda: compress(model, X, calibration=[DATA], **settings),
        "calibration: batch 0 ": lambda: recipe.run(model, X, calibration=[DATA], **settings),
        "data: batch 0": lambda: compare(model, model, X, data=[DATA], **settings),
        "data: batch 0 ": lambda: pareto(model, X, data=[DATA], **settings),
        "fine_tune: a batch of step 1": lambda: fine_tune(Net(lambda y: y), [DATA], teacher=model, **settings),
    }.items():
        with pytest.raises(ValueError, match=f"^{place.strip()}: {error}"):
            call()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DATA, "found a tensor"),
        (3, "found int"),
        (iter([DATA]), "found an iterator"),
        ([], "no images"),
        ([DATA[:, :1]], "batch 0 has shape"),
    ],
)
def test_faults_of_images_to_compare_on_name_their_argument(data: Any, message: str) -> None:
    model = Net(lambda y: y).eval()
    for call in (lambda: compare(model, model, X, data=data), lambda: pareto(model, X, data=data)):
        with pytest.raises((ValueError, TypeError), match=f"^data: {message}"):
            call()
