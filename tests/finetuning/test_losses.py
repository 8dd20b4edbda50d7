"""The default loss refuses what cross-entropy would misunderstand; scores are those of copies."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsconv_surgery import Budget, FineTune, compress, fine_tune, pareto

X = torch.rand(16, 3, 8, 8)


def head(columns: int, wrap: Any = lambda y: y) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, columns)

        def forward(self, x: Tensor) -> Any:
            return wrap(self.fc(self.norm(self.conv(x)).mean((2, 3))))

    return Net().eval()


@pytest.mark.parametrize(
    ("model", "labels", "words"),
    [
        (head(1), torch.rand(16, 1), "shape (16, 1)"),
        (head(1), torch.zeros(16, dtype=torch.long), "shape (16, 1)"),
        (head(4), torch.rand(16, 4), "torch.float32"),
        (head(4), torch.rand(16), "torch.float32"),
        (head(4), torch.zeros(16, dtype=torch.int32), "torch.int32"),
        (head(4), torch.zeros(16, dtype=torch.bool), "torch.bool"),
        (head(4, lambda y: {"logits": y}), torch.zeros(16, dtype=torch.long), "logits"),
        (head(4, lambda y: SimpleNamespace(logits=y)), torch.zeros(16, dtype=torch.long), "SimpleNamespace"),
        (head(4, lambda y: y.flatten()), torch.zeros(16, dtype=torch.long), "shape (64,)"),
    ],
)
@pytest.mark.parametrize("teacher", [False, True])
def test_the_default_loss_refuses(model: nn.Module, labels: Tensor, words: str, teacher: bool) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="loss=") as caught:
        fine_tune(model, [(X, labels)], teacher=model if teacher else None, settings=FineTune(epochs=1, mix=0.0))
    assert words in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_loss_of_the_user_trains_a_regression() -> None:
    model, labels = head(1), 5 * torch.rand(16, 1)
    history = fine_tune(model, [(X, labels)], loss=F.mse_loss, settings=FineTune(epochs=20, lr=0.05))
    assert history.epochs[-1].loss < 0.5 * history.epochs[0].loss


@pytest.mark.parametrize("function", ["compress", "pareto", "fine_tune"])
def test_scores_leave_the_network_alone(function: str) -> None:
    """A score that switches the network to training mode, and so updates BatchNorm statistics, does so in a copy."""
    model = head(4).train()
    old = model.norm.running_mean.clone()
    modes: list[bool] = []

    def score(net: nn.Module) -> float:
        modes.append(net.training)
        net.train()
        return -float(net(X).detach().square().mean())

    if function == "compress":
        compress(model, X[:1], max_drop=9.0, evaluate=score, cache=False)
    elif function == "pareto":
        pareto(model, X[:1], fractions=(0.7,), evaluate=score, schemes="spatial", cache=False)
    else:
        fine_tune(model, [(X, torch.zeros(16, dtype=torch.long))], validate=score, settings=FineTune(epochs=2))
    assert modes
    assert not any(modes)
    assert torch.equal(old, model.norm.running_mean)
    assert model.training


def test_the_budget_is_checked_against_a_copy() -> None:
    model = head(4)
    small = compress(model, X[:1], budget=Budget(macs=0.7), schemes="spatial", cache=False)
    assert small.plan.cuts


class Result:
    """A network's output of a class that torch's pytree does not know."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize("teacher", [False, True])
def test_the_default_loss_is_of_what_output_selects(teacher: bool) -> None:
    """The same losses as of the network that gives the class scores themselves."""
    labels, losses = torch.arange(16) % 4, []
    for wrap, output in ((lambda y: y, None), (Result, lambda result: result.logits)):
        torch.manual_seed(0)
        model = head(4, wrap)
        dense = copy.deepcopy(model) if teacher else None
        history = fine_tune(model, [(X, labels)], teacher=dense, output=output, settings=FineTune(epochs=4))
        losses.append([epoch.labels for epoch in history.epochs])
    assert losses[0] == losses[1]
    assert losses[0][-1] != losses[0][0]


def test_the_default_loss_does_not_suggest_what_was_passed() -> None:
    labels = torch.zeros(16, dtype=torch.long)
    with pytest.raises(ValueError, match=r"output is Result, .*Pass output=.*Or pass loss="):
        fine_tune(head(4, Result), [(X, labels)])
    for output, words in ((lambda r: [r.logits, r.logits], "list of 2"), (lambda r: r.logits[:, :1], r"shape \(16, 1\)")):
        with pytest.raises(ValueError, match=rf"the result of output= (is|has the) {words}.*Pass loss=") as caught:
            fine_tune(head(4, Result), [(X, labels)], output=output)
        assert "Pass output=" not in str(caught.value)
