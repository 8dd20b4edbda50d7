"""A fine-tuning run as plain data: its settings, and what it did."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from dsconv_surgery.support.formatting import text_table
from dsconv_surgery.support.plotting import Panel, save_panels
from dsconv_surgery.support.records import JsonRecord

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
class History(JsonRecord):
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
        epochs = [e.epoch for e in self.epochs]
        panels = [Panel("epoch", "loss", epochs, [e.loss for e in self.epochs])]
        if self.best:
            panels.append(Panel("epoch", "score", epochs, [math.nan if e.score is None else e.score for e in self.epochs]))
        save_panels(path, panels)
