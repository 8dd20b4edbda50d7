"""Calibration: moments against plain convolutions, fits against closed forms, both network pairs, and apply_plan and compress."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cifar import accuracy, demo_images, demo_resnet20
from torch import Tensor, nn

from dsconv_surgery import Budget, Calibration, Plan, apply_plan, compare, compress, fold_back, load, make_plan, save, surgery
from dsconv_surgery.calibration.hooks import HookedPair
from dsconv_surgery.calibration.images import Images
from dsconv_surgery.calibration.moments import Moments, extract_patches, positions_of
from dsconv_surgery.calibration.reconstruct import _LayerFit
from dsconv_surgery.calibration.side_by_side import SideBySide, network_pair
from dsconv_surgery.network.geometry import ConvSpec
from dsconv_surgery.schemes import Objective, factorize, fit, fitting, get_scheme, kernel_of, kernel_tensor, refusal, scheme_names
from dsconv_surgery.schemes.fitting import PENALTY, penalized_error
from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.progress import Progress

LAYERS = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
    nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(0, 2), dilation=(2, 1)),
    nn.Conv2d(4, 8, 3, padding="same", padding_mode="reflect", bias=False),
    nn.Conv2d(4, 8, 4, padding="same", dilation=2),
    nn.Conv2d(4, 8, 3, padding=2, padding_mode="circular", groups=2),
    nn.Conv2d(6, 6, 3, padding=1, groups=3, padding_mode="replicate"),
    nn.Conv2d(4, 6, 1, stride=2),
]


def moments_of(layer: nn.Module, x: Tensor, target: Tensor | None, patches: int = 2**20, hold: bool = False) -> Moments:
    spec = ConvSpec.of(layer)
    size = (x.shape[0], *x.shape[-2:]) if spec.kind == "conv" else (x[..., 0].numel(), 1, 1)
    moments = Moments(spec, kernel_tensor(spec, layer.get_parameter("weight")), positions_of(spec, [size]), patches, 0, hold)
    for first in range(0, len(x), 3):
        moments.add(x[first : first + 3], None if target is None else target[first : first + 3], first)
    return moments


SAME_PADDING = [
    nn.Conv2d(4, 6, 4, padding="same"),  # one row and one column more at the bottom and at the right
    nn.Conv2d(4, 6, 4, padding="same", dilation=2),
    nn.Conv2d(4, 6, (4, 3), padding="same"),
    nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="replicate"),
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("drawn", [False, True], ids=["all positions", "some positions"])
@pytest.mark.parametrize("layer", [*LAYERS, *SAME_PADDING], ids=lambda layer: str(ConvSpec.of(layer)))
def test_patches_times_kernel_are_the_outputs(layer: nn.Conv2d, drawn: bool) -> None:
    """At each output position the patch, multiplied with the kernel of its group, gives the layer's output without its bias."""
    spec, x = ConvSpec.of(layer), torch.randn(2, layer.in_channels, 7, 8)
    kernel = kernel_tensor(spec, layer.weight).flatten(2).float()
    with torch.no_grad():
        output = layer(x) - (0.0 if layer.bias is None else layer.bias[:, None, None])
    positions = torch.randperm(output[0, 0].numel())[:5] if drawn else None
    product = (extract_patches(spec, x, positions) @ kernel.mT).mT.flatten(1, 2)
    expected = output.flatten(2) if positions is None else output.flatten(2)[..., positions]
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("images", [2, 12], ids=["patches", "second moment"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: str(ConvSpec.of(layer)))
def test_the_objective_is_the_error_of_convolutions(layer: nn.Conv2d, images: int) -> None:
    """For any kernel V, E |t - V p|^2 of the moments is the squared difference of two convolutions' outputs, centred or not."""
    x = torch.randn(images, layer.in_channels, 7 if images > 2 else 5, 8) + 0.5
    other = copy.deepcopy(layer)
    with torch.no_grad():
        target = torch.sin(3 * layer(x))
        other.weight.add_(0.1 * torch.randn_like(other.weight))
        other.bias = None
        error = (target - other(x)).double()
    moments = moments_of(layer, x, target)
    kernel = kernel_tensor(ConvSpec.of(layer), other.weight)
    patches = target.numel() / target.shape[1]
    plain = moments.objective("all", centred=False)
    assert plain.value(kernel) * plain.energy == pytest.approx(float(error.square().sum()) / patches, rel=1e-4)
    centred = moments.objective("all", centred=True)
    about_mean = error - error.mean((0, 2, 3), keepdim=True)
    assert centred.value(kernel) * centred.energy == pytest.approx(float(about_mean.square().sum()) / patches, rel=1e-4)


def test_a_linear_layer_is_its_rows() -> None:
    layer = nn.Linear(5, 3)
    x = torch.randn(9, 4, 5)
    other = torch.randn(3, 5)
    with torch.no_grad():
        objective = moments_of(layer, x, layer(x)).objective("all", centred=False)
        error = (layer(x) - x @ other.T).double().square().sum() / 36
    assert objective.value(other.double()[None]) * objective.energy == pytest.approx(float(error), rel=1e-5)


def test_drawn_patches_give_nearly_the_same_error() -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1, bias=False)
    x = F.avg_pool2d(torch.randn(60, 4, 34, 34), 3, 1)
    kernel = kernel_tensor(ConvSpec.of(layer), layer.weight) + 0.05 * torch.randn(1, 6, 4, 3, 3)
    all_, some = (moments_of(layer, x, None, patches) for patches in (2**20, 6000))
    assert all_.count() == 60 * 32 * 32
    assert some.count() == pytest.approx(6000, rel=0.02)
    errors = [moments.objective("all", exact=True).value(kernel) for moments in (all_, some)]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)
    assert errors[1] != errors[0]


def test_folds_are_the_moments_of_their_images() -> None:
    layer = nn.Conv2d(2, 3, 3)
    x = torch.randn(20, 2, 6, 6)
    held = torch.arange(20) % 4 == 3
    moments = moments_of(layer, x, None, hold=True)
    for fold, mask in (("held", held), ("fit", ~held)):
        alone = moments_of(layer, x[mask], None).objective("all", exact=True)
        torch.testing.assert_close(moments.objective(fold, exact=True).gram, alone.gram, rtol=1e-5, atol=1e-6)


def test_stored_patches_equal_their_second_moment() -> None:
    layer = nn.Conv2d(6, 5, 3, padding=1)
    x, kernel = torch.randn(2, 6, 4, 4), torch.randn(1, 5, 6, 3, 3).double()
    rows = moments_of(layer, x, torch.randn(2, 5, 4, 4)).objective().ridged(0.3).ridged(0.2)
    assert rows.rows
    whole = Objective(rows.weight, rows.cross, rows.gram.mT @ rows.gram + 0.5 * torch.eye(54), rows.spread, rows.ridge)
    assert rows.value(kernel) == pytest.approx(whole.value(kernel), rel=1e-9)
    torch.testing.assert_close(rows.target(), whole.target(), rtol=1e-6, atol=1e-6)
    assert rows.scale == pytest.approx(whole.scale)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Conv2d, Objective]:
    """A trained layer, and its objective on images."""
    model, (images, _) = demo_resnet20(), demo_images("train")
    inputs: list[Tensor] = []
    layer = model.layer2[1].conv1
    layer.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    with torch.no_grad():
        model(images[:128])
    return layer, moments_of(copy.deepcopy(layer), inputs[0], None).objective("all", exact=True)


@pytest.mark.parametrize("name", ["channel", "bottleneck"])
def test_closed_forms_reach_the_optimum(name: str, trained: tuple[nn.Conv2d, Objective]) -> None:
    """The error is the tail of the singular values of W S^1/2, to 1e-8; no perturbation of the factors does better."""
    scheme = get_scheme(name)
    if name == "channel":
        layer, objective = trained
    else:
        layer = nn.Conv2d(24, 16, 1, bias=False)
        objective = moments_of(layer, torch.randn(30, 24, 6, 6) * torch.rand(24, 1, 1), None).objective("all", exact=True)
    spec = ConvSpec.of(layer)
    values, vectors = torch.linalg.eigh(objective.gram[0])
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    singular = torch.linalg.svdvals(objective.weight[0] @ root).square()
    for rank in (1, 5, 12):
        factors = fit(scheme, spec, layer.weight, rank, objective)
        error = objective.value(kernel_of(scheme, spec, factors)[None])
        assert error == pytest.approx(float(singular[rank:].sum() / singular.sum()), rel=1e-8, abs=1e-10)
        for _ in range(20):
            moved = {link: factor + 1e-3 * factor.std() * torch.randn_like(factor) for link, factor in factors.items()}
            assert objective.value(kernel_of(scheme, spec, moved)[None]) > error


@pytest.mark.parametrize("name", scheme_names())
def test_a_fit_lowers_the_error_of_outputs(name: str, trained: tuple[nn.Conv2d, Objective]) -> None:
    """It is below that of the data-free factors and below that of a refitted last link; no change of the last link lowers it."""
    layer, objective = trained
    scheme, spec = get_scheme(name), ConvSpec.of(layer)
    if refusal(scheme, spec):
        layer = nn.Conv2d(32, 16, 1)
        spec = ConvSpec.of(layer)
        objective = moments_of(layer, torch.randn(50, 32, 6, 6).cumsum(1), None).objective("all", exact=True)
    rank: Any = {"tucker": (16, 16), "depthwise": 2, "pointwise_depthwise": 2, "spatial": 20}.get(name, 12)
    block = spec if not spec.bias else ConvSpec.of(nn.Conv2d(32, 16, 1, bias=False))
    free = next(factorize(scheme, spec, layer.weight, [rank]))
    refitted = fit(scheme, spec, layer.weight, rank, objective, start=free, iterations=0)
    fitted = fit(scheme, spec, layer.weight, rank, objective, start=free)
    errors = [penalized_error(scheme, block, factors, objective) for factors in (free, refitted, fitted)]
    assert errors[2] < 0.97 * errors[1] < 0.95 * errors[0]
    last = list(fitted)[-1]
    again = fit(scheme, spec, layer.weight, rank, objective, start=fitted, iterations=0)
    assert penalized_error(scheme, block, again, objective) == pytest.approx(errors[2], rel=1e-3)
    for _ in range(10):
        moved = {**again, last: again[last] + 1e-3 * again[last].std() * torch.randn_like(again[last])}
        assert penalized_error(scheme, block, moved, objective) > penalized_error(scheme, block, again, objective)


def test_a_search_never_ends_above_its_start(trained: tuple[nn.Conv2d, Objective]) -> None:
    layer, objective = trained
    spec, scheme = ConvSpec.of(layer), get_scheme("cp")
    start = fit(scheme, spec, layer.weight, 20, objective)
    again = fit(scheme, spec, layer.weight, 20, objective, start=start, metric=torch.diag(torch.rand(32).double() + 0.01)[None])
    assert penalized_error(scheme, spec, again, objective) <= penalized_error(scheme, spec, start, objective)


def test_terms_of_cp_do_not_cancel(trained: tuple[nn.Conv2d, Objective], monkeypatch: pytest.MonkeyPatch) -> None:
    """The penalty keeps the sum of the terms' squared norms small, at little cost in error."""
    from dsconv_surgery.schemes import degeneracy

    layer, objective = trained
    spec, scheme = ConvSpec.of(layer), get_scheme("cp")
    results = {}
    for penalty in (0.0, PENALTY):
        monkeypatch.setattr(fitting, "PENALTY", penalty)
        factors = fit(scheme, spec, layer.weight, 33, objective, iterations=300)
        results[penalty] = degeneracy(scheme, spec, factors) or 0.0, objective.value(kernel_of(scheme, spec, factors)[None])
    (degeneracy_without, error_without), (degeneracy_with, error_with) = results.values()
    assert degeneracy_with < 30
    assert degeneracy_with < 0.5 * degeneracy_without
    assert error_with < 1.15 * error_without


def test_fits_work_with_a_singular_second_moment() -> None:
    """There are fewer patches than a patch has values, and channels that are always zero."""
    layer = nn.Conv2d(16, 12, 3, padding=1, bias=False)
    x = torch.randn(2, 16, 4, 4)
    x[:, 3:9] = 0
    moments = moments_of(layer, x, None)
    assert moments.as_rows
    objective = moments.objective("all", exact=True)
    for name in scheme_names():
        scheme, spec = get_scheme(name), ConvSpec.of(layer)
        if not refusal(scheme, spec):
            rank: Any = (8, 8) if name == "tucker" else 2 if "depthwise" in name else 6
            pulled = objective.ridged(0.1 * objective.scale)
            free = next(factorize(scheme, spec, layer.weight, [rank]))
            fitted = fit(scheme, spec, layer.weight, rank, pulled, start=free)
            assert all(bool(torch.isfinite(factor).all()) for factor in fitted.values())
            assert penalized_error(scheme, spec, fitted, pulled) < penalized_error(scheme, spec, free, pulled)


class Branches(nn.Module):
    """A shortcut, a concatenation, a layer called twice, a layer without BatchNorm, a classifier, and ReLUs in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.beside = nn.Conv2d(8, 8, 1)
        self.closing = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(16, 12, 3, stride=2, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.first(x)))
        y = self.twice(F.relu(self.twice(x)))
        z = self.norm2(self.closing(F.relu(y)))
        z += self.beside(y)
        z = self.relu(z)
        return self.fc(self.wide(torch.cat([y, z], 1)).relu().mean((2, 3)))


class Untraceable(Branches):
    """The same with a branch that depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            return x
        return super().forward(x)


def network(kind: Callable[[], nn.Module] = Branches) -> nn.Module:
    torch.manual_seed(1)
    model = kind()
    model(torch.randn(64, 3, 10, 10))  # BatchNorm statistics
    return model.eval()


def images(count: int = 48) -> list[Tensor]:
    return list((torch.randn(count, 3, 10, 10).cumsum(2) * 0.5).split(20))


@pytest.mark.parametrize(("kind", "pair_type"), [(Branches, SideBySide), (Untraceable, HookedPair)])
def test_both_pairs_observe_the_inputs_of_every_call(kind: type[nn.Module], pair_type: type) -> None:
    """Inputs in both networks, with one layer replaced, are those of plain forward passes."""
    model, batches = network(kind), images(7)
    names = ["first", "twice", "closing", "wide", "fc"]
    pair = network_pair(model, Images(batches, Inputs(torch.empty(1, 3, 10, 10))), names)
    assert type(pair) is pair_type
    cut = copy.deepcopy(model)
    visited: list[str] = []
    for group in pair.groups():
        visited += group
        expected: dict[tuple[str, str], list[Tensor]] = {}

        def record(key: tuple[str, str], into: dict[Any, list[Tensor]] = expected) -> Any:
            return lambda _module, args, _output: into.setdefault(key, []).append(args[0].clone())

        sides = {"dense_input": model, "cut_input": cut}
        hooks = [side.get_submodule(n).register_forward_hook(record((field, n))) for field, side in sides.items() for n in group]
        with torch.no_grad():
            for batch in batches:
                model(batch.clone()), cut(batch.clone())
        for hook in hooks:
            hook.remove()
        calls = list(pair.calls(group))
        for name in group:
            for field in sides:
                inputs = torch.cat([getattr(call, field) for call in calls if call.name == name])
                torch.testing.assert_close(inputs, torch.cat(expected[field, name]))
        if "first" in group:
            other = nn.Conv2d(3, 8, 3, padding=1, bias=False)
            pair.install("first", other, None)
            with torch.no_grad():
                cut.first.weight.copy_(other.weight)
    assert visited == names
    pair.close()


def test_the_graph_shows_what_follows_a_layer() -> None:
    model = network()
    pair = network_pair(model, Images(images(), Inputs(torch.empty(1, 3, 10, 10))), ["first", "twice", "beside", "closing", "wide", "fc"])
    following = {name: (after.batchnorm, after.addend is not None, after.relu) for name, after in pair.following.items()}
    assert following == {
        "first": ("norm", False, True),
        "twice": (None, False, False),  # called twice
        "beside": (None, True, True),
        "closing": ("norm2", True, True),
        "wide": (None, False, True),
        "fc": (None, False, False),
    }
    pair.close()


class ByKeyword(Branches):
    """Calls a layer by keyword, changes its input in place, and cannot be traced unless `traceable`."""

    traceable = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(input=x.mul_(0.5))
        return self.wide(torch.cat([x, x], 1)) if self.traceable or float(x.detach().sum()) < 1e9 else x


@pytest.mark.parametrize("traceable", [True, False])
def test_layers_called_by_keyword_and_inputs_changed_in_place(traceable: bool) -> None:
    """The calibrated cut network is built, and the images are the same afterwards."""
    model, batches = network(ByKeyword), images(20)
    model.traceable = traceable
    before = [batch.clone() for batch in batches]
    plan = make_plan(model, X.clone(), rule="fixed", rank=4, schemes="cp", include=["first", "wide"])
    assert len(plan.cuts) == 2
    apply_plan(model, plan, calibration=batches)
    assert all(torch.equal(a, b) for a, b in zip(batches, before, strict=True))


@pytest.mark.parametrize("kind", [Branches, Untraceable])
def test_calibrated_cuts_have_lower_output_errors(kind: type[nn.Module]) -> None:
    """On other images of the same kind. The argument is bit-identical afterwards, and in the same mode."""
    model = network(kind).train()
    before, fresh = copy.deepcopy(model.state_dict()), images()
    settings: dict[str, Any] = {"rule": "fixed", "rank": 6, "schemes": "cp"}
    data_free = compress(model, fresh[0][:1], **settings)
    calibrated = compress(model, fresh[0][:1], **settings, calibration=images(200))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert calibrated.model.training
    assert calibrated.plan.calibrated
    assert not data_free.plan.calibrated
    errors = [compare(model, small.model, fresh[0], plan=small.plan, data=fresh).fidelity.error for small in (data_free, calibrated)]
    assert errors[1] < 0.6 * errors[0]


class TwoPaths(nn.Module):
    """The sum of a 1x1 and a 3x3 layer on the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(3, 8, 1)
        self.wide = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(x) + self.wide(x)


def test_the_error_of_a_shortcut_is_compensated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 3x3 layer, cut to nearly full rank, compensates the error of the 1x1 layer, cut to rank 1."""
    model, batches, fresh = TwoPaths().eval(), images(120), images()
    plan = make_plan(model, X, rule="fixed", rank=1, schemes=["bottleneck"], include=["narrow"])
    (wide,) = make_plan(model, X, rule="fixed", rank=2, schemes=["channel"], include=["wide"]).cuts
    plan = dataclasses.replace(plan, cuts=(dataclasses.replace(wide, rank=7), *plan.cuts))
    assert [cut.name for cut in plan.cuts] == ["wide", "narrow"]

    def output_error() -> float:
        cut = apply_plan(model, plan, calibration=batches)
        return compare(model, cut, X, plan=plan, data=fresh).fidelity.error

    compensated = output_error()
    monkeypatch.setattr(_LayerFit, "_target", lambda _, call: call.target)
    assert compensated < 0.2 * output_error()


def test_a_full_rank_cut_stays_exact() -> None:
    model, batches = network(), images()
    plan = make_plan(model, batches[0][:1], rule="fixed", rank=2, schemes=["bottleneck", "channel"])
    cuts = [dataclasses.replace(c, rank=get_scheme(c.scheme).full_rank(dataclasses.replace(c.spec, bias=False))) for c in plan.cuts]
    plan = dataclasses.replace(plan, cuts=tuple(cuts))
    assert len(plan.cuts) >= 4
    cut = apply_plan(model, plan, calibration=batches)
    torch.testing.assert_close(cut(batches[0]), model(batches[0]), rtol=1e-4, atol=1e-4)


def test_activations_above_the_memory_limit_go_to_temporary_files(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cut network is the same, and no file is left."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    written: list[str] = []
    save_file = torch.save
    monkeypatch.setattr(torch, "save", lambda values, path: (written.append(str(path)), save_file(values, path)))
    model, batches = network(), images()
    plan = make_plan(model, batches[0][:1], rule="fixed", rank=6, schemes="cp")
    cuts = [apply_plan(model, plan, calibration=Calibration(batches, memory=memory)) for memory in (2**31, 1)]
    assert written
    assert not list(tmp_path.iterdir())
    for a, b in zip(cuts[0].state_dict().values(), cuts[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_batchnorm_after_a_layer_takes_up_the_mean_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """On calibration images the mean output of each channel behind the BatchNorm is that of the dense network."""
    model, batches = network(), images(60)
    plan = make_plan(model, batches[0][:1], rule="fixed", rank=3, schemes="cp", include=["first"])
    monkeypatch.setattr(_LayerFit, "_fit_behind_relu", lambda _fit, _pair, _ridge, factors: factors)
    cut, _ = surgery.cut_calibrated(model, plan, Images(batches, plan.inputs.rebuild("meta")), {}, Progress(False), None)
    assert not torch.equal(cut.norm.running_mean, model.norm.running_mean)
    x = torch.cat(batches)
    with torch.no_grad():
        dense = model.norm(model.first(x))
        shifted, unshifted = ((norm(cut.first(x)) - dense).mean((0, 2, 3)).abs().max() for norm in (cut.norm, model.norm))
    assert shifted < 1e-4
    assert unshifted > 1e-2
    folded = fold_back(cut, plan)
    torch.testing.assert_close(folded(x), cut(x), rtol=1e-4, atol=1e-4)


def test_the_trained_network_keeps_its_accuracy() -> None:
    """The ResNet-20 of the examples at 27 % of its parameters, calibrated on 128 images, loses less accuracy than a data-free cut."""
    model, (train, _), (test, labels) = demo_resnet20(), demo_images("train"), demo_images("test")
    settings: dict[str, Any] = {"budget": Budget(params=0.27), "schemes": "cp", "rule": "uniform", "exclude": ("conv1", "linear")}
    data_free = compress(model, train[:1], **settings)
    calibrated = compress(model, train[:1], **settings, calibration=train[:128].split(64))
    scores = [accuracy(m, test, labels) for m in (model, data_free.model, calibrated.model)]
    assert calibrated.report.after == data_free.report.after
    assert scores[2] > scores[1] + 8
    assert scores[2] > scores[0] - 5
    report = compare(model, calibrated.model, test[:1], plan=calibrated.plan, data=[test[:500]])
    assert report.fidelity is not None
    assert report.fidelity.agreement > 0.85
    assert all(row.output_error is not None and row.degeneracy < 100 for row in report.rows if row.scheme)
    assert "same top class" in str(report)


def test_options_are_judged_by_their_output_errors() -> None:
    """A layer whose input lies in three dimensions is cut to rank 3 with calibration, and not at all without."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.Flatten())
    basis = torch.randn(16, 3)
    batches = [torch.einsum("cr,brhw->bchw", basis, torch.randn(16, 3, 4, 4)) for _ in range(3)]
    plan = make_plan(model, batches[0][:1], rule="energy", energy=0.999, calibration=batches)
    (cut,) = plan.cuts
    assert cut.rank == 3
    assert cut.error < 1e-3
    assert make_plan(model, batches[0][:1], rule="energy", energy=0.999).cuts == ()
    assert Plan.from_json(plan.to_json()) == plan


def test_a_calibrated_network_is_saved_and_loaded(tmp_path: Any) -> None:
    model, batches = network(), images()
    small = compress(model, batches[0][:1], rule="fixed", rank=4, schemes="cp", calibration=batches)
    save(small, tmp_path)
    again = load(network(), tmp_path)
    assert torch.equal(again(batches[0]), small.model(batches[0]))


def test_the_same_images_give_the_same_network() -> None:
    model, batches = network(), images()
    plan = make_plan(model, batches[0][:1], rule="fixed", rank=4, schemes=["cp", "depthwise"], calibration=batches)
    first, second = (apply_plan(model, plan, calibration=Calibration(batches, seed=5)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


class Growing:
    """Yields one batch more in every pass."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        return iter([torch.ones(4, 3, 10, 10)] * self.passes)


X = torch.zeros(1, 3, 10, 10)
BAD = {
    "no batches": ([], "no images"),
    "an empty batch": ([torch.zeros(0, 3, 10, 10)], "no images"),
    "a tensor": (torch.randn(8, 3, 10, 10), r"images.split\(64\)"),
    "an iterator": (iter([torch.randn(4, 3, 10, 10)]), "only once"),
    "no iterable": (3, "expected an iterable"),
    "a dictionary": ([{"image": torch.randn(4, 3, 10, 10)}], "batch 0: found .*image.*expected a tensor"),
    "NaN": ([torch.randn(4, 3, 10, 10), torch.full((4, 3, 10, 10), float("nan"))], "batch 1: 1200 of 1200 numbers are NaN"),
    "channels": ([torch.randn(4, 1, 10, 10)], r"shape \(4, 1, 10, 10\), expected one like the example input's, \(1, 3, 10, 10\)"),
    "no batch dimension": ([torch.randn(3, 10, 10)], r"shape \(3, 10, 10\)"),
    "shuffled": (
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(40, 3, 10, 10)), batch_size=8, shuffle=True),
        "batch 0 differs from batch 0 of the first pass.*without shuffle=True",
    ),
    "more in a later pass": (Growing(), r"batch \d+ differs from batch \d+ of the first pass"),
    "too small": ([torch.randn(4, 3, 1, 1).expand(-1, -1, 0, 0)], "does not run"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("verb", ["make_plan", "apply_plan", "compress", "compare"])
def test_bad_calibration_is_an_error(case: str, verb: str) -> None:
    calibration, message = BAD[case]
    model = network()
    before = copy.deepcopy(model.state_dict())
    settings: dict[str, Any] = {"rule": "fixed", "rank": 4, "schemes": ["cp", "depthwise"]}
    plan = make_plan(model, X, **settings)
    verbs: dict[str, Callable[[], Any]] = {
        "make_plan": lambda: make_plan(model, X, **settings, calibration=calibration),
        "compress": lambda: compress(model, X, **settings, calibration=calibration),
        "compare": lambda: compare(model, model, X, data=calibration),
        "apply_plan": lambda: apply_plan(model, plan, calibration=calibration),
    }
    if verb == "compare" and "first pass" in message:  # one pass, in which both networks see the same images
        assert verbs[verb]().fidelity.error == 0.0
    else:
        with pytest.raises((ValueError, TypeError), match=message):
            verbs[verb]()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_images_do_not_harm(count: int) -> None:
    """On other images the error is not much above that of a data-free cut, thanks to the pull towards the weights."""
    model = network()
    plan = make_plan(model, X, rule="fixed", rank=6, schemes="cp")
    data_free, few = apply_plan(model, plan), apply_plan(model, plan, calibration=[images()[0][:count]])
    fresh = images(60)
    errors = [compare(model, cut, X, plan=plan, data=fresh).fidelity.error for cut in (data_free, few)]
    assert errors[1] < 1.5 * errors[0]


def test_batches_of_a_dataloader_may_hold_labels() -> None:
    model, batches = network(), images()
    plan = make_plan(model, X, rule="fixed", rank=4, schemes="cp")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.cat(batches), torch.arange(48)), batch_size=20)
    first, second = apply_plan(model, plan, calibration=loader), apply_plan(model, plan, calibration=batches)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def test_a_calibrated_plan_needs_calibration() -> None:
    model, batches = network(), images()
    plan = make_plan(model, X, rule="fixed", rank=4, schemes="cp", calibration=batches)
    with pytest.raises(ValueError, match=r"made with calibration.*Pass calibration="):
        apply_plan(model, plan)
    with pytest.raises(ValueError, match="no weights to calibrate"):
        apply_plan(model, plan, calibration=batches, init="empty")
    apply_plan(model, plan, init="empty")


class Detour(nn.Sequential):
    """Calls its second layer for bright images only."""

    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x)) if float(x.mean()) > 0.5 else self[0](x)


def test_a_layer_that_no_image_reaches_is_named() -> None:
    model = Detour(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    plan = make_plan(model, torch.ones(1, 3, 10, 10), rule="fixed", rank=4, schemes="cp")
    assert [cut.name for cut in plan.cuts] == ["0", "1"]
    with pytest.raises(ValueError, match="1: not called on the calibration images"):
        apply_plan(model, plan, calibration=[torch.zeros(4, 3, 10, 10)])


@pytest.mark.parametrize("wrong", [{"patches": 0}, {"memory": 0}, {"patches": 1.5}])
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected a positive whole number"):
        Calibration([], **wrong)


@pytest.mark.parametrize("channels", [6, 120], ids=["narrow", "wide"])
def test_factors_do_not_depend_on_the_scale_of_the_inputs(channels: int) -> None:
    """Images of about 1e-9 (a power of two, so that no rounding error changes) give the same factors in float64."""
    layers = (
        nn.Conv2d(3, channels, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(channels, 8, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, bias=False),
    )
    model = nn.Sequential(*layers).double().eval()
    x = torch.rand(24, 3, 9, 9, dtype=torch.float64)
    plan = make_plan(model, x[:1], rule="fixed", rank=3, schemes="channel", include="2", cache=False)
    fitted = [apply_plan(model, plan, calibration=[scale * x]) for scale in (1.0, 2.0**-30)]
    plain, tiny = (fold_back(cut, plan).get_parameter("2.weight").detach() for cut in fitted)
    assert float((plain - layers[2].weight.detach()).norm() / plain.norm()) > 0.1
    assert float((plain - tiny).norm() / plain.norm()) < (1e-9 if channels == 6 else 1e-3)  # wide layers are fitted in float32


@pytest.mark.parametrize("patches", [2**20, 4], ids=["gram", "rows"])
def test_the_scale_that_ridges_are_multiples_of_is_never_zero(patches: int) -> None:
    """Inputs without variance count as having that of rounding errors, relative to their size; zero inputs as having size 1."""
    layer = nn.Conv2d(3, 5, 3)
    for size in (1.0, 2.0**-30):
        x = torch.full((4, 3, 8, 8), 0.75 * size)
        constant = moments_of(layer, x, None, patches).objective("all", exact=True).scale
        assert 1e-13 * size**2 < constant < 1e-11 * size**2
    assert moments_of(layer, 0 * x, None, patches).objective("all", exact=True).scale == 1.0


def test_a_network_without_finite_gradients_is_fitted_without_their_metric() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (0 * x).sqrt() + x  # the gradient at zero is 0 * inf

    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), Root()).eval()
    x = torch.rand(16, 3, 9, 9)
    plan = make_plan(model, x[:1], rule="fixed", rank=2, schemes="channel", include="2", cache=False)
    cut = apply_plan(model, plan, calibration=[x])
    without_root = apply_plan(model, plan, calibration=[x], output=lambda y: y.detach())  # nothing to differentiate: no metric either
    torch.testing.assert_close(cut(x), without_root(x))


@pytest.mark.parametrize(("count", "expected"), [(100, list(range(3, 100, 4))), (12, list(range(12))), (2000, list(range(3, 512, 4)))])
def test_probes_see_held_out_images_only(count: int, expected: list[int]) -> None:
    """Of 16 images or more; options are fitted to the other images, and would look better on these than they are."""
    batches = torch.arange(count, dtype=torch.float32).reshape(count, 1, 1, 1).split(30)
    probes = list(Images(batches, Inputs(torch.zeros(1, 1, 1, 1))).probe_batches())
    assert torch.cat([inputs.args[0] for _, _, inputs in probes]).flatten().tolist() == expected
    assert [number for _, number, _ in probes] == [len(inputs.args[0]) for _, _, inputs in probes]
