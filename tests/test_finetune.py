"""Fine-tuning: what it lowers, what it leaves alone, and that it goes on after any interruption."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cifar import Batches, accuracy, demo_images, demo_resnet20
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler, TensorDataset

from dsconv_surgery import Budget, FineTune, Plan, apply_plan, compare, compress, fine_tune, make_plan
from dsconv_surgery.compression import Compressed
from dsconv_surgery.finetuning.history import History
from dsconv_surgery.finetuning.loss import DistillationLoss, blocks_of
from dsconv_surgery.finetuning.mixing import can_mix, mix_images
from dsconv_surgery.finetuning.optimizers import decay, learning_rate_factor, products
from dsconv_surgery.schemes import scheme_names
from dsconv_surgery.surgery import chain_kernel

ROOT = Path(__file__).resolve().parent.parent


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = Block(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.block(torch.relu(self.stem(x))).mean((2, 3))))


class Labelled:
    """Images of four kinds, in batches of one order."""

    def __init__(self, count: int = 96, size: int = 16) -> None:
        draws = torch.Generator().manual_seed(1)
        self.y = torch.arange(count) % 4
        patterns = torch.randn(4, 3, 8, 8, generator=draws) + torch.randn(4, 3, 1, 1, generator=draws)
        self.x = patterns[self.y] + 0.5 * torch.randn(count, 3, 8, 8, generator=draws)
        self.size = size

    def __len__(self) -> int:
        return -(-len(self.x) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(self.x.split(self.size), self.y.split(self.size), strict=True))


class Endless(IterableDataset[Tensor]):
    """Images one by one, without a length and without end."""

    def __iter__(self) -> Iterator[Tensor]:
        return itertools.cycle(Labelled().x)


def cut_net(dropout: float = 0.0, schemes: str = "cp") -> tuple[Net, nn.Module, Plan]:
    torch.manual_seed(0)
    dense = Net(dropout).eval()
    dense.block.norm.running_mean.normal_()
    plan = make_plan(dense, torch.rand(1, 3, 8, 8), budget=Budget(params=0.6), schemes=schemes, rule="uniform", include="block.conv")
    assert plan.cuts
    return dense, apply_plan(dense, plan), plan


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_it_wins_back_accuracy_on_real_images() -> None:
    """The shipped network, cut hard by its weights alone, which makes for a fragile start: one short epoch on 2,560 images."""
    dense = demo_resnet20()
    images, labels = demo_images("train")
    test, test_labels = demo_images("test")
    small = compress(dense, images[:1], budget=Budget(params=0.27), schemes="cp", rule="uniform", exclude=("conv1", "linear"))
    before = accuracy(small.model, test, test_labels)
    history = fine_tune(small.model, Batches(images[:2560], labels[:2560]), teacher=dense, settings=FineTune(epochs=1, lr=1e-4))
    assert before < 65
    assert accuracy(small.model, test, test_labels) > before + 10
    assert history.epochs[0].steps == 20


def test_a_teacher_needs_no_labels() -> None:
    dense, model, _ = cut_net()
    history = fine_tune(model, [x for x, _ in Labelled()], teacher=dense, settings=FineTune(epochs=8, lr=3e-3))
    assert history.epochs[-1].teacher < 0.5 * history.epochs[0].teacher
    assert history.epochs[0].labels is None


def test_labels_need_no_teacher() -> None:
    _, model, _ = cut_net()
    history = fine_tune(model, Labelled(), settings=FineTune(epochs=8, lr=1e-2))
    assert history.epochs[-1].labels < 0.5 * history.epochs[0].labels
    assert history.epochs[0].teacher is None
    assert history.epochs[0].loss == pytest.approx(history.epochs[0].labels)


def test_a_loss_of_ones_own_and_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.layer(a + b)

    a, b = torch.randn(32, 3), torch.randn(32, 3)
    wanted, mask = torch.randn(32, 2), torch.ones(32, 2)
    batches = [(a, b, wanted, mask)] * 5

    def squares(outputs: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
        return ((outputs - wanted) * mask).square().mean()

    history = fine_tune(Two(), batches, loss=squares, inputs=2, settings=FineTune(epochs=5, lr=0.1))
    assert history.epochs[-1].loss < history.epochs[0].loss


def test_the_loss_is_what_the_formula_says() -> None:
    """0.3 labels + 0.7 T^2 KL(softmax(z / T) | softmax(y / T)) + 2 |u - v|^2 / |v|^2, written out."""
    dense, model, _ = cut_net()
    x, y = next(iter(Labelled()))
    with torch.no_grad():
        model.get_parameter("head.weight").mul_(3)  # outputs well apart
    lesson = DistillationLoss(model, dense, None, 0.7, 3.0, 2.0)
    assert lesson.blocks == ["block"]
    with lesson.watching(), torch.no_grad():
        given = model(x)
        loss, parts = lesson(given, lesson.wanted((x,)), (y,))
    dense.requires_grad_(False)
    model.requires_grad_(False)
    wanted = dense(x)
    p, q = (wanted / 3).softmax(1), (given / 3).softmax(1)
    divergence = 9 * (p * (p / q).log()).sum(1).mean()
    features = dense.block(torch.relu(dense.stem(x)))
    off = (model.get_submodule("block")(torch.relu(model.get_submodule("stem")(x))) - features).square().sum() / features.square().sum()
    assert float(parts["teacher"]) == pytest.approx(float(divergence), rel=1e-4)
    assert float(parts["features"]) == pytest.approx(float(off), rel=1e-4)
    labels = F.cross_entropy(given, y)
    assert float(loss) == pytest.approx(float(0.3 * labels + 0.7 * divergence + 2 * off), rel=1e-4)


def test_images_are_mixed() -> None:
    """Blends are k x + (1 - k) x' and patches a rectangle of x' with 1 - k of the area; the loss of labels is weighted alike."""
    x, y = torch.rand(6, 3, 20, 20), torch.arange(6)
    torch.manual_seed(0)
    kinds: set[bool] = set()
    for _ in range(20):
        (mix, first, second), kept = mix_images((x, y), 1, 1.0)
        other = x[second]
        assert torch.equal(first, y)
        assert sorted(second.tolist()) == y.tolist()
        taken = (mix == other) & (other != x)
        blended = kept * x + (1 - kept) * other
        kinds.add(torch.equal(mix, blended))
        if torch.equal(mix, blended):
            continue
        moved = taken.any(0).any(0)
        assert torch.equal(mix, torch.where(moved, other, x))
        rows, columns = moved.any(1), moved.any(0)
        assert torch.equal(moved, rows[:, None] & columns)
        for edge in (rows, columns):
            assert float(edge.diff().sum()) <= 2  # in one piece
            assert int(edge.sum()) == pytest.approx(20 * math.sqrt(1 - kept), abs=0.51)
    assert kinds == {True, False}
    assert mix_images((x, y), 1, 0.0)[0][0] is x
    assert can_mix((x, y), 1)
    assert not any(can_mix(items, 1) for items in ((), (y, y), (x, y[0]), (x, y[:5]), (x, [y]), ("words", y)))
    given = torch.randn(6, 4)
    loss, _ = DistillationLoss(nn.Identity(), None, F.mse_loss, 0.0, 1.0, 0.0)(given, None, (given + 1, given + 3), 0.25)
    assert float(loss) == pytest.approx(0.25 * 1 + 0.75 * 9)


def test_batches_that_cannot_be_mixed_are_learned_from_as_they_are() -> None:
    """A target that is one number for the batch: by default nothing is mixed, and the loss is of the very images."""
    dense, model, _ = cut_net()
    x, _ = next(iter(Labelled()))
    with torch.no_grad():
        wanted = float((model(x).mean() - 2.0).square())
    settings = FineTune(epochs=1, distill=0.0)
    history = fine_tune(model, [(x, torch.tensor(2.0))], teacher=dense, loss=lambda y, t: (y.mean() - t).square(), settings=settings)
    assert history.epochs[0].loss == pytest.approx(wanted, rel=1e-5)


def test_blocks_are_the_modules_around_cuts() -> None:
    dense = demo_resnet20()
    plan = make_plan(dense, torch.rand(1, 3, 32, 32), schemes="channel", rule="fixed", rank=4, include="layer2.*")
    assert blocks_of(apply_plan(dense, plan), dense) == ["layer2.0", "layer2.1", "layer2.2"]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("norms", ["frozen", "late", "trained"])
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path, norms: Any, accumulate: int) -> None:
    """Dropout, shuffling, an average and a best score: stopped at several steps, between checkpoints too, bit for bit the same."""
    dense, model, _ = cut_net(dropout=0.3)
    data = Labelled()
    shuffled = DataLoader(TensorDataset(data.x, data.y), batch_size=10, shuffle=True)
    settings = FineTune(epochs=3, norms=norms, accumulate=accumulate, average=0.8, mix=0.5, save_every=4)

    class StopHere(Exception):  # noqa: N818
        pass

    def run(model: nn.Module, path: Path | None, stop: int | None) -> History:
        def watch(step: int, _values: Any) -> None:
            if step == stop:
                raise StopHere

        return fine_tune(
            model,
            shuffled,
            teacher=dense,
            settings=settings,
            validate=lambda m: -float(m.head.weight.sum()),
            checkpoint=path,
            callback=watch,
        )

    undisturbed = copy.deepcopy(model)
    expected = run(undisturbed, None, None)
    total = expected.epochs[-1].steps
    assert total == 3 * math.ceil(10 / accumulate)
    for stop in range(2, total, 7):
        path, again = tmp_path / f"{stop}.pt", copy.deepcopy(model)
        with pytest.raises(StopHere):
            run(copy.deepcopy(model), path, stop)
        torch.manual_seed(stop)  # whatever was drawn in the meantime
        found = run(again, path, None)
        assert same(weights(again), weights(undisturbed))
        assert same(found.weights["best"], expected.weights["best"])
        assert [(e.loss, e.score) for e in found.epochs] == [(e.loss, e.score) for e in expected.epochs]
    once_more = copy.deepcopy(model)
    assert [e.loss for e in run(once_more, path, 1).epochs] == [e.loss for e in expected.epochs]  # nothing left to do
    assert same(weights(once_more), weights(undisturbed))


KILLED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_finetune as t
dense, model, _ = t.cut_net(dropout=0.3)
def report(step, values):
    print(step, flush=True)
t.fine_tune(model, t.Labelled(), teacher=dense, settings=t.FineTune(epochs=4, save_every=1), checkpoint=sys.argv[2], callback=report)
torch.save(model.state_dict(), sys.argv[3])
"""


def test_a_killed_process_goes_on(tmp_path: Path) -> None:
    """kill -9 while it writes a checkpoint after every step."""
    dense, model, _ = cut_net(dropout=0.3)
    fine_tune(model, Labelled(), teacher=dense, settings=FineTune(epochs=4, save_every=1))
    end = tmp_path / "end.pt"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'examples')!r}){KILLED}", str(ROOT / "tests")]
    command += [str(tmp_path / "run.pt"), str(end)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 7:
                process.kill()
                break
    assert not end.exists()
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert 6 < int(printed[0]) < 24  # not from the beginning
    assert same(torch.load(end, weights_only=True), weights(model))


@pytest.mark.parametrize("generator", [None, 5])
def test_a_seed_gives_the_same_weights(generator: int | None) -> None:
    """Whatever was drawn before, with a DataLoader that has a generator of its own, too; another seed gives others."""
    dense, model, _ = cut_net(dropout=0.3)
    data = Labelled()
    own = None if generator is None else torch.Generator().manual_seed(generator)
    loader = DataLoader(TensorDataset(data.x, data.y), batch_size=16, shuffle=True, generator=own)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(random.randrange(1000))
        trained = copy.deepcopy(model)
        fine_tune(trained, loader, teacher=dense, settings=FineTune(epochs=2, seed=seed))
        found.append(weights(trained))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_what_it_leaves_alone() -> None:
    """The teacher, parameters that need no gradient, training flags, the user's random states, and who requires a gradient."""
    dense, model, _ = cut_net()
    model.get_submodule("stem").requires_grad_(False)
    model.get_submodule("block").train()
    flags = [m.training for m in model.modules()]
    teacher, stem = weights(dense), weights(model.get_submodule("stem"))
    dense.train()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    fine_tune(model, Labelled(), teacher=dense, settings=FineTune(epochs=1, features=1.0))
    assert same(weights(dense), teacher)
    assert dense.training
    assert same(weights(model.get_submodule("stem")), stem)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for network in (model, dense) for m in network.modules())


def test_norms() -> None:
    """Frozen statistics stay; trained ones move; late ones are the plain mean over the batches, with the last weights."""
    dense, model, _ = cut_net()
    found = {}
    for norms in ("frozen", "late", "trained"):
        trained = copy.deepcopy(model)
        fine_tune(trained, Labelled(), teacher=dense, settings=FineTune(epochs=2, norms=norms, lr=1e-2))
        found[norms] = trained
    start = model.get_submodule("block.norm").running_mean
    assert torch.equal(found["frozen"].get_submodule("block.norm").running_mean, start)
    assert not torch.equal(found["trained"].get_submodule("block.norm").running_mean, start)
    late = found["late"]
    with torch.no_grad():
        seen = late.get_submodule("block.conv")(torch.relu(late.get_submodule("stem")(Labelled().x)))
    torch.testing.assert_close(late.get_submodule("block.norm").running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert late.get_submodule("block.norm").momentum == 0.1
    frozen = found["frozen"].get_submodule("block.norm").weight
    assert not torch.equal(frozen, model.get_submodule("block.norm").weight)  # its weights are trained all the same


@pytest.mark.parametrize("scheme", [name for name in scheme_names() if name != "bottleneck"])
def test_decay_is_of_the_product(scheme: str) -> None:
    """One step of size a against the gradient of |V|^2 / 2 takes about a times its squared norm off it, for every scheme's chain."""
    _, model, plan = cut_net(schemes=scheme)
    model = model.double()
    kernels = products(model, plan)
    assert len(kernels) == 3  # the chain, the stem and the head
    chain = model.get_submodule("block.conv")
    (one,) = plan.cuts
    torch.testing.assert_close(kernels[0][0]().flatten(0, 1), chain_kernel(one, chain), rtol=1e-6, atol=1e-9)
    before = {name: p.detach().clone().requires_grad_() for name, p in chain.named_parameters()}
    kernel = torch.func.functional_call(chain, before, torch.eye(8, dtype=torch.float64)[:, :, None, None] * impulse())
    gradients = torch.autograd.grad(kernel.square().sum() / 2, list(before.values()))
    decay(kernels[:1], 1e-3)
    for (name, start), gradient in zip(before.items(), gradients, strict=True):
        torch.testing.assert_close(chain.get_parameter(name), start.detach() - 1e-3 * gradient, rtol=1e-6, atol=1e-9)


def impulse() -> Tensor:
    """One pixel among zeros: a convolution's answer to it is its kernel."""
    picture = torch.zeros(7, 7, dtype=torch.float64)
    picture[3, 3] = 1
    return picture


def test_decay_in_the_loop_shrinks_kernels() -> None:
    dense, model, plan = cut_net()
    norms = []
    for amount in (0.0, 10.0):
        trained = copy.deepcopy(model)
        fine_tune(trained, Labelled(), teacher=dense, plan=plan, settings=FineTune(epochs=2, weight_decay=amount))
        norms.append(float(chain_kernel(plan.cuts[0], trained.get_submodule("block.conv")).square().sum()))
    assert norms[1] < 0.9 * norms[0]


def test_accumulated_batches_are_one_large_one() -> None:
    """Without rounding: the same weights from two batches of 16 as from one of 32, the last pair incomplete."""
    dense, model, _ = cut_net()
    dense, model = dense.double(), model.double()
    found = []
    for size, accumulate in ((32, 1), (16, 2)):
        data = Labelled(80, size)
        batches = [(x.double(), y) for x, y in data]
        trained = copy.deepcopy(model)
        fine_tune(trained, batches, teacher=dense, settings=FineTune(epochs=2, accumulate=accumulate, mix=0.0, optimizer="adamw"))
        found.append(weights(trained))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("settings", [{"precision": "bfloat16"}, {"precision": "float16"}, {"channels_last": True}], ids=str)
def test_precision_and_memory_format(settings: dict[str, Any]) -> None:
    _, model, _ = cut_net()
    history = fine_tune(model, Labelled(), settings=FineTune(epochs=8, lr=3e-3, **settings))
    assert history.epochs[-1].labels < 0.9 * history.epochs[0].labels
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_the_schedule() -> None:
    """Up in a straight line over the warm-up, down along half a cosine; the callback sees it."""
    assert [learning_rate_factor(step, 20, 0.2) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert learning_rate_factor(4, 20, 0.2) == pytest.approx(1.0)
    assert learning_rate_factor(12, 20, 0.2) == pytest.approx(0.5)
    dense, model, _ = cut_net()
    seen: dict[int, float] = {}
    fine_tune(
        model,
        Labelled(),
        teacher=dense,
        settings=FineTune(epochs=2, lr=0.01, warmup=0.25),
        callback=lambda step, values: seen.update({step: values["lr"]}) if "lr" in values else None,
    )
    assert list(seen) == list(range(1, 13))
    assert list(seen.values()) == pytest.approx([0.01 * learning_rate_factor(step, 12, 0.25) for step in range(12)])


def test_best_and_last_weights() -> None:
    dense, model, _ = cut_net()
    scores = iter([0.1, 0.9, 0.5])
    kept: list[dict[str, Tensor]] = []

    def validate(m: nn.Module) -> float:
        assert not any(module.training for module in m.modules())
        kept.append(weights(m))
        return next(scores)

    history = fine_tune(model, Labelled(), teacher=dense, validate=validate, settings=FineTune(epochs=3, average=0.5))
    assert history.best is not None
    assert history.best.epoch == 2
    assert same(history.weights["best"], kept[1])
    assert same(history.weights["last"], kept[2])
    assert same(history.weights["last"], weights(model))


def test_a_history_is_data(tmp_path: Path) -> None:
    dense, model, _ = cut_net()
    history = fine_tune(model, Labelled(), teacher=dense, validate=lambda _: 0.5, settings=FineTune(epochs=2))
    again = History.from_json(history.to_json())
    assert again == history
    assert "weights" not in json.loads(history.to_json())
    assert "0.5000" in str(history)
    history.plot(tmp_path / "history.png")
    assert (tmp_path / "history.png").stat().st_size > 5000
    with pytest.raises(ValueError, match=r"unknown key 'second'.*Did you mean 'seconds'"):
        History.from_json(history.to_json().replace('"seconds"', '"second": 1, "seconds"', 1))


@pytest.mark.parametrize("poisoned", ["input", "weight"])
def test_a_loss_that_is_not_finite_stops_with_the_last_good_weights(poisoned: str) -> None:
    dense, model, _ = cut_net()
    batches: list[Any] = list(Labelled())
    if poisoned == "input":
        batches[4] = (torch.full_like(batches[4][0], math.nan), batches[4][1])
    kept: dict[int, dict[str, Tensor]] = {0: weights(model)}

    def spoil(step: int, _values: Any) -> None:
        kept[step] = weights(model)
        if poisoned == "weight" and step == 4:
            with torch.no_grad():
                model.get_submodule("stem").weight.mul_(math.inf)

    with pytest.raises(FloatingPointError, match=r"at step 5 of 6 the loss is nan.*weights after step 3 were put back"):
        fine_tune(model, batches, teacher=dense, settings=FineTune(epochs=1, save_every=3), callback=spoil)
    assert same(weights(model), kept[3])
    assert all(p.grad is None for p in model.parameters())


def one_shot(batches: Any) -> Iterator[Any]:
    yield from batches


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "iterator": ({"batches": "one shot"}, ValueError, "found an iterator.*3 epochs need it again"),
    "iterator to go on with": (
        {"batches": "one shot", "settings": FineTune(epochs=1, steps=3), "checkpoint": "run.pt"},
        ValueError,
        "going on after an interruption needs it again",
    ),
    "tensor": ({"batches": torch.rand(4, 3, 8, 8)}, ValueError, "found a tensor"),
    "no batches": ({"batches": []}, ValueError, "no batches"),
    "not iterable": ({"batches": 3}, TypeError, "found int"),
    "no length": ({"batches": type("Endless", (), {"__iter__": lambda self: iter(Labelled())})()}, ValueError, r"FineTune\(steps=...\)"),
    "batches in shares": (
        {"batches": DataLoader(Labelled().x, batch_size=16, sampler=DistributedSampler(Labelled().x, num_replicas=2, rank=0))},
        ValueError,
        "found a DistributedSampler.*Give every process the same batches",
    ),
    "no labels, no teacher": (
        {"batches": [torch.rand(4, 3, 8, 8)], "teacher": None},
        ValueError,
        "holds no labels, and there is no teacher",
    ),
    "an empty batch": ({"batches": [()]}, ValueError, "a batch holds nothing, expected 1 input"),
    "mixing of what cannot be": (
        {"batches": [(torch.rand(4, 3, 8, 8), torch.tensor(1))], "settings": FineTune(mix=0.5)},
        ValueError,
        r"mix=0.5, but a batch of Tensor, Tensor cannot be mixed.*Leave mix out",
    ),
    "strings": ({"batches": ["a"]}, ValueError, "a batch holds str"),
    "decay without plan": ({"settings": FineTune(weight_decay=0.1)}, ValueError, "Pass plan="),
    "score": ({"validate": lambda _: math.nan}, ValueError, "validate: found nan"),
    "iterator and late statistics": (
        {"batches": "one shot", "settings": FineTune(epochs=1, steps=3, norms="late")},
        ValueError,
        'norms="late" needs it',
    ),
    "no length after all": ({"batches": DataLoader(Endless(), batch_size=16)}, ValueError, r"FineTune\(steps=...\)"),
    "workers that go on drawing": (
        {"batches": DataLoader(Labelled().x, batch_size=16, num_workers=1, persistent_workers=True), "checkpoint": "run.pt"},
        ValueError,
        "Leave persistent_workers out",
    ),
    "a Compressed": ({"teacher": Compressed(nn.ReLU(), None, None)}, TypeError, r"teacher is Compressed.*\.model"),  # type: ignore[arg-type]
    "settings": ({"settings": {"epochs": 1}}, TypeError, "settings are dict"),
    "features without a teacher": ({"settings": FineTune(features=1.0), "teacher": None}, ValueError, "there is no teacher"),
    "features without a block": (
        {"settings": FineTune(features=1.0), "teacher": nn.Sequential(nn.Conv2d(3, 4, 1))},
        ValueError,
        "no block around a cut layer",
    ),
    "another teacher": (
        {"teacher": nn.Sequential(nn.Flatten(), nn.Linear(192, 7))},
        ValueError,
        r"the network gives \[\(16, 4\)\] and the teacher \[\(16, 7\)\]",
    ),
    "a loss by image": (
        {"loss": lambda y, t: F.cross_entropy(y, t, reduction="none")},
        ValueError,
        r"loss gave \(16,\), expected a tensor of one number",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input(case: str, tmp_path: Path) -> None:
    dense, model, _ = cut_net()
    changed, error, message = BAD[case]
    keywords: dict[str, Any] = {"batches": Labelled(), "teacher": dense, **changed}
    if keywords["batches"] == "one shot":
        keywords["batches"] = one_shot(Labelled())
    if "checkpoint" in keywords:
        keywords["checkpoint"] = tmp_path / keywords["checkpoint"]
    before = weights(model)
    with pytest.raises(error, match=message):
        fine_tune(model, **keywords)
    if case != "score":
        assert same(weights(model), before)
    assert not list(tmp_path.iterdir())


def test_nothing_to_train_and_wrapped_models() -> None:
    dense, model, _ = cut_net()
    with pytest.raises(TypeError, match=r"Pass model\.module"):
        fine_tune(nn.DataParallel(model), Labelled(), teacher=dense)
    with pytest.raises(ValueError, match="nothing to train"):
        fine_tune(model.requires_grad_(False), Labelled(), teacher=dense)


def test_batches_without_a_length_or_an_end() -> None:
    """As many steps as were asked for, whatever `epochs` says; statistics from as many batches."""
    dense, model, _ = cut_net()

    class Unsized:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(Labelled())

    history = fine_tune(copy.deepcopy(model), Unsized(), teacher=dense, settings=FineTune(steps=20))
    assert [epoch.steps for epoch in history.epochs] == [6, 12, 18, 20]
    fine_tune(model, DataLoader(Endless(), batch_size=16), teacher=dense, settings=FineTune(steps=6, norms="late", lr=1e-5))
    with torch.no_grad():
        seen = model.get_submodule("block.conv")(torch.relu(model.get_submodule("stem")(Labelled().x)))  # six batches are all images
    torch.testing.assert_close(model.get_submodule("block.norm").running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_draws_of_samplers_and_callbacks_are_the_same_after_an_interruption(tmp_path: Path) -> None:
    """A batch sampler with a generator of its own; images with noise; a callback that draws whenever it is called."""
    dense, model, _ = cut_net()

    class Noisy(Dataset[Tensor]):
        def __len__(self) -> int:
            return 96

        def __getitem__(self, index: int) -> Tensor:
            return Labelled().x[index] + torch.randn(3, 8, 8)

    data = Noisy()

    def run(model: nn.Module, path: Path | None, stop: int, draws: bool) -> None:
        def watch(step: int, _values: Any) -> None:
            if draws:
                torch.randn(1)
                random.random()
            if step == stop:
                raise KeyboardInterrupt

        sampler = BatchSampler(RandomSampler(data, generator=torch.Generator().manual_seed(3)), 16, drop_last=False)
        loader = DataLoader(data, batch_sampler=sampler)
        fine_tune(model, loader, teacher=dense, settings=FineTune(epochs=3, save_every=4), checkpoint=path, callback=watch)

    undisturbed, again = copy.deepcopy(model), copy.deepcopy(model)
    run(undisturbed, None, 0, draws=False)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "run.pt", 9, draws=True)
    run(again, tmp_path / "run.pt", 0, draws=True)
    assert same(weights(again), weights(undisturbed))


def test_scores_may_be_tensors_and_labels_without_weight_anything() -> None:
    dense, model, _ = cut_net()
    nothing = [(x, torch.full_like(y, -1)) for x, y in Labelled()]
    history = fine_tune(
        model, nothing, teacher=dense, settings=FineTune(epochs=1, distill=1.0), validate=lambda m: m(Labelled().x).float().mean()
    )
    assert isinstance(history.epochs[0].score, float)
    assert history.epochs[0].labels is None


def test_classes_that_are_masked_out() -> None:
    """Logits of minus infinity in both networks: they count for nothing, to begin with and in training."""

    class Masked(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).masked_fill(torch.tensor([False, False, False, True]), -math.inf)

    torch.manual_seed(0)
    dense = Masked().eval()
    images = Labelled().x.split(16)
    small = compress(dense, images[0][:1], budget=Budget(params=0.6), calibration=images, include="block.conv")
    assert small.plan.cuts[0].damage is not None
    assert 1e-7 < small.plan.cuts[0].damage < 10
    found = compare(dense, small.model, images[0][:1], data=images).fidelity
    assert found is not None
    assert 0 < found.error < 1
    assert 0 < (found.divergence or 0) < 10
    history = fine_tune(small.model, images, teacher=dense, settings=FineTune(epochs=2))
    assert 0 < history.epochs[1].loss < 0.1


def test_gradients_of_before_are_not_taken_up() -> None:
    dense, model, _ = cut_net()
    twice = copy.deepcopy(model)
    twice(Labelled().x).square().sum().backward()
    for network in (model, twice):
        fine_tune(network, Labelled(), teacher=dense, settings=FineTune(epochs=1))
    assert same(weights(model), weights(twice))


def test_gradients_that_are_never_finite_end_a_run_in_float16() -> None:
    """The scaler skips such steps one by one: all of them are one too many."""
    dense, model, _ = cut_net()
    model.get_parameter("stem.weight").register_hook(lambda g: g * math.nan)
    with pytest.raises(FloatingPointError, match="gradient's norm nan"):
        fine_tune(model, Labelled(), teacher=dense, settings=FineTune(epochs=4, precision="float16"))


def test_an_iterator_will_do_for_one_epoch() -> None:
    dense, model, _ = cut_net()
    history = fine_tune(model, one_shot(Labelled()), teacher=dense, settings=FineTune(epochs=1, steps=4))
    assert history.epochs[0].steps == 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 0}, "epochs=0, expected a whole number"),
        ({"steps": 0}, "steps=0"),
        ({"lr": -1.0}, "lr=-1.0, expected a positive"),
        ({"lr": math.nan}, "lr=nan"),
        ({"distill": 1.5}, r"distill=1.5, expected a share"),
        ({"average": 1.0}, "average=1.0"),
        ({"mix": 1.1}, "mix=1.1"),
        ({"optimizer": "adam"}, "optimizer='adam', expected one of soap, adamw"),
        ({"norms": "free"}, "norms='free', expected one of frozen, late, trained"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"features": -1.0}, "features=-1.0"),
    ],
)
def test_settings_are_checked(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FineTune(**changed)


def test_checkpoints_of_other_runs_are_refused(tmp_path: Path) -> None:
    """Other settings, other weights to begin with, a file of something else: an error, and nothing changed."""
    dense, model, _ = cut_net()
    path = tmp_path / "run.pt"
    fine_tune(copy.deepcopy(model), Labelled(), teacher=dense, settings=FineTune(epochs=1), checkpoint=path)
    held = path.read_bytes()
    before = weights(model)
    with pytest.raises(ValueError, match="of another run"):
        fine_tune(model, Labelled(), teacher=dense, settings=FineTune(epochs=1, lr=2e-3), checkpoint=path)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_submodule("head").bias.add_(1)
    for network, teacher, changed in (
        (other, dense, {}),
        (model, other, {}),
        (model, dense, {"optimizer": lambda groups: torch.optim.SGD(groups)}),
    ):
        with pytest.raises(ValueError, match=r"of another run.*pass it as it was cut"):
            fine_tune(network, Labelled(), teacher=teacher, settings=FineTune(epochs=1), checkpoint=path, **changed)
    assert path.read_bytes() == held
    path.write_bytes(held[: len(held) // 2])
    with pytest.raises(ValueError, match="not a checkpoint of fine_tune"):
        fine_tune(model, Labelled(), teacher=dense, settings=FineTune(epochs=1), checkpoint=path)
    assert same(weights(model), before)


TWO = """
import sys, torch
sys.path[:0] = sys.argv[1:3]
import torch.distributed as dist
import test_finetune as t
from dsconv_surgery import Calibration, FineTune, fine_tune
from dsconv_surgery.calibration import reconstruct
from dsconv_surgery.calibration.images import Images
from dsconv_surgery.surgery import cut_calibrated
from torch.utils.checkpoint import checkpoint
if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")
dense, model, plan = t.cut_net(schemes="channel")  # in closed form: no search that magnifies the last bits
images = Images(Calibration(list(t.Labelled(95, 20)), patches=2**22), ((1, 3, 8, 8),))
reconstruct.output_metrics = lambda *_: {}  # its random draws depend on how the images are split
calibrated, errors = cut_calibrated(dense, plan, images, {}, False)
losses = [e.loss for e in fine_tune(model, t.Labelled(95, 20), teacher=dense, settings=FineTune(epochs=3, accumulate=2, mix=0.7)).epochs]
def network():
    model = t.cut_net(schemes="channel")[1]
    forward = model.block.forward
    model.block.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    return model
settings = FineTune(epochs=3, accumulate=2, norms="trained", optimizer="adamw", lr=1e-3, save_every=2)  # the last batch is one image
rank = dist.get_rank() if dist.is_initialized() else 0
def stop(step, values):
    if step == 4:
        raise KeyboardInterrupt
run = lambda model, **keywords: fine_tune(
    model, t.Labelled(81, 20), teacher=dense, settings=settings, checkpoint=sys.argv[3] + f"/{rank}.pt", **keywords
)
try:
    run(network(), callback=stop)
except KeyboardInterrupt:
    pass
model = network()
losses += [e.loss for e in run(model).epochs]  # the first process's file counts: only that one has any
losses += [float(value.double().norm()) for name, value in model.state_dict().items() if "running" in name]
if not dist.is_initialized() or dist.get_rank() == 0:
    print(*errors.values(), *(float(p.double().norm()) for p in calibrated.state_dict().values()))
    print(*losses)
if dist.is_initialized():
    dist.destroy_process_group()
"""


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    """gloo, shares of unlike size: calibrated on half of the images each to the same factors, tuned with the same losses to 1e-5."""
    script = tmp_path / "two.py"
    script.write_text(TWO)
    arguments = [str(script), str(ROOT / "tests"), str(ROOT / "examples")]
    (tmp_path / "alone").mkdir()
    alone = subprocess.run([sys.executable, *arguments, str(tmp_path / "alone")], check=True, capture_output=True, text=True).stdout
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments, str(tmp_path)]
    strict = {**os.environ, "PYTHONWARNINGS": "error::FutureWarning"}
    together = subprocess.run(launch, check=True, capture_output=True, text=True, env=strict).stdout
    one, two = ([[float(number) for number in line.split()] for line in printed.splitlines()[-2:]] for printed in (alone, together))
    assert len(one[1]) == 8
    assert two[0] == pytest.approx(one[0], rel=1e-3)
    assert two[1] == pytest.approx(one[1], rel=1e-5)


def test_the_distributed_example_runs_alone() -> None:
    command = [sys.executable, str(ROOT / "examples" / "finetune_distributed.py"), "--images", "256", "--epochs", "1"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "accuracy on 1,000 test images" in printed
