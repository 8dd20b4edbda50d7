"""Synthetic images: how they look, their fit to a network's BatchNorm statistics, and every way to calibrate with them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cifar import demo_images, demo_resnet20
from torch import Tensor, nn

from dsconv_surgery import Budget, Calibration, Inputs, Plan, Recipe, apply_plan, batchnorm_distance, compare, compress, make_plan, pareto
from dsconv_surgery.calibration import synthetic
from dsconv_surgery.calibration.batchnorm_moments import BatchNormMoments
from dsconv_surgery.calibration.dead_leaves import dead_leaves
from dsconv_surgery.calibration.synthetic import Synthetic, synthetic_batches

SETTINGS: dict[str, Any] = {"budget": Budget(macs=0.6), "schemes": ["cp"], "rule": "uniform", "exclude": "0", "cache": False}
NO_STATISTICS = "ignore:.*the network has no BatchNorm statistics"


def photographs(channels: int = 3) -> Tensor:
    """CIFAR images with values in [0, 1], 16 pixels wide."""
    x = demo_images("test")[0][:256] * torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1) + torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    return nn.functional.avg_pool2d(x if channels == 3 else x.mean(1, keepdim=True), 2)


def network(images: Tensor | None) -> nn.Sequential:
    """A small classifier, with the BatchNorm statistics of images; without BatchNorm for None."""
    torch.manual_seed(0)
    channels = 3 if images is None else images.shape[1]
    layers: list[nn.Module] = []
    for width in (12, 16, 16):
        norm = nn.Identity() if images is None else nn.BatchNorm2d(width, momentum=None)
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), norm, nn.ReLU()]
        channels = width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    if images is not None:
        with torch.no_grad():
            model(images)
    return model.eval()


def drawn(model: nn.Module, x: Tensor, count: int = 32, **settings: Any) -> Tensor:
    return torch.cat([batch.args[0] for batch in synthetic_batches(model, Inputs(x), Synthetic(count, **settings))])


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 24, 40), (3, 8, 9)])
def test_dead_leaves_are_smooth_and_differ(shape: tuple[int, int, int]) -> None:
    """Values are in [0, 1], neighbours alike; a seed gives the same images again, and another seed others."""
    first, again, other = (dead_leaves(24, *shape, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first.shape == (24, *shape)
    assert first.dtype == np.float32
    assert first.min() >= 0
    assert first.max() <= 1
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    z = (first - first.mean()) / first.std()
    assert (z[..., 1:] * z[..., :-1]).mean() > 0.6
    assert len({image.tobytes() for image in first}) == 24


def test_dead_leaves_have_the_spectrum_of_photographs() -> None:
    """Amplitudes fall with frequency about as 1/f, as for CIFAR images."""
    slopes = []
    for images in (dead_leaves(100, 1, 32, 32, np.random.default_rng(0))[:, 0], demo_images("test")[0][:100].mean(1).numpy()):
        power = (abs(np.fft.fft2(images - images.mean())) ** 2).mean(0)
        frequencies = np.arange(2, 12)
        slopes.append(np.polyfit(np.log(frequencies), np.log(power[0, frequencies] + power[frequencies, 0]), 1)[0] / 2)
    assert slopes[0] == pytest.approx(slopes[1], abs=0.1)


@pytest.mark.filterwarnings("ignore:.*inputs of one channel may be anything")
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (255.0, 0.0), (4.0, -2.0)])
def test_the_value_range_is_that_of_the_first_batchnorm(scale: float, shift: float, channels: int) -> None:
    """Whatever the example input is; zeros tell nothing."""
    real = photographs(channels) * scale + shift
    images = drawn(network(real), torch.zeros(1, channels, 16, 16))
    assert images.shape == (32, channels, 16, 16)
    assert images.std() == pytest.approx(float(real.std()), rel=0.3)
    assert abs(images.mean() - real.mean()) < 0.3 * real.std()


@pytest.mark.filterwarnings("ignore:.*nats from the network's BatchNorm statistics")
def test_a_stated_normalisation_is_used() -> None:
    """Images in [0, 1] minus the mean, over the standard deviation; for each channel, or for all of them."""
    model, x = network(photographs()), torch.zeros(1, 3, 16, 16)
    images = drawn(model, x, mean=(0.0, 0.5, 0.5), std=(1.0, 0.5, 0.1))
    low, high = torch.tensor([0.0, -1.0, -5.0]), torch.tensor([1.0, 1.0, 5.0])
    assert (images.amin((0, 2, 3)) >= low - 1e-5).all()
    assert (images.amax((0, 2, 3)) <= high + 1e-5).all()
    assert (images.amax((0, 2, 3)) - images.amin((0, 2, 3)) > 0.9 * (high - low)).all()
    images = drawn(model, x, mean=0.5, std=0.25)
    assert -2 <= images.amin() < -1.9
    assert 1.9 < images.amax() <= 2


@pytest.mark.filterwarnings(NO_STATISTICS)
def test_without_batchnorm_an_example_image_gives_the_range() -> None:
    real = photographs()[:64] * 50 + 7
    images = drawn(network(None), real, count=64)
    torch.testing.assert_close(images.mean((0, 2, 3)), real.mean((0, 2, 3)))
    torch.testing.assert_close(images.std((0, 2, 3)), real.std((0, 2, 3)))


def test_the_chosen_images_are_closer_than_the_first_ones() -> None:
    """Of the same pool, and on all BatchNorms of a trained network."""
    model, x = demo_resnet20(), torch.zeros(1, 3, 32, 32)
    moments = BatchNormMoments(model)
    pool = torch.from_numpy(dead_leaves(128, 3, 32, 32, np.random.default_rng(0))) * 4 - 2
    chosen = synthetic._closest(moments, pool, Inputs(x), 32)
    distances = [moments.distance([(32, Inputs(images))]) for images in (pool[:32], chosen)]
    assert distances[1] < 0.6 * distances[0]


def test_steps_on_pixels_bring_images_closer() -> None:
    """Within the range that they had; a network that lets no gradients through leaves them as they are."""
    model, x = demo_resnet20(), Inputs(torch.zeros(1, 3, 32, 32))
    images = torch.from_numpy(dead_leaves(40, 3, 32, 32, np.random.default_rng(0))) * 4 - 2
    moments = BatchNormMoments(model)
    refined = synthetic._refined(moments, images, x, 4)
    assert moments.distance([(40, Inputs(refined))]) < 0.7 * moments.distance([(40, Inputs(images))])
    assert refined.shape == images.shape
    assert images.min() <= refined.min() < refined.max() <= images.max()
    detached = nn.Sequential(Detached(), demo_resnet20())
    assert torch.equal(synthetic._refined(BatchNormMoments(detached), images, x, 1), images)


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


def test_the_smallest_sum_is_near_the_best() -> None:
    """Against all subsets, and never worse than the first vectors."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        vectors = rng.standard_normal((12, 6))
        norms = {subset: np.square(vectors[list(subset)].sum(0)).sum() for subset in itertools.combinations(range(12), 4)}
        chosen = tuple(synthetic._smallest_sum(vectors @ vectors.T, 4).tolist())
        assert sorted(norms.values()).index(norms[chosen]) < 25  # of 495


def test_the_distance_is_the_divergence_of_normal_distributions() -> None:
    """Of each channel's values from its running statistics, the mean over channels and layers."""
    images = photographs()
    model = network(images[:128])
    norm = model[1]
    values = model[0](images[128:160] * 2).detach().transpose(0, 1).flatten(1).double()
    trained, actual = (
        torch.distributions.Normal(m, v.sqrt()) for m, v in ((norm.running_mean, norm.running_var), (values.mean(1), values.var(1)))
    )
    expected = torch.distributions.kl_divergence(actual, trained).mean()
    distance = batchnorm_distance(model[:2], images[:1], data=(images[128:160] * 2).split(7))
    assert distance == pytest.approx(float(expected), rel=0.02)  # variances below a thousandth of their mean count as that


def test_distances_tell_photographs_from_noise() -> None:
    """And from a wrong value range. A network without BatchNorm, or one with initial statistics, tells nothing."""
    model, x = demo_resnet20(), demo_images("train")[0][:64]
    real, leaves = (batchnorm_distance(model, x[:1], data=data) for data in (x.split(32), Calibration.synthetic(32)))
    noise, dark = (batchnorm_distance(model, x[:1], data=[data]) for data in (torch.randn_like(x), x / 5))
    assert real is not None
    assert leaves is not None
    assert max(real, leaves) < synthetic.FAR < min(noise or 0, dark or 0)
    assert batchnorm_distance(network(None), photographs()[:1], data=[photographs()[:8]]) is None
    untrained = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))  # in training mode
    assert batchnorm_distance(untrained, photographs()[:1], data=[photographs()[:8]]) is None


def test_all_ways_to_calibrate_take_them() -> None:
    """compress, make_plan and apply_plan agree, the plan says so, in JSON as well, and the report and the sweep do."""
    model, x = network(photographs()), torch.zeros(1, 3, 16, 16)
    images = Calibration.synthetic(8)
    small = compress(model, x, calibration=images, **SETTINGS)
    assert small.plan.calibrated == "synthetic"
    assert Plan.from_json(small.plan.to_json()) == small.plan
    assert "calibrated on synthetic images" in str(small.plan)
    assert "calibrated on synthetic images: measure the accuracy on real ones" in str(small.report)
    assert "outputs on 16 images" in str(compare(model, small.model, x, data=[photographs()[:16]]))
    assert "outputs on 8 synthetic images" in str(compare(model, small.model, x, data=Calibration.synthetic(8)))
    plan = make_plan(model, x, calibration=images, **SETTINGS)
    assert [(cut.name, cut.rank) for cut in plan.cuts] == [(cut.name, cut.rank) for cut in small.plan.cuts]
    results = [apply_plan(model, plan, *arguments, calibration=images) for arguments in ((), (x,))]
    for other in results[1:]:
        for a, b in zip(results[0].state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"the plan was made with synthetic images\. Pass calibration="):
        apply_plan(model, plan)
    assert plan.calibrated == "synthetic"
    sweep = {key: value for key, value in SETTINGS.items() if key != "budget"}
    assert "outputs compared on synthetic images" in str(pareto(model, x, fractions=(0.6,), calibration=images, **sweep))
    assert "synthetic" not in str(pareto(model, x, fractions=(0.6,), calibration=images, data=[photographs()[:8]], **sweep))


def test_the_name_alone_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands for the default settings, also for a plan made before."""
    monkeypatch.setattr(synthetic, "FEWEST", 8)
    monkeypatch.setattr(synthetic, "PIXELS", 8 * 16 * 16)
    model, x = network(photographs()), torch.zeros(1, 3, 16, 16)
    small = compress(model, x, calibration="synthetic", **SETTINGS)
    cut = apply_plan(model, small.plan, calibration="synthetic")
    real = photographs()[:64]
    torch.testing.assert_close(cut(real), small.model(real), rtol=1e-2, atol=1e-3)
    with pytest.raises(ValueError, match="calibration='synthetc': expected an iterable of batches of images, or 'synthetic'"):
        compress(model, x, calibration="synthetc", **SETTINGS)


def test_old_plans_load() -> None:
    """Before, a plan said true or false."""
    model = network(photographs())
    plan = make_plan(model, torch.zeros(1, 3, 16, 16), calibration=[photographs()[:32]], **SETTINGS)
    assert plan.calibrated is True
    assert '"calibrated":true' in plan.to_json().replace(" ", "")
    assert Plan.from_json(plan.to_json()) == plan


def test_the_cut_is_closer_than_one_by_weights_alone() -> None:
    """On photographs, for a trained network whose last stage is cut."""
    model, real = demo_resnet20(), demo_images("test")[0][:200]
    settings: dict[str, Any] = {"budget": Budget(params=0.4), "schemes": ["cp"], "rule": "uniform", "include": "layer3.*", "cache": False}
    divergences = []
    for calibration in (None, Calibration.synthetic(32)):
        small = compress(model, real[:1], calibration=calibration, **settings)
        divergences.append(compare(model, small.model, real[:1], data=[real]).fidelity.divergence)
    assert divergences[1] < 0.8 * divergences[0]


def test_recipes(tmp_path: Any) -> None:
    """A recipe's number of images counts; one that asks for synthetic images needs no calibration=, and refuses others."""
    model, x = network(photographs()), torch.zeros(1, 3, 16, 16)
    text = "schemes = ['cp']\nrule = 'uniform'\nexclude = '0'\nbudget = {macs = 0.6}\n[calibration]\nimages = 8\n"
    asked = Recipe.from_toml(text).run(model, x, calibration="synthetic", cache=False)
    recipe = Recipe.from_toml(text + "synthetic = true\n")
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    named = recipe.run(model, x, cache=False)
    assert asked.plan == named.plan == compress(model, x, calibration=Calibration.synthetic(8), **SETTINGS).plan
    with pytest.raises(ValueError, match="it asks for synthetic images; found some others"):
        recipe.run(model, x, calibration=[photographs()[:32]])


class ByName(nn.Module):
    """A network with keyword arguments, and with one that is no tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, scale: int = 1) -> Tensor:
        return self.model(pixel_values * scale)


def test_keyword_arguments_and_prepare() -> None:
    """`prepare` is for the user's batches; synthetic images are inputs already."""
    settings = SETTINGS | {"exclude": "model.0"}
    example = {"pixel_values": torch.zeros(1, 3, 16, 16), "scale": 1}
    model = ByName(network(photographs()))
    small = compress(model, example_kwargs=example, calibration=Calibration.synthetic(8), prepare=lambda batch: 1 / 0, **settings)
    assert small.plan.calibrated == "synthetic"
    assert len(small.plan.cuts) == 2


def lone(*channels: int) -> nn.Module:
    return nn.Conv2d(*channels, 3, padding=1)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = lone(3, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.conv(x) + self.conv(y)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(10, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.embedding(x))


IMAGES = "expected one floating-point tensor .images, channels, height, width."
REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], str]] = {
    "two inputs": (Two, (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)), IMAGES),
    "tokens": (Tokens, (torch.zeros(1, 6, dtype=torch.long),), IMAGES),
    "audio": (lambda: nn.Linear(16, 4), (torch.zeros(1, 2, 16),), IMAGES),
    "channels": (lambda: lone(4, 4), (torch.zeros(1, 4, 16, 16),), "expected 1 or 3 channels"),
    "small": (lambda: lone(3, 4), (torch.zeros(1, 3, 4, 16),), "expected images of 8 x 8 pixels or more"),
    "zeros": (lambda: lone(3, 4), (torch.zeros(1, 3, 16, 16),), "the value range of the inputs is unknown: .* does not look like an image"),
    "noise": (lambda: lone(3, 4), (torch.rand(1, 3, 16, 16),), "the value range of the inputs is unknown: .* does not look like an image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_inputs_are_refused(name: str) -> None:
    build, inputs, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        compress(build(), *inputs, calibration="synthetic", cache=False)


def test_a_network_that_does_not_take_the_example() -> None:
    """The example input is blamed, as without calibration."""
    with pytest.raises(ValueError, match="does not run on the example inputs"):
        compress(network(photographs()), torch.zeros(1, 1, 16, 16), calibration="synthetic", **SETTINGS)


class Unused(nn.Module):
    """Its BatchNorm sees no image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = lone(3, 4), nn.BatchNorm2d(4)
        nn.init.ones_(self.norm.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_batchnorms_that_are_not_used_tell_nothing() -> None:
    with pytest.raises(ValueError, match="the value range of the inputs is unknown"):
        compress(Unused(), torch.zeros(1, 3, 16, 16), calibration="synthetic", cache=False)


def test_apply_plan_needs_the_range_again() -> None:
    """A plan keeps no values of the example input, and this network has no BatchNorm."""
    model, x = network(None), photographs()
    with pytest.warns(UserWarning, match="has no BatchNorm statistics"):
        plan = make_plan(model, x, calibration=Calibration.synthetic(8), **SETTINGS)
    with pytest.raises(ValueError, match=r"found no values of the example input\. Pass an image"):
        apply_plan(model, plan, calibration="synthetic")
    with pytest.warns(UserWarning, match="has no BatchNorm statistics"):
        apply_plan(model, plan, calibration=Calibration.synthetic(8, mean=0.0, std=1.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "count=0, expected a positive whole number"),
        ({"mean": 0.5}, "mean=0.5, std=None. Pass both or neither"),
        ({"mean": (0.5, 0.5), "std": 1.0}, "expected one number or 3 each"),
        ({"mean": 0.5, "std": 0.0}, "a positive std"),
        ({"mean": float("nan"), "std": 1.0}, "expected one number or 3 each"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress(network(photographs()), torch.zeros(1, 3, 16, 16), calibration=Calibration.synthetic(**settings), **SETTINGS)


def test_a_network_for_other_images_is_warned_of() -> None:
    """With the distance: here the stated range is wrong. One channel may be other than grey photographs."""
    with pytest.warns(UserWarning, match="inputs of one channel may be anything"):
        drawn(network(photographs(1)), torch.zeros(1, 1, 16, 16), count=8)
    with pytest.warns(UserWarning, match=r"the images are \d\.\d\d nats from the network's BatchNorm statistics, expected at most 0.1"):
        drawn(demo_resnet20(), torch.zeros(1, 3, 32, 32), mean=0.0, std=1.0)
