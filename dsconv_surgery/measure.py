"""What a network costs, counted and timed: parameters, MACs, latency. Imports nothing of ours."""

from __future__ import annotations

import copy
import math
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode


def count_params(model: nn.Module) -> int:
    """All parameters; one that is shared counts once."""
    return sum(p.numel() for p in model.parameters())


def loose_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Buffers, and tensors that modules hold as plain attributes, as old-style weight norm does with the weights that it computes."""
    yield from model.buffers()
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


def detached(model: nn.Module) -> dict[int, Any]:
    """A memo for copy.deepcopy, which refuses tensors that autograd computed: copies of those that the model holds."""
    return {id(t): t.detach().clone() for t in loose_tensors(model) if not t.is_leaf}


def fake_copy(model: nn.Module, inputs: Sequence[Any]) -> tuple[FakeTensorMode, nn.Module, tuple[Any, ...]]:
    """The model and its inputs with fake tensors for data: shapes run through it, no memory is taken and nothing is computed."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors: dict[int, Any] = {
        id(t): mode.from_tensor(t if t.is_leaf else t.detach()) for t in chain(model.parameters(), loose_tensors(model))
    }
    fake_inputs = pytree.tree_map_only(Tensor, mode.from_tensor, tuple(inputs))
    return mode, copy.deepcopy(model, tensors), fake_inputs


@contextmanager
def draws_kept() -> Iterator[None]:
    """Random states are at the end what they were: torch's on every device, Python's and NumPy's."""
    drawn, drawn_too = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(drawn)
        np.random.set_state(drawn_too)


def log_softmax(logits: Tensor) -> Tensor:
    """Of each row; finite also where a logit is minus infinity, so that `p (log p - log q)` is 0 for classes that are masked out."""
    return logits.log_softmax(1).clamp(min=-1e30)


def comparable(wanted: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of both but for those that are the same infinity, such as what is masked out."""
    where = ~(wanted.isinf() & (wanted == given))
    return wanted[where].double(), given[where].double()


def count_macs(run: Callable[[], Any]) -> int:
    """Multiply-accumulates of everything that `run` computes, functional matrix products included (torch's flop counter halved)."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


@dataclass(frozen=True)
class Conditions:
    """What a time holds for."""

    threads: int
    batch: int
    dtype: str
    device: str
    memory_format: str

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.threads} threads, {self.dtype}, {self.memory_format}, {self.device}"


@dataclass(frozen=True)
class Latency:
    """Median milliseconds of whole forward passes, taken in turn, the conditions that they hold for, and what a plan foresaw."""

    before: float
    after: float
    conditions: Conditions
    rounds: int
    predicted: float | None = None

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}


def conditions(inputs: Sequence[Any]) -> Conditions:
    """The inputs' device, dtype, batch and memory format, and torch's current thread count."""
    first = next(t for t in pytree.tree_leaves(tuple(inputs)) if isinstance(t, Tensor))
    channels_last = first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last) and not first.is_contiguous()
    return Conditions(
        threads=torch.get_num_threads(),
        batch=first.shape[0] if first.ndim else 1,
        dtype=str(first.dtype).removeprefix("torch."),
        device=str(first.device),
        memory_format="channels_last" if channels_last else "contiguous",
    )


def in_channels_last(model: nn.Module, inputs: Sequence[Any]) -> tuple[nn.Module, tuple[Any, ...]]:
    """A copy of the model, and the inputs, with 4-D tensors in torch.channels_last."""

    def turned(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t

    copied, last = copy.deepcopy(model, detached(model)), pytree.tree_map_only(Tensor, turned, tuple(inputs))
    for tensor in chain(copied.parameters(), copied.buffers()):
        tensor.data = turned(tensor.data)
    return copied, last


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every module has the training flag that it had."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


@dataclass(frozen=True)
class Fidelity:
    """How near a network's outputs are to another's on some images.

    `error` is the squared relative error of all outputs; for classifiers - one output, (images, classes) - `agreement` is the
    share of images with the same top class, `divergence` the mean Kullback-Leibler divergence from the first's softmax, in nats.
    """

    images: int
    error: float
    agreement: float | None
    divergence: float | None
    layer_errors: dict[str, float]  # squared relative error of layers' outputs, each channel about its mean

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}


def fidelity(before: nn.Module, after: nn.Module, batches: Iterable[tuple[Any, ...]], layers: Sequence[str] = ()) -> Fidelity:
    """Send the same images through both, in evaluation mode, and compare outputs; of `layers` (in both networks) as well."""
    off = total = divergence = 0.0
    images = agreeing = 0
    classifier = True
    sums: dict[str, Tensor] = {}
    clones = [copy.deepcopy(model, detached(model)).eval() for model in (before, after)]
    outputs: dict[tuple[int, str], list[Tensor]] = {}
    for side, clone in enumerate(clones):
        for name in layers:
            clone.get_submodule(name).register_forward_hook(
                lambda _module, _args, output, key=(side, name): outputs.setdefault(key, []).append(output.detach().clone())
            )
    with torch.no_grad():
        for inputs in batches:
            outputs.clear()
            given = pytree.tree_map_only(Tensor, lambda t: t.to(next(before.parameters()).device), inputs)
            dense, cut = (
                [t for t in pytree.tree_leaves(clone(*copy.deepcopy(given))) if isinstance(t, Tensor) and t.is_floating_point()]
                for clone in clones
            )
            images += inputs[0].shape[0]
            pairs = [comparable(a, b) for a, b in zip(dense, cut, strict=True)]
            off += sum(float((a - b).square().sum()) for a, b in pairs)
            total += sum(float(a.square().sum()) for a, _ in pairs)
            classifier = classifier and len(dense) == 1 and dense[0].ndim == 2 and dense[0].shape[1] > 1
            if classifier:
                p, q = (log_softmax(side[0].double()) for side in (dense, cut))
                agreeing += int((p.argmax(1) == q.argmax(1)).sum())
                divergence += float((p.exp() * (p - q)).sum())
            for name in layers:
                for a, b in zip(outputs[0, name], outputs[1, name], strict=True):
                    sums[name] = sums.get(name, torch.zeros(())) + _sums(a, b, clones[0].get_submodule(name))
    return Fidelity(
        images,
        off / total if total else float(off > 0),
        agreeing / images if classifier and images else None,
        divergence / images if classifier and images else None,
        {name: _about_means(found) for name, found in sums.items()},
    )


def _sums(wanted: Tensor, given: Tensor, layer: nn.Module) -> Tensor:
    """By channel: count, sums and sums of squares of what is wanted and of what it is missed by, (5, channels)."""
    rows = [(t if isinstance(layer, nn.Linear) or t.ndim < 3 else t.movedim(-3, -1)).flatten(0, -2).double() for t in (wanted, given)]
    a, d = rows[0], rows[0] - rows[1]
    return torch.stack([torch.full_like(a[0], len(a)), a.sum(0), a.square().sum(0), d.sum(0), d.square().sum(0)])


def _about_means(sums: Tensor) -> float:
    count, wanted, wanted_squares, missed, missed_squares = sums
    variance = float((wanted_squares - wanted.square() / count).sum())
    return float((missed_squares - missed.square() / count).sum()) / variance if variance > 0 else 0.0


def latency(models: Sequence[nn.Module], inputs: Sequence[Any], rounds: int = 15) -> list[float]:
    """Median milliseconds of networks timed side by side, end to end in evaluation mode, on torch's current thread count."""
    threads = torch.get_num_threads()
    times: list[list[float]] = [[] for _ in models]
    timers = [Timer("model(*inputs)", globals={"model": model, "inputs": tuple(inputs)}, num_threads=threads) for model in models]
    with _evaluating(*models), torch.inference_mode():
        for timer in timers:  # warm-up; Timer synchronises CUDA itself
            timer.timeit(2)
        for _ in range(rounds):  # in turn, so that a busy moment of the machine hits all
            for timer, found in zip(timers, times, strict=True):
                found.append(1e3 * timer.timeit(1).median)
    return [statistics.median(found) for found in times]


def scored(evaluate: Callable[[nn.Module], float], model: nn.Module, name: str = "evaluate") -> float:
    """A network's score by a function, given under this name; ValueError unless it is a number, or a tensor of one."""
    score: Any = evaluate(model)
    if isinstance(score, Tensor | np.generic | np.ndarray) and math.prod(score.shape) == 1:
        score = score.item()
    if not isinstance(score, Real) or score != score:
        raise ValueError(f"{name}: found {score!r}, expected a number, higher for better.")
    return float(score)
