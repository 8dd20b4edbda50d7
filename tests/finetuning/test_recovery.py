"""Recovery: a cut network trained on its calibration images, without labels, and kept only if held-out images improve."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsconv_surgery import Budget, Calibration, FineTune, Inputs, Recipe, compare, compress
from dsconv_surgery.report import Report

SETTINGS: dict[str, Any] = {"budget": Budget(macs=0.25), "schemes": ["cp"], "rule": "uniform", "cache": False}
SHORT = FineTune(epochs=8, lr=2e-3)


def network(dense_prediction: bool = False) -> nn.Sequential:
    """A small network whose BatchNorms have the statistics of random images."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    channels = 3
    for width in (12, 12, 12, 12):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width, momentum=None), nn.ReLU()]
        channels = width
    ends = [nn.Conv2d(12, 3, 3, padding=1)] if dense_prediction else [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)]
    model = nn.Sequential(*layers, *ends)
    with torch.no_grad():
        model(images(256, 9))
        if not dense_prediction:
            model[-1].weight.mul_(20)  # sure of its classes, so that divergences are not tiny
    return model.eval()


def images(count: int = 96, seed: int = 1) -> Tensor:
    """Smooth random images, each with another contrast."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 3, 4, 4, generator=generator) * (0.5 + torch.rand(count, 3, 1, 1, generator=generator))
    return nn.functional.interpolate(noise, size=(8, 8), mode="bilinear")


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(name == other and torch.equal(x, y) for (name, x), (other, y) in pairs)


@pytest.mark.parametrize("dense_prediction", [False, True])
def test_outputs_on_other_images_come_closer(dense_prediction: bool) -> None:
    """The distance falls on images that neither the fit nor the training saw; the report and the history say so."""
    model, x = network(dense_prediction), images(192)
    weights = copy.deepcopy(model.state_dict())
    cut = compress(model, x[:1], calibration=x.split(24), **SETTINGS)
    small = compress(model, x[:1], calibration=x.split(24), recover=SHORT, **SETTINGS)
    others = [compare(model, s.model, x[:1], data=[images(256, 2)]).fidelity for s in (cut, small)]
    measure = "error" if dense_prediction else "divergence"
    before, after = (getattr(fidelity, measure) for fidelity in others)
    assert after < 0.98 * before
    recovery = small.report.recovery
    assert recovery is not None
    assert (recovery.images, recovery.held_out) == (144, 48)
    assert recovery.after < recovery.before
    assert recovery.measure == ("squared relative error" if dense_prediction else "divergence")
    assert f"recovered on 144 calibration images: {recovery.measure} on 48 others {recovery.before:.4f} -> {recovery.after:.4f}" in str(
        small.report
    )
    (history,) = small.tuned
    assert history.best is not None
    assert history.best.score == -recovery.after
    assert history.best.epoch == recovery.epoch
    assert Report.from_json(small.report.to_json()) == small.report
    assert cut.report.recovery is None
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert not any(module.training for module in (*model.modules(), *small.model.modules()))


@pytest.mark.parametrize(("lr", "message"), [(0.5, "no epoch lowered it"), (1e30, "the loss was not finite; lower lr")])
def test_harmful_training_gives_back_the_cut(lr: float, message: str) -> None:
    """The network, bit for bit, and the plan are those without recovery."""
    model, x = network(), images()
    cut = compress(model, x[:1], calibration=[x], **SETTINGS)
    harmful = FineTune(epochs=2, lr=lr, warmup=0, clip=None, optimizer="adamw")
    small = compress(model, x[:1], calibration=[x], recover=harmful, **SETTINGS)
    assert same_weights(cut.model, small.model)
    assert small.plan == cut.plan
    recovery = small.report.recovery
    assert recovery is not None
    assert recovery.epoch == 0
    assert recovery.before == recovery.after
    assert f"not recovered on 72 calibration images: divergence on 24 others stays {recovery.before:.4f} nats, as {message}" in str(
        small.report
    )


def test_a_seed_gives_the_same_network() -> None:
    model, x = network(), images()
    first, again, other = (
        compress(model, x[:1], calibration=x.split(32), recover=FineTune(epochs=1, lr=1e-3, seed=seed), **SETTINGS) for seed in (0, 0, 1)
    )
    assert same_weights(first.model, again.model)
    assert not same_weights(first.model, other.model)


def test_recover_true_and_keyword_arguments() -> None:
    """`recover=True` has settings of its own; batches may be of any structure, and an output may be selected."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, pixels: Tensor) -> dict[str, Tensor]:
            return {"logits": self.body(pixels), "unused": pixels}

    model, x = Wrapped().eval(), images(48)
    options: dict[str, Any] = {"prepare": lambda batch: Inputs(pixels=batch["image"]), "output": lambda result: result["logits"]}
    batches = [{"image": part} for part in x.split(16)]
    small = compress(model, example_kwargs={"pixels": x[:1]}, calibration=batches, recover=True, **options, **SETTINGS)
    assert small.report.recovery is not None
    assert small.report.recovery.measure == "divergence"
    assert small.report.recovery.after <= small.report.recovery.before


def test_max_drop_judges_recovered_networks() -> None:
    model, x = network(), images(32)
    scores: list[float] = []

    def evaluate(candidate: nn.Module) -> float:
        scores.append(float((candidate(x).argmax(1) == model(x).argmax(1)).float().mean()))
        return scores[-1]

    settings = SETTINGS | {"budget": Budget(macs=0.5)}
    small = compress(model, x[:1], calibration=[x], recover=FineTune(epochs=1), max_drop=0.9, evaluate=evaluate, **settings)
    assert len(small.report.tries) == 1
    assert small.report.recovery is not None


def test_recipes_recover() -> None:
    """`recover` is a flag or a table, is written and read, and does what `compress` does."""
    table = "[budget]\nmacs = 0.25\n[calibration]\nimages = 96\n[recover]\nepochs = 2\nlr = 0.001\nclip = inf\n"
    recipe = Recipe.from_toml(f'rule = "uniform"\nschemes = ["cp"]\n{table}')
    assert recipe.recover == FineTune(epochs=2, lr=1e-3, clip=float("inf"))
    written = Recipe(recover=FineTune(clip=None), calibration=recipe.calibration).to_toml()
    assert "clip = inf" in written
    assert Recipe.from_toml(Recipe.from_toml("recover = true\n[calibration]\n").to_toml()).recover is True
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    model, x = network(), images()
    small = recipe.run(model, x[:1], calibration=x.split(24), cache=False)
    direct = compress(model, x[:1], calibration=x.split(24), recover=recipe.recover, **SETTINGS)
    assert same_weights(small.model, direct.model)
    assert small.report.recovery == direct.report.recovery
    assert len(small.tuned) == 1
    with pytest.raises(ValueError, match="recover needs calibration"):
        Recipe.from_toml("recover = true")
    tuned = Recipe.from_toml(recipe.to_toml() + "[fine_tune]\nepochs = 1\n").run(
        model, x[:1], calibration=x.split(24), train=x.split(24), cache=False
    )
    assert len(tuned.tuned) == 2
    assert tuned.report.recovery == direct.report.recovery


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"calibration": None}, ValueError, "recover: .* there are none. Pass calibration=batches"),
        ({"calibration": [images(15)]}, ValueError, "recover: found 15 calibration images, expected at least 16"),
        ({"recover": 3}, TypeError, "recover: found int, expected True, False or FineTune"),
        ({"frozen": True}, ValueError, "no parameter of the model requires a gradient"),
    ],
)
def test_bad_input(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    model = network()
    model.requires_grad_(not changed.pop("frozen", False))
    with pytest.raises(error, match=message):
        compress(model, images()[:1], **({"calibration": Calibration([images(32)]), "recover": True} | SETTINGS | changed))


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsconv_surgery.support.distributed.several_processes", lambda: True)
    with pytest.raises(ValueError, match="recover: found several processes, expected one"):
        compress(network(), images()[:1], calibration=[images(32)], recover=True, **SETTINGS)


def test_an_interruption_leaves_the_model_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network().train(), images()
    weights = copy.deepcopy(model.state_dict())

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dsconv_surgery.finetuning.loop.TrainingLoop._end_epoch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compress(model, x[:1], calibration=[x], recover=SHORT, **SETTINGS)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
