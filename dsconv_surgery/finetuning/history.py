"""The result of a fine-tuning run as plain data."""

from __future__ import annotations

import math
from dataclasses import astuple, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from dsconv_surgery.support.formatting import text_table
from dsconv_surgery.support.plotting import Panel, save_panels
from dsconv_surgery.support.records import JsonRecord, record


@record
class Epoch:
    """An epoch, with means over its steps of the loss and of the loss's unweighted parts."""

    epoch: int
    steps: int  # since the start of the run
    loss: float
    labels: float | None  # loss of the labels
    teacher: float | None  # divergence from the teacher's outputs
    score: float | None  # from `validate`
    seconds: float  # since the start of the run, without interruptions


@record
class History(JsonRecord):
    """The epochs of a run, its settings and library versions, and, not in JSON, its "last" and "best" weights as state_dicts."""

    epochs: tuple[Epoch, ...]
    settings: dict[str, Any]
    versions: dict[str, str]
    weights: Annotated[dict[str, Any], Field(exclude=True)] = field(default_factory=dict, compare=False, repr=False)

    @property
    def best(self) -> Epoch | None:
        """The first epoch with the highest score; None without scores."""
        return max((e for e in self.epochs if e.score is not None), key=lambda e: e.score or 0.0, default=None)

    def __str__(self) -> str:
        rows = []
        for e in self.epochs:
            number, steps, *values, seconds = astuple(e)
            rows.append((str(number), f"{steps:,}", *("-" if value is None else f"{value:.4f}" for value in values), f"{seconds:.0f}"))
        return text_table("fine-tuning", [column.name for column in fields(Epoch)], rows)

    def plot(self, path: str | Path) -> None:
        """Plot the loss and, if there are scores, the score by epoch to an image file (needs matplotlib)."""
        epochs = [e.epoch for e in self.epochs]
        panels = [Panel("epoch", "loss", epochs, [e.loss for e in self.epochs])]
        if self.best:
            panels.append(Panel("epoch", "score", epochs, [math.nan if e.score is None else e.score for e in self.epochs]))
        save_panels(path, panels)
