"""Fine-tuning: the loss, what stays unchanged, and resuming after any interruption."""

from __future__ import annotations

import contextlib
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
from dsconv_surgery.finetuning.batches import can_mix, mix_images
from dsconv_surgery.finetuning.history import History
from dsconv_surgery.finetuning.loop import synchronized_batchnorm
from dsconv_surgery.finetuning.loss import DistillationLoss
from dsconv_surgery.finetuning.optimizers import learning_rate_factor
from dsconv_surgery.support import distributed
from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.outputs import OutputSelector

ROOT = Path(__file__).resolve().parents[2]


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
    """Images of four classes in batches, always in the same order."""

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
    """Images one by one, without a length and without an end."""

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


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_accuracy_rises_on_real_images() -> None:
    """One epoch on 2,560 images, after a hard cut without calibration."""
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


def test_a_user_defined_loss_and_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.layer(a + b)

    a, b = torch.randn(32, 3), torch.randn(32, 3)
    target, mask = torch.randn(32, 2), torch.ones(32, 2)
    batches = [(a, b, target, mask)] * 5

    def squares(outputs: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return ((outputs - target) * mask).square().mean()

    history = fine_tune(Two(), batches, loss=squares, inputs=2, settings=FineTune(epochs=5, lr=0.1))
    assert history.epochs[-1].loss < history.epochs[0].loss


def test_the_loss_follows_its_formula() -> None:
    """0.3 labels + 0.7 T^2 KL(softmax(z / T) | softmax(y / T)); with outputs that are maps, |y - z|^2 / |z|^2."""
    dense, model, _ = cut_net()
    x, y = next(iter(Labelled()))
    with torch.no_grad():
        model.get_parameter("head.weight").mul_(3)  # outputs that differ clearly
        loss = DistillationLoss(dense, None, 0.7, 3.0, OutputSelector())
        outputs, targets = model(x), dense(x)
        total, parts = loss(outputs, loss.teacher_outputs(Inputs(x)), (y,))
    p, q = (targets / 3).softmax(1), (outputs / 3).softmax(1)
    divergence = 9 * (p * (p / q).log()).sum(1).mean()
    labels = F.cross_entropy(outputs, y)
    assert float(parts["teacher"]) == pytest.approx(float(divergence), rel=1e-4)
    assert float(parts["labels"]) == pytest.approx(float(labels), rel=1e-4)
    assert float(total) == pytest.approx(float(0.3 * labels + 0.7 * divergence), rel=1e-4)
    outputs, targets = torch.randn(2, 5, 4, 4), torch.randn(2, 5, 4, 4)
    error = (outputs - targets).square().sum() / targets.square().sum()
    assert float(loss(outputs, targets, ())[0]) == pytest.approx(float(error), rel=1e-5)


def test_images_are_mixed() -> None:
    """Mixup gives k x + (1 - k) x', CutMix a rectangle of x' with 1 - k of the area; the labels are weighted by k and 1 - k."""
    x, y = torch.rand(6, 3, 20, 20), torch.arange(6)
    torch.manual_seed(0)
    kinds: set[bool] = set()
    for _ in range(20):
        (mix, first, second), k = mix_images((x, y), 1, 1.0)
        other = x[second]
        assert torch.equal(first, y)
        assert sorted(second.tolist()) == y.tolist()
        replaced = (mix == other) & (other != x)
        blended = k * x + (1 - k) * other
        kinds.add(torch.equal(mix, blended))
        if torch.equal(mix, blended):
            continue
        mask = replaced.any(0).any(0)
        assert torch.equal(mix, torch.where(mask, other, x))
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns)
        for edge in (rows, columns):
            assert float(edge.diff().sum()) <= 2  # in one piece
            assert int(edge.sum()) == pytest.approx(20 * math.sqrt(1 - k), abs=0.51)
    assert kinds == {True, False}
    assert mix_images((x, y), 1, 0.0)[0][0] is x
    assert can_mix((x, y), 1)
    assert not any(can_mix(items, 1) for items in ((), (y, y), (x, y[0]), (x, y[:5]), (x, [y]), ("words", y)))
    outputs = torch.randn(6, 4)
    loss, _ = DistillationLoss(None, F.mse_loss, 0.0, 1.0, OutputSelector())(outputs, None, (outputs + 1, outputs + 3), 0.25)
    assert float(loss) == pytest.approx(0.25 * 1 + 0.75 * 9)


def test_batches_that_cannot_be_mixed_stay_as_they_are() -> None:
    """The target is one number for the whole batch: by default nothing is mixed, and the loss is that of the unmixed images."""
    dense, model, _ = cut_net()
    x, _ = next(iter(Labelled()))
    with torch.no_grad():
        expected = float((model(x).mean() - 2.0).square())
    settings = FineTune(epochs=1, distill=0.0)
    history = fine_tune(model, [(x, torch.tensor(2.0))], teacher=dense, loss=lambda y, t: (y.mean() - t).square(), settings=settings)
    assert history.epochs[0].loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("batchnorm", ["frozen", "trained"])
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path, batchnorm: Any, accumulate: int) -> None:
    """With dropout, shuffling and a best score, stopped at several steps, also between checkpoints: bit for bit the same."""
    dense, model, _ = cut_net(dropout=0.3)
    data = Labelled()
    shuffled = DataLoader(TensorDataset(data.x, data.y), batch_size=10, shuffle=True)
    settings = FineTune(epochs=3, batchnorm=batchnorm, accumulate=accumulate, mix=0.5, save_every=4)

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
        torch.manual_seed(stop)  # draws between the two runs do not matter
        history = run(again, path, None)
        assert same(weights(again), weights(undisturbed))
        assert same(history.weights["best"], expected.weights["best"])
        assert [(e.loss, e.score) for e in history.epochs] == [(e.loss, e.score) for e in expected.epochs]
    once_more = copy.deepcopy(model)
    assert [e.loss for e in run(once_more, path, 1).epochs] == [e.loss for e in expected.epochs]  # nothing left to do
    assert same(weights(once_more), weights(undisturbed))


KILLED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_fine_tune as t
dense, model, _ = t.cut_net(dropout=0.3)
def report(step, values):
    print(step, flush=True)
t.fine_tune(model, t.Labelled(), teacher=dense, settings=t.FineTune(epochs=4, save_every=1), checkpoint=sys.argv[2], callback=report)
torch.save(model.state_dict(), sys.argv[3])
"""


def test_a_killed_process_resumes(tmp_path: Path) -> None:
    """kill -9, with a checkpoint after every step."""
    dense, model, _ = cut_net(dropout=0.3)
    fine_tune(model, Labelled(), teacher=dense, settings=FineTune(epochs=4, save_every=1))
    end = tmp_path / "end.pt"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'examples')!r}){KILLED}", str(Path(__file__).parent)]
    command += [str(tmp_path / "run.pt"), str(end)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 7:
                process.kill()
                break
    assert not end.exists()
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert 6 < int(printed[0]) < 24  # not from the start
    assert same(torch.load(end, weights_only=True), weights(model))


@pytest.mark.parametrize("generator", [None, 5])
def test_a_seed_gives_the_same_weights(generator: int | None) -> None:
    """Earlier draws do not matter, nor a DataLoader's generator; another seed gives other weights."""
    dense, model, _ = cut_net(dropout=0.3)
    data = Labelled()
    own = None if generator is None else torch.Generator().manual_seed(generator)
    loader = DataLoader(TensorDataset(data.x, data.y), batch_size=16, shuffle=True, generator=own)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(random.randrange(1000))
        trained = copy.deepcopy(model)
        fine_tune(trained, loader, teacher=dense, settings=FineTune(epochs=2, seed=seed))
        results.append(weights(trained))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_what_stays_unchanged() -> None:
    """The teacher, parameters that require no gradient, training flags, random states and gradients."""
    dense, model, _ = cut_net()
    model.get_submodule("stem").requires_grad_(False)
    model.get_submodule("block").train()
    flags = [m.training for m in model.modules()]
    teacher, stem = weights(dense), weights(model.get_submodule("stem"))
    dense.train()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    fine_tune(model, Labelled(), teacher=dense, settings=FineTune(epochs=1))
    assert same(weights(dense), teacher)
    assert dense.training
    assert same(weights(model.get_submodule("stem")), stem)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert all(p.grad is None for p in model.parameters())


def test_batchnorm_statistics() -> None:
    """Frozen statistics stay and trained ones move; weights of BatchNorms are trained in both cases."""
    dense, model, _ = cut_net()
    start: Any = model.get_submodule("block.norm")
    for batchnorm in ("frozen", "trained"):
        trained = copy.deepcopy(model)
        fine_tune(trained, Labelled(), teacher=dense, settings=FineTune(epochs=2, batchnorm=batchnorm, lr=1e-2))
        norm: Any = trained.get_submodule("block.norm")
        assert torch.equal(norm.running_mean, start.running_mean) == (batchnorm == "frozen")
        assert not torch.equal(norm.weight, start.weight)


def test_synchronized_batchnorm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same module objects become nn.SyncBatchNorm and plain BatchNorms again, also after an error; frozen ones stay plain."""
    monkeypatch.setattr(distributed, "process_and_world_size", lambda: (0, 2))
    monkeypatch.setattr("dsconv_surgery.finetuning.loop.model_device", lambda _: torch.device("cuda"))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4).eval()), nn.BatchNorm2d(4))
    modules, attributes, before = list(model.modules()), [list(vars(m)) for m in model.modules()], str(model)
    with contextlib.suppress(KeyboardInterrupt), synchronized_batchnorm(model):
        assert [type(m) is nn.SyncBatchNorm for m in model.modules()] == [False, False, True, False, False, True]
        model(torch.rand(2, 3, 4, 4))  # without a process group there is nothing to synchronise
        raise KeyboardInterrupt
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert str(model) == before
    assert [list(vars(m)) for m in model.modules()] == attributes
    assert bool(model[1].running_mean.any())
    assert not model[2][0].running_mean.any()


def test_batchnorms_that_several_processes_cannot_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, and where the class adds something; nothing was changed."""

    class Activated(nn.BatchNorm2d):
        pass

    monkeypatch.setattr(distributed, "process_and_world_size", lambda: (0, 2))
    plain, subclass = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), nn.Sequential(nn.BatchNorm2d(4), Activated(4))
    with pytest.raises(ValueError, match=r'0 \(BatchNorm2d on cpu\).*FineTune\(batchnorm="frozen"\).*or run one process'):
        synchronized_batchnorm(plain).__enter__()
    monkeypatch.setattr("dsconv_surgery.finetuning.loop.model_device", lambda _: torch.device("cuda"))
    with pytest.raises(ValueError, match=r"1 \(Activated on cuda\)"):
        synchronized_batchnorm(subclass).__enter__()
    assert type(subclass[0]) is nn.BatchNorm2d


def test_accumulated_batches_are_one_large_one() -> None:
    """In float64, two batches of 16 give the same weights as one of 32, also where the last pair is incomplete."""
    dense, model, _ = cut_net()
    dense, model = dense.double(), model.double()
    results = []
    for size, accumulate in ((32, 1), (16, 2)):
        data = Labelled(80, size)
        batches = [(x.double(), y) for x, y in data]
        trained = copy.deepcopy(model)
        fine_tune(trained, batches, teacher=dense, settings=FineTune(epochs=2, accumulate=accumulate, mix=0.0, optimizer="adamw"))
        results.append(weights(trained))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("settings", [{"precision": "bfloat16"}, {"precision": "float16"}, {"channels_last": True}], ids=str)
def test_precision_and_memory_format(settings: dict[str, Any]) -> None:
    _, model, _ = cut_net()
    history = fine_tune(model, Labelled(), settings=FineTune(epochs=8, lr=3e-3, **settings))
    assert history.epochs[-1].labels < 0.9 * history.epochs[0].labels
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_the_schedule() -> None:
    """It rises linearly in the warm-up and falls along half a cosine; the callback gets it."""
    assert [learning_rate_factor(step, 20, 0.2) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert learning_rate_factor(4, 20, 0.2) == pytest.approx(1.0)
    assert learning_rate_factor(12, 20, 0.2) == pytest.approx(0.5)
    dense, model, _ = cut_net()
    rates: dict[int, float] = {}
    fine_tune(
        model,
        Labelled(),
        teacher=dense,
        settings=FineTune(epochs=2, lr=0.01, warmup=0.25),
        callback=lambda step, values: rates.update({step: values["lr"]}) if "lr" in values else None,
    )
    assert list(rates) == list(range(1, 13))
    assert list(rates.values()) == pytest.approx([0.01 * learning_rate_factor(step, 12, 0.25) for step in range(12)])


def test_best_and_last_weights() -> None:
    dense, model, _ = cut_net()
    scores = iter([1.0, 0.1, 0.9, 0.5])  # the first before training
    validated: list[dict[str, Tensor]] = []

    def validate(m: nn.Module) -> float:
        assert not any(module.training for module in m.modules())
        validated.append(weights(m))
        return next(scores)

    history = fine_tune(model, Labelled(), teacher=dense, validate=validate, settings=FineTune(epochs=3))
    assert history.before == 1.0
    assert history.best is not None
    assert history.best.epoch == 2
    assert same(history.weights["best"], validated[2])
    assert same(history.weights["last"], validated[3])
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
    saved: dict[int, dict[str, Tensor]] = {0: weights(model)}

    def spoil(step: int, _values: Any) -> None:
        saved[step] = weights(model)
        if poisoned == "weight" and step == 4:
            with torch.no_grad():
                model.get_submodule("stem").weight.mul_(math.inf)

    with pytest.raises(FloatingPointError, match=r"at step 5 of 6 the loss is nan.*has the weights after step 3 again"):
        fine_tune(model, batches, teacher=dense, settings=FineTune(epochs=1, save_every=3), callback=spoil)
    assert same(weights(model), saved[3])
    assert all(p.grad is None for p in model.parameters())


def one_shot(batches: Any) -> Iterator[Any]:
    yield from batches


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "iterator": ({"batches": "one shot"}, ValueError, "found an iterator.*3 epochs iterate over the batches again"),
    "iterator to resume with": (
        {"batches": "one shot", "settings": FineTune(epochs=1, steps=3), "checkpoint": "run.pt"},
        ValueError,
        "a run resumed from its checkpoint iterates over the batches again",
    ),
    "tensor": ({"batches": torch.rand(4, 3, 8, 8)}, ValueError, "found a tensor"),
    "no batches": ({"batches": []}, ValueError, "no batches"),
    "not iterable": ({"batches": 3}, TypeError, "found int"),
    "no length": ({"batches": type("Endless", (), {"__iter__": lambda self: iter(Labelled())})()}, ValueError, r"FineTune\(steps=...\)"),
    "another part of the data in each process": (
        {"batches": DataLoader(Labelled().x, batch_size=16, sampler=DistributedSampler(Labelled().x, num_replicas=2, rank=0))},
        ValueError,
        "found a DistributedSampler.*Use shuffle=True instead",
    ),
    "no labels, no teacher": (
        {"batches": [torch.rand(4, 3, 8, 8)], "teacher": None},
        ValueError,
        "holds no labels, and there is no teacher",
    ),
    "an empty batch": ({"batches": [()]}, ValueError, "a batch holds nothing, expected 1 input"),
    "batches that cannot be mixed": (
        {"batches": [(torch.rand(4, 3, 8, 8), torch.tensor(1))], "settings": FineTune(mix=0.5)},
        ValueError,
        r"mix=0.5, but a batch of Tensor, Tensor cannot be mixed.*Leave mix out",
    ),
    "strings": ({"batches": ["a"]}, ValueError, "a batch holds str"),
    "score": ({"validate": lambda _: math.nan}, ValueError, "validate: found nan"),
    "no length after all": ({"batches": DataLoader(Endless(), batch_size=16)}, ValueError, r"FineTune\(steps=...\)"),
    "workers that outlive an epoch": (
        {"batches": DataLoader(Labelled().x, batch_size=16, num_workers=1, persistent_workers=True), "checkpoint": "run.pt"},
        ValueError,
        "Leave out persistent_workers",
    ),
    "a Compressed": (
        {"teacher": Compressed(nn.ReLU(), None, None)},
        TypeError,
        r"teacher: expected an nn.Module, found Compressed\. Pass its \.model\.",
    ),  # type: ignore[arg-type]
    "settings": ({"settings": {"epochs": 1}}, TypeError, "settings are dict"),
    "another teacher": (
        {"teacher": nn.Sequential(nn.Flatten(), nn.Linear(192, 7))},
        ValueError,
        r"the shapes \[\(16, 7\)\] and \[\(16, 4\)\]\.",
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
    """The number of steps is `steps`, and `epochs` is ignored."""
    dense, model, _ = cut_net()

    class Unsized:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(Labelled())

    history = fine_tune(copy.deepcopy(model), Unsized(), teacher=dense, settings=FineTune(steps=20))
    assert [epoch.steps for epoch in history.epochs] == [6, 12, 18, 20]
    endless = fine_tune(model, DataLoader(Endless(), batch_size=16), teacher=dense, settings=FineTune(steps=7))
    assert [epoch.steps for epoch in endless.epochs] == [7]


def test_draws_of_samplers_and_callbacks_are_the_same_after_an_interruption(tmp_path: Path) -> None:
    """A batch sampler with a generator, images with noise, and a callback that draws."""
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


def test_scores_may_be_tensors_and_unused_labels_may_be_invalid() -> None:
    dense, model, _ = cut_net()
    invalid = [(x, torch.full_like(y, -1)) for x, y in Labelled()]
    history = fine_tune(
        model, invalid, teacher=dense, settings=FineTune(epochs=1, distill=1.0), validate=lambda m: m(Labelled().x).float().mean()
    )
    assert isinstance(history.epochs[0].score, float)
    assert history.epochs[0].labels is None


def test_classes_that_are_masked_out() -> None:
    """Logits that are minus infinity in both networks add nothing, neither when measured nor in training."""

    class Masked(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).masked_fill(torch.tensor([False, False, False, True]), -math.inf)

    torch.manual_seed(0)
    dense = Masked().eval()
    images = Labelled().x.split(16)
    small = compress(dense, images[0][:1], budget=Budget(params=0.6), calibration=images, include="block.conv")
    assert small.plan.cuts[0].damage is not None
    assert 1e-7 < small.plan.cuts[0].damage < 10
    fidelity = compare(dense, small.model, images[0][:1], data=images).fidelity
    assert fidelity is not None
    assert 0 < fidelity.error < 1
    assert 0 < (fidelity.divergence or 0) < 10
    history = fine_tune(small.model, images, teacher=dense, settings=FineTune(epochs=2))
    assert 0 < history.epochs[1].loss < 0.1


def test_earlier_gradients_are_ignored() -> None:
    dense, model, _ = cut_net()
    twice = copy.deepcopy(model)
    twice(Labelled().x).square().sum().backward()
    for network in (model, twice):
        fine_tune(network, Labelled(), teacher=dense, settings=FineTune(epochs=1))
    assert same(weights(model), weights(twice))


def test_gradients_that_are_never_finite_end_a_run_in_float16() -> None:
    """The scaler skips single steps whose gradient is not finite; a run of them is an error."""
    dense, model, _ = cut_net()
    model.get_parameter("stem.weight").register_hook(lambda g: g * math.nan)
    with pytest.raises(FloatingPointError, match="norm of its gradient nan"):
        fine_tune(model, Labelled(), teacher=dense, settings=FineTune(epochs=4, precision="float16"))


def test_an_iterator_is_enough_for_one_epoch() -> None:
    dense, model, _ = cut_net()
    history = fine_tune(model, one_shot(Labelled()), teacher=dense, settings=FineTune(epochs=1, steps=4))
    assert history.epochs[0].steps == 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 0}, "epochs=0: expected a whole number, 1 or more"),
        ({"epochs": True}, "epochs=True: expected a whole number, 1 or more"),
        ({"steps": 0}, "steps=0: expected a whole number, 1 or more, or None"),
        ({"lr": -1.0}, "lr=-1.0: expected a positive number"),
        ({"lr": math.inf}, "lr=inf: expected a positive number"),
        ({"lr": math.nan}, "lr=nan"),
        ({"distill": 1.5}, r"distill=1.5: expected a share in \[0, 1\]"),
        ({"mix": 1.1}, "mix=1.1: expected a share"),
        ({"optimizer": "adam"}, 'optimizer=\'adam\': expected "soap" or "adamw"'),
        ({"batchnorm": "late"}, 'batchnorm=\'late\': expected "frozen" or "trained"'),
        ({"norms": "trained"}, "norms='trained': there is no such setting. Known: .*batchnorm"),
        ({"clip": 0.0}, "clip=0.0: expected a positive number, or None"),
        ({"clip": math.nan}, "clip=nan: expected a positive number, or None"),
        ({"epoch": 3}, "epoch=3: there is no such setting. Did you mean 'epochs'"),
    ],
)
def test_settings_are_checked(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FineTune(**changed)


def test_checkpoints_of_other_runs_are_refused(tmp_path: Path) -> None:
    """Other settings, other initial weights or another kind of file are errors, and nothing changes."""
    dense, model, _ = cut_net()
    path = tmp_path / "run.pt"
    fine_tune(copy.deepcopy(model), Labelled(), teacher=dense, settings=FineTune(epochs=1), checkpoint=path)
    content = path.read_bytes()
    before = weights(model)
    with pytest.raises(ValueError, match="of another run"):
        fine_tune(model, Labelled(), teacher=dense, settings=FineTune(epochs=1, lr=2e-3), checkpoint=path)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_submodule("head").bias.add_(1)
    for network, teacher, changed in (
        (other, dense, {}),
        (model, other, {}),
        (model, dense, {"optimizer": torch.optim.SGD}),
    ):
        with pytest.raises(ValueError, match=r"of another run.*pass the network as it was cut"):
            fine_tune(network, Labelled(), teacher=teacher, settings=FineTune(epochs=1), checkpoint=path, **changed)
    assert path.read_bytes() == content
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="the checkpoint is damaged"):
        fine_tune(model, Labelled(), teacher=dense, settings=FineTune(epochs=1), checkpoint=path)
    assert same(weights(model), before)


TWO = """
import sys, torch
sys.path[:0] = sys.argv[1:3]
import torch.distributed as dist
import test_fine_tune as t
from dsconv_surgery import Calibration, FineTune, fine_tune
from dsconv_surgery.calibration import reconstruct
from dsconv_surgery.calibration.images import Images
from dsconv_surgery.surgery import cut_calibrated
from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.outputs import OutputSelector
from dsconv_surgery.support.progress import Progress
from torch.utils.checkpoint import checkpoint
if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")
dense, model, plan = t.cut_net(schemes="channel")  # a closed form: an iterative fit would magnify differences in the last bits
images = Images(Calibration(list(t.Labelled(95, 20)), patches=2**22), Inputs(torch.empty(1, 3, 8, 8)))
reconstruct.output_metrics = lambda *_: {}  # its random draws depend on how the images are split
calibrated, errors = cut_calibrated(dense, plan, images, {}, Progress(False), None)
losses = [e.loss for e in fine_tune(model, t.Labelled(95, 20), teacher=dense, settings=FineTune(epochs=3, accumulate=2, mix=0.7)).epochs]
def network():
    model = t.cut_net(schemes="channel")[1]
    forward = model.block.forward
    model.block.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    return model
settings = FineTune(epochs=3, accumulate=2, optimizer="adamw", lr=1e-3, save_every=2)  # the last batch is one image
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
losses += [e.loss for e in run(model).epochs]  # only the first process has a checkpoint
losses += [float(value.double().norm()) for name, value in model.state_dict().items() if "norm" in name and value.ndim]
try:
    fine_tune(model, t.Labelled(81, 20), teacher=dense, settings=FineTune(steps=1, batchnorm="trained"))
    assert not dist.is_initialized()
except ValueError as error:
    assert 'block.norm (BatchNorm2d on cpu)' in str(error) and 'Set FineTune(batchnorm="frozen")' in str(error)
if not dist.is_initialized() or dist.get_rank() == 0:
    print(*errors.values(), *(float(p.double().norm()) for p in calibrated.state_dict().values()))
    print(*losses)
if dist.is_initialized():
    dist.destroy_process_group()
"""


def test_two_processes_give_the_result_of_one(tmp_path: Path) -> None:
    """gloo, parts of unequal size: calibration gives the same factors, and fine-tuning the same losses to 1e-5."""
    script = tmp_path / "two.py"
    script.write_text(TWO)
    arguments = [str(script), str(Path(__file__).parent), str(ROOT / "examples")]
    (tmp_path / "alone").mkdir()
    alone = subprocess.run([sys.executable, *arguments, str(tmp_path / "alone")], check=True, capture_output=True, text=True).stdout
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments, str(tmp_path)]
    strict = {**os.environ, "PYTHONWARNINGS": "error::FutureWarning"}
    together = subprocess.run(launch, check=True, capture_output=True, text=True, env=strict).stdout
    expected, results = ([[float(number) for number in line.split()] for line in text.splitlines()[-2:]] for text in (alone, together))
    assert len(expected[1]) == 10
    assert results[0] == pytest.approx(expected[0], rel=1e-3)
    assert results[1] == pytest.approx(expected[1], rel=1e-5)


ON_CUDA = """
import sys, torch
sys.path[:0] = sys.argv[1:3]
import torch.distributed as dist
import test_fine_tune as t
if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")  # nccl would need a device for each process
dense, model, _ = t.cut_net(schemes="channel")
dense, model, norm = dense.cuda(), model.cuda(), model.block.norm
settings = t.FineTune(epochs=2, batchnorm="trained", optimizer="adamw", lr=1e-3)
history = t.fine_tune(model, t.Labelled(95, 20), teacher=dense, settings=settings)
assert model.block.norm is norm and type(norm) is torch.nn.BatchNorm2d
if not dist.is_initialized() or dist.get_rank() == 0:
    print(*(e.loss for e in history.epochs), *(float(value.double().norm()) for value in norm.state_dict().values()))
if dist.is_initialized():
    dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="nn.SyncBatchNorm needs CUDA")
def test_two_processes_on_cuda_train_batchnorm(tmp_path: Path) -> None:
    """Statistics are those of the whole batch: the same losses and statistics as in one process."""
    script = tmp_path / "cuda.py"
    script.write_text(ON_CUDA)
    arguments = [str(script), str(Path(__file__).parent), str(ROOT / "examples")]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    results = []
    for options in ([], launch):
        printed = subprocess.run([sys.executable, *options, *arguments], check=True, capture_output=True, text=True).stdout
        results.append([float(number) for number in printed.split()])
    assert results[1] == pytest.approx(results[0], rel=1e-4)


def test_the_distributed_example_runs_in_one_process() -> None:
    command = [sys.executable, str(ROOT / "examples" / "finetune_distributed.py"), "--images", "256", "--epochs", "1"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "accuracy on 1,000 test images" in printed


class Keywords(nn.Module):
    """A network with a keyword argument, as those of Hugging Face."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.net(pixel_values)


@pytest.mark.parametrize(
    "batch",
    [
        {"pixel_values": torch.rand(2, 3, 8, 8), "labels": torch.zeros(2)},
        [{"pixel_values": torch.rand(2, 3, 8, 8)}, torch.zeros(2)],
        ([torch.rand(3, 8, 8), torch.rand(3, 8, 8)], torch.zeros(2)),
        (Inputs(images=torch.rand(2, 3, 8, 8)), torch.zeros(2)),
    ],
)
def test_batches_that_the_network_does_not_take_are_refused_with_the_remedy(batch: Any) -> None:
    model = Keywords()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"fine_tune: the network does not run on the Inputs\(.*[Pp]ass prepare=") as caught:
        fine_tune(model, [batch], teacher=copy.deepcopy(model))
    assert isinstance(caught.value.__cause__, TypeError | AttributeError)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


LABELS = torch.zeros(2, dtype=torch.int64)
UNFIT_IMAGES = {
    "uint8": (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"\(2, 3, 8, 8\) torch\.uint8\) of a batch in step 1: RuntimeError: Input type"),
    "float64": (torch.zeros(2, 3, 8, 8, dtype=torch.float64), r"\(2, 3, 8, 8\) torch\.float64\) .*Input type \(double\)"),
    "channels": (torch.zeros(2, 5, 8, 8), r"\(2, 5, 8, 8\) torch\.float32\) .*expected input\[2, 5, 8, 8\] to have 3 channels"),
}


@pytest.mark.parametrize("kind", UNFIT_IMAGES)
def test_images_of_a_wrong_type_or_shape_are_refused_with_the_reason(kind: str) -> None:
    images, message = UNFIT_IMAGES[kind]
    for teacher in (None, Net()):
        with pytest.raises(ValueError, match=f"does not run on the Inputs.{message}.*Make batches of the type"):
            fine_tune(Net(), [(images, LABELS)], teacher=teacher)
    message = r"in step 2: .* It ran on the Inputs\(\(2, 3, 8, 8\) torch\.float32\) before\."
    with pytest.raises(ValueError, match=message):
        fine_tune(Net(), [(torch.rand(2, 3, 8, 8), LABELS), (images, LABELS)])


def test_an_error_that_is_not_of_the_batch_stays_as_it_is() -> None:
    """The same inputs ran before, or the memory is full."""
    model, calls = Net(), itertools.count()

    def fail(at: int, error: Exception) -> None:
        if next(calls) == at:
            raise error

    batch = (torch.rand(2, 3, 8, 8), LABELS)
    handle = model.register_forward_pre_hook(lambda *_: fail(1, RuntimeError("its error")))
    with pytest.raises(RuntimeError, match=r"^its error$"):
        fine_tune(model, [batch, batch])
    handle.remove()
    model.register_forward_pre_hook(lambda *_: fail(2, torch.OutOfMemoryError("no memory")))
    with pytest.raises(torch.OutOfMemoryError):
        fine_tune(model, [batch])


@pytest.mark.parametrize("teacher", [False, True])
def test_the_remedy_for_a_dict_has_the_keys_of_the_dict(teacher: bool) -> None:
    batch = {"id": 3, "image": torch.rand(2, 3, 8, 8), "fine_label": LABELS}
    hint = r"Pass prepare=.*, as in prepare=lambda batch: \(batch\['image'\], batch\['fine_label'\]\)\.$"
    with pytest.raises(ValueError, match=hint):
        fine_tune(Net(), [batch], teacher=Net() if teacher else None)
    with pytest.raises(ValueError, match=r"calibration: batch 0: .*" + hint):
        compress(Net(), torch.rand(1, 3, 8, 8), calibration=[batch])
    fine_tune(Net(), [batch], prepare=lambda batch: (batch["image"], batch["fine_label"]), settings=FineTune(epochs=1))
