"""A fine-tuning run as plain data: its settings, and what it did."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter

from dsconv_surgery.text import parse_json, text_table

COLUMNS = ("epoch", "steps", "loss", "labels", "teacher", "features", "score", "seconds")


@dataclass(frozen=True)
class FineTune:
    """Settings of `fine_tune`.

    Args:
        epochs: passes over the batches.
        steps: stop after so many optimizer steps; needed where batches have no length, for the schedule: `epochs` then counts for nothing.
        optimizer: "soap" (Adam in the eigenbasis of each factor's second moments; Vyas et al. 2024) or "adamw".
        lr: the highest learning rate, reached after the warm-up; falls to zero along a half cosine.
        warmup: share of the steps in which the learning rate rises.
        weight_decay: of the products of factors, and of the weights of layers that were not cut (Frobenius decay; Khodak et al. 2021).
        clip: the gradient's largest norm; None, or inf in a recipe's file, for no limit.
        distill: the dense network's share of the loss, the rest is the labels'; in [0, 1].
        temperature: of its outputs.
        features: weight of the blocks' outputs.
        mix: share of the batches whose images are mixed with one another, blended or patched (see `dsconv_surgery.distill.mixed`);
            None for all that can be, where there is a teacher, and none where there is not.
        norms: BatchNorm statistics: "frozen", "late" (frozen, and estimated anew at the end) or "trained" along the way.
        average: decay of the exponential average of weights that is kept instead of the last ones; 0 for none.
        precision: of the products in forward and backward passes (autocast).
        channels_last: train in this memory format.
        accumulate: batches to each optimizer step.
        save_every: steps between two checkpoints.
        seed: of all that is drawn.

    Raises:
        ValueError: a setting out of its range.

    Example:
        >>> FineTune(epochs=5, lr=5e-4)
    """

    epochs: int = 3
    steps: int | None = None
    optimizer: Literal["soap", "adamw"] = "soap"
    lr: float = 3e-4
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float | None = 1.0
    distill: float = 0.9
    temperature: float = 2.0
    features: float = 0.0
    mix: float | None = None
    norms: Literal["frozen", "late", "trained"] = "frozen"
    average: float = 0.0
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False
    accumulate: int = 1
    save_every: int = 100
    seed: int = 0

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name in ("epochs", "accumulate", "save_every", "steps"):
            value = getattr(self, name)
            if name == "steps" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"fine_tune: {name}={value!r}, expected a whole number, 1 or more.")
        shares = {"warmup": self.warmup, "distill": self.distill, "mix": self.mix or 0.0, "average": self.average}
        for name, number in shares.items():
            if not 0 <= number <= 1 or (name == "average" and number == 1):
                raise ValueError(f"fine_tune: {name}={number!r}, expected a share in [0, 1].")
        positive = {"lr": self.lr, "temperature": self.temperature, "clip": 1.0 if self.clip in (None, math.inf) else self.clip}
        for name, number in positive.items():
            if not 0 < number < math.inf:
                raise ValueError(f"fine_tune: {name}={number!r}, expected a positive number.")
        for name, number in {"weight_decay": self.weight_decay, "features": self.features}.items():
            if not 0 <= number < math.inf:
                raise ValueError(f"fine_tune: {name}={number!r}, expected zero or a positive number.")
        words = {"optimizer": ("soap", "adamw"), "norms": ("frozen", "late", "trained"), "precision": ("float32", "bfloat16", "float16")}
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise ValueError(f"fine_tune: {name}={getattr(self, name)!r}, expected one of {', '.join(known)}.")


@dataclass(frozen=True)
class Epoch:
    """Means over an epoch's images: the loss that was minimised, and its parts before they are weighted."""

    epoch: int
    steps: int  # done since the beginning
    loss: float
    labels: float | None  # the task's loss
    teacher: float | None  # divergence from the dense network's outputs
    features: float | None  # squared relative error of the blocks' outputs
    score: float | None  # what `validate` gave
    seconds: float  # since the beginning, interruptions left out

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}


@dataclass(frozen=True)
class History:
    """A run's epochs, its settings, and the versions of what it ran on; the epoch of the best score, where there were scores."""

    epochs: tuple[Epoch, ...]
    settings: dict[str, Any]
    versions: dict[str, str]
    weights: Annotated[dict[str, Any], Field(exclude=True)] = field(default_factory=dict, compare=False, repr=False)  # "last", "best"

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    @property
    def best(self) -> Epoch | None:
        scored = [epoch for epoch in self.epochs if epoch.score is not None]
        return max(scored, key=lambda epoch: epoch.score or 0.0) if scored else None

    def to_json(self) -> str:
        return _ADAPTER.dump_json(self, indent=1).decode() + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> History:
        """Read what `to_json` wrote; ValueError says what is wrong and where."""
        return parse_json(_ADAPTER, text, "history")

    def __str__(self) -> str:
        rows = [
            (
                str(e.epoch),
                f"{e.steps:,}",
                *("-" if value is None else f"{value:.4f}" for value in (e.loss, e.labels, e.teacher, e.features, e.score)),
                f"{e.seconds:.0f}",
            )
            for e in self.epochs
        ]
        return text_table("fine-tuning", COLUMNS, rows)

    def plot(self, path: str | Path) -> None:
        """Loss and, where there is one, score by epoch (needs matplotlib)."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ValueError("a plot needs matplotlib: pip install 'dsconv_surgery[plot]'.") from error
        shown: dict[str, list[float]] = {"loss": [e.loss for e in self.epochs]}
        if self.best:
            shown["score"] = [math.nan if e.score is None else e.score for e in self.epochs]
        figure = Figure(figsize=(4 * len(shown), 3.2), layout="constrained")
        for axes, (name, values) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
            axes.plot([e.epoch for e in self.epochs], values, marker="o")
            axes.set_xlabel("epoch")
            axes.set_ylabel(name)
            axes.grid(alpha=0.3)
        figure.savefig(path, dpi=120)


_ADAPTER = TypeAdapter(History)
