"""A fine-tuning run as plain data: its settings, and what it did."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, TypeAdapter

from dsconv_surgery.support.formatting import text_table
from dsconv_surgery.support.records import parse_json

COLUMNS = ("epoch", "steps", "loss", "labels", "teacher", "features", "score", "seconds")


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
