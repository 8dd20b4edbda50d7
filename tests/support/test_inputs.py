"""Inputs of any structure: matched with batches, counted, selected, described and rebuilt."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsconv_surgery import Budget, FineTune, Recipe, apply_plan, compare, compress, find_convs, fine_tune, make_plan, pareto
from dsconv_surgery.calibration.images import Images
from dsconv_surgery.recipe import CalibrationSettings
from dsconv_surgery.support.input_description import describe_inputs
from dsconv_surgery.support.inputs import Inputs, InputStructure

IMAGES = torch.rand(12, 3, 10, 10)
Pair = namedtuple("Pair", "a b")


class Net(nn.Module):
    """Two convolutions on the images that `pick` takes from the arguments."""

    def __init__(self, pick: Any) -> None:
        super().__init__()
        self.pick = pick
        self.first, self.second = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.second(self.first(self.pick(*args, **kwargs)).relu())


def of_dict(batch: dict[str, Tensor]) -> Tensor:
    return batch["image"]


def of_flag(x: Tensor, scale: float, flip: bool, mask: Tensor | None) -> Tensor:
    return (x.flip(-1) if flip else x) * scale if mask is None else x * mask


def of_nest(pair: Any) -> Tensor:
    return pair[0]["x"] + pair[1]


def of_list(images: list[Tensor]) -> Tensor:
    return torch.stack([image[:, :8, :8] for image in images])


def of_keyword(*, pixels: Tensor, gain: float = 1.0) -> Tensor:
    return pixels * gain


def of_shared(x: Tensor, table: Tensor) -> Tensor:
    return x + table[:3].view(1, 3, 1, 1)


CASES: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = {  # forward, example args and kwargs, a batch of 12 images
    "dict": (of_dict, ({"image": IMAGES[:1]},), {}, {"image": IMAGES, "label": torch.zeros(12)}),
    "flags and None": (of_flag, (IMAGES[:1], 0.5, True, None), {}, (IMAGES, 0.25, False, None, torch.zeros(12))),
    "nest": (of_nest, ([{"x": IMAGES[:2]}, IMAGES[:2]],), {}, ([{"x": IMAGES}, IMAGES],)),
    "list of images": (of_list, ([IMAGES[0]],), {}, [image[:, : 8 + index % 3] for index, image in enumerate(IMAGES)]),
    "detection collate": (of_list, ([IMAGES[0], IMAGES[1]],), {}, (tuple(IMAGES), tuple(range(12)))),
    "keywords": (of_keyword, (), {"pixels": IMAGES[:1], "gain": 2.0}, {"pixels": IMAGES, "gain": 2.0, "labels": torch.zeros(12)}),
    "shared table": (of_shared, (IMAGES[:2], torch.rand(5)), {}, (IMAGES, torch.rand(5))),
}


@pytest.mark.parametrize("case", CASES)
def test_networks_with_such_inputs_are_cut_calibrated_and_compared(case: str) -> None:
    pick, args, kwargs, batch = CASES[case]
    model = Net(pick).eval()
    settings: dict[str, Any] = {"example_kwargs": kwargs, "budget": Budget(macs=0.5), "schemes": "spatial", "cache": False}
    free = compress(model, *args, **settings)
    fitted = compress(model, *args, calibration=[batch], **settings)
    structure = InputStructure(Inputs(*args, **kwargs))
    inputs = structure.match(batch, "batch")
    assert structure.count(inputs) == 12
    target = model(*inputs.args, **inputs.kwargs).detach()
    with torch.no_grad():
        outputs = [net(*inputs.args, **inputs.kwargs) for net in (free.model, fitted.model)]
    errors = [float((y - target).square().sum() / target.square().sum()) for y in outputs]
    assert errors[1] < errors[0]
    fidelity = compare(model, fitted.model, *args, example_kwargs=kwargs, plan=fitted.plan, data=[batch]).fidelity
    assert fidelity is not None
    assert fidelity.images == 12
    assert fidelity.error == pytest.approx(errors[1], rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_selected_images_are_those_images(case: str) -> None:
    _, args, kwargs, batch = CASES[case]
    structure = InputStructure(Inputs(*args, **kwargs))
    inputs = structure.match(batch, "batch")
    mask = torch.arange(12) % 4 == 3
    for index, count in ((slice(2, 7), 5), (mask, 3)):
        part = structure.select(inputs, index)
        assert structure.count(part) == count
        for whole, selected in zip(
            structure._leaves((inputs.args, inputs.kwargs)), structure._leaves((part.args, part.kwargs)), strict=True
        ):
            if len(whole[1]) != 12:
                assert selected[1] is whole[1]
            elif isinstance(whole[1], Tensor):
                assert torch.equal(selected[1], whole[1][index])
            else:
                numbers = torch.arange(12)[index].tolist()
                assert all(a is whole[1][n] for a, n in zip(selected[1], numbers, strict=True))


@pytest.mark.parametrize(
    ("args", "kwargs", "batch", "words"),
    [
        ((IMAGES[:1],), {}, {"image": IMAGES}, ["'image'", "prepare="]),
        (({"image": IMAGES[:1]},), {}, {"picture": IMAGES}, ["'image'", "prepare="]),
        (({"image": IMAGES[:1]},), {}, IMAGES, ["image", "prepare="]),
        ((IMAGES[:1], 3), {}, IMAGES, ["expected", "prepare="]),
        ((IMAGES[:1], 3), {}, (IMAGES, IMAGES), ["argument 1", "prepare="]),
        ((IMAGES[:1], None), {}, (IMAGES, 3), ["None", "prepare="]),
        ((IMAGES[:1], IMAGES[:1]), {}, (IMAGES, IMAGES[:5]), ["12 and 5", "equally many"]),
        (([IMAGES[:1], IMAGES[:1]],), {}, ([IMAGES],), ["list", "prepare="]),
        ((), {"pixels": IMAGES[:1]}, IMAGES, ["pixels", "prepare="]),
        ((IMAGES[:1],), {}, IMAGES[:, :2], ["(12, 2, 10, 10)", "(1, 3, 10, 10)"]),
        ((IMAGES[:1],), {}, IMAGES[0], ["(3, 10, 10)"]),
        (([IMAGES[0]],), {}, [[IMAGES]], ["list of images"]),
        ((IMAGES[:1],), {}, IMAGES / 0, ["infinite"]),
    ],
)
def test_batches_of_another_structure_are_refused_with_the_remedy(args: Any, kwargs: Any, batch: Any, words: list[str]) -> None:
    with pytest.raises(ValueError, match="calibration: batch 0") as caught:
        Images([batch], Inputs(*args, **kwargs))
    assert all(word in str(caught.value) for word in words), caught.value


def test_prepare_converts_batches_everywhere() -> None:
    model = Net(of_keyword).eval()
    batches = [{"pixel_values": IMAGES, "labels": torch.zeros(12)}]

    def prepare(batch: dict[str, Tensor]) -> Any:
        return Inputs(pixels=batch["pixel_values"]), batch["labels"]

    common: dict[str, Any] = {"example_kwargs": {"pixels": IMAGES[:1]}, "prepare": prepare}
    settings: dict[str, Any] = {**common, "schemes": "spatial", "cache": False}
    plan = make_plan(model, calibration=batches, **settings)
    cut = apply_plan(model, plan, calibration=batches, prepare=prepare)
    assert compare(model, cut, plan=plan, data=batches, **common).fidelity.images == 12
    assert len(pareto(model, fractions=(0.6,), calibration=batches, **settings).points) == 2
    before = next(cut.parameters()).detach().clone()
    fine_tune(cut, batches, teacher=model, prepare=lambda batch: prepare(batch)[:1], settings=FineTune(epochs=3))
    assert not torch.equal(before, next(cut.parameters()))
    recipe = Recipe(schemes="spatial", calibration=CalibrationSettings(images=5), fine_tune=FineTune(epochs=1))
    loss = {"train": batches, "calibration": batches, "cache": False}
    with pytest.raises(ValueError, match="cross-entropy"):
        recipe.run(model, **common, **loss)
    common["prepare"] = lambda batch: prepare(batch)[0]
    assert recipe.run(model, **common, **loss).tuned


def test_wrong_arguments_are_refused() -> None:
    model = Net(of_keyword).eval()
    with pytest.raises(TypeError, match="example_kwargs"):
        find_convs(model, example_kwargs=[IMAGES])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="prepare"):
        compress(model, example_kwargs={"pixels": IMAGES[:1]}, calibration=[IMAGES], prepare="x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="output"):
        compress(model, example_kwargs={"pixels": IMAGES[:1]}, calibration=[{"pixels": IMAGES}], output="x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "inputs",
    [
        Inputs(IMAGES[:2], [torch.zeros(3, dtype=torch.long), None], {"a": (1, 2.5, "text", True)}),
        Inputs(OrderedDict(x=IMAGES.double()), key=[IMAGES[0]]),
        Inputs(torch.ones(2, dtype=torch.bool), flag=False),
    ],
)
def test_descriptions_rebuild_inputs_of_the_same_structure(inputs: Inputs) -> None:
    description = describe_inputs(inputs)
    again = description.rebuild("cpu")
    assert describe_inputs(again) == description
    assert [t.shape for t in again.tensors] == [t.shape for t in inputs.tensors]
    assert all(not t.any() for t in again.tensors if not t.is_floating_point())


def test_a_plan_keeps_the_inputs_for_the_check() -> None:
    model = Net(of_flag).eval()
    plan = make_plan(model, IMAGES[:1], 0.5, True, None, schemes="spatial", cache=False)
    again = type(plan).from_json(plan.to_json())
    assert again == plan
    apply_plan(model, again)  # pytest turns the warning of a check that cannot run into an error


def test_objects_that_a_plan_does_not_keep_leave_a_warning() -> None:
    class Scale:
        value = 2.0

    model = Net(lambda x, scale: x * scale.value).eval()
    plan = make_plan(model, IMAGES[:1], Scale(), schemes="spatial", cache=False)
    with pytest.warns(UserWarning, match="not checked"):
        apply_plan(model, plan)
    apply_plan(model, plan, IMAGES[:1], Scale())


@pytest.mark.parametrize(
    ("args", "batch", "count"),
    [
        ((torch.rand(1, 7, 16),), torch.rand(40, 7, 16), 40),  # one sequence of tokens, not a list of images
        ((torch.rand(2, 7, 16), torch.rand(2, 7, 16)), (torch.rand(40, 7, 16), torch.rand(40, 7, 16)), 40),
        (([torch.rand(2, 7, 16), torch.rand(2, 7, 16)],), ([torch.rand(40, 7, 16), torch.rand(40, 7, 16)],), 40),
        ((torch.zeros(2, 7, dtype=torch.long), torch.rand(1, 2, 7, 7)), (torch.zeros(40, 9, dtype=torch.long), torch.rand(1, 2, 9, 9)), 40),
        ((torch.tensor(3.0), torch.rand(2, 5)), (torch.tensor(4.0), torch.rand(40, 5)), 40),
        ((torch.rand(2), torch.rand(2, 3, 8, 8)), (torch.rand(40), torch.rand(40, 3, 9, 9)), 40),
        ((Pair(torch.rand(2, 4, 4), torch.rand(2, 4, 4)),), (Pair(torch.rand(40, 4, 4), torch.rand(40, 4, 4)),), 40),
    ],
)
def test_the_number_of_images_is_that_of_rows(args: Any, batch: Any, count: int) -> None:
    structure = InputStructure(Inputs(*args))
    inputs = structure.match(batch, "batch")
    assert structure.count(inputs) == count
    part = structure.select(inputs, slice(3, 10))
    assert structure.count(part) == 7
    assert len(part.args) == len(args)
    for whole, selected in zip(inputs.tensors, part.tensors, strict=True):
        assert torch.equal(selected, whole[3:10] if whole.ndim and len(whole) == count else whole)


def test_masks_may_hold_minus_infinity_and_rows_must_agree() -> None:
    structure = InputStructure(Inputs(torch.rand(2, 7, 16), torch.zeros(2, 7)))
    structure.match((torch.rand(4, 7, 16), torch.full((4, 7), -torch.inf)), "batch")
    for batch in ((torch.rand(4, 7, 16), torch.full((4, 7), torch.nan)), (torch.rand(4, 7, 16) / 0, torch.zeros(4, 7))):
        with pytest.raises(ValueError, match="NaN or infinite"):
            structure.match(batch, "batch")
    with pytest.raises(ValueError, match="4 and 2 images"):
        structure.match((torch.rand(4, 7, 16), torch.zeros(2, 7)), "batch")


@pytest.mark.parametrize("args", [(3,), (torch.tensor(1.0),), (None, "text")])
def test_inputs_without_a_row_for_each_image_are_refused(args: Any) -> None:
    structure = InputStructure(Inputs(*args))
    with pytest.raises(ValueError, match="one row per image"):
        structure.match(args, "batch")


def test_prepare_may_return_several_arguments() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 16, 3), nn.Linear(16, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.fc(self.conv(x + y).mean((2, 3)))

    model = Sum()
    batches = [(IMAGES, IMAGES, torch.arange(12) % 4)]

    def prepare(batch: Any) -> Any:
        return Inputs(*batch[:2]), batch[2]

    common: dict[str, Any] = {"prepare": prepare, "settings": FineTune(epochs=2)}
    for keywords in ({"inputs": 2}, {"inputs": 2, "teacher": model}, {}):
        assert fine_tune(model, batches, **common, **keywords).epochs[-1].labels
    recipe = Recipe(schemes="spatial", calibration=CalibrationSettings(images=6), fine_tune=FineTune(epochs=1))
    small = recipe.run(model, IMAGES[:1], IMAGES[:1], calibration=batches, train=batches, prepare=prepare, cache=False)
    assert small.tuned[0].epochs[0].labels


def test_a_plan_with_objects_can_be_calibrated() -> None:
    class Scale:
        value = 2.0

    model = Net(lambda x, scale: x * scale.value).eval()
    batches, inputs = [(IMAGES, Scale())], (IMAGES[:1], Scale())
    plan = make_plan(model, *inputs, calibration=batches, schemes="spatial", cache=False)
    apply_plan(model, plan, *inputs, calibration=batches)
