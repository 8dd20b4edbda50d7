"""The result of a fine-tuning run as plain data."""

from __future__ import annotations

import math
from dataclasses import astuple, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from dsconv_surgery.support.formatting import Displayed, TableContent, counted
from dsconv_surgery.support.plotting import Curve, draw_curves
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
class History(JsonRecord, Displayed):
    """The epochs of a run, its settings and library versions, and, not in JSON, its "last" and "best" weights as state_dicts."""

    epochs: tuple[Epoch, ...]
    settings: dict[str, Any]
    versions: dict[str, str]
    before: float | None = None  # the score before training
    weights: Annotated[dict[str, Any], Field(exclude=True)] = field(default_factory=dict, compare=False, repr=False)

    @property
    def best(self) -> Epoch | None:
        """The first epoch with the highest score; None without scores."""
        return max((e for e in self.epochs if e.score is not None), key=lambda e: e.score or 0.0, default=None)

    def __repr__(self) -> str:
        last, best = self.epochs[-1] if self.epochs else None, self.best
        loss = f", loss {last.loss:.4f}" if last else ""
        scores = f", best score {best.score:.4f} in epoch {best.epoch}" if best else ""
        return f"<History: {counted(len(self.epochs), 'epoch')}{loss}{scores}>"

    def table(self) -> TableContent:
        rows = []
        for e in self.epochs:
            number, steps, *values, seconds = astuple(e)
            rows.append((str(number), f"{steps:,}", *("-" if value is None else f"{value:.4f}" for value in values), f"{seconds:.0f}"))
        before = () if self.before is None else (f"score before: {self.before:.4f}",)
        return TableContent("fine-tuning", tuple(column.name for column in fields(Epoch)), tuple(rows), before)

    def plot(self, path: str | Path | None = None, *, dense: float | None = None) -> Any:
        """Draw the loss and, if there are scores, the score of each epoch and before training.

        Args:
            path: an image file to write, such as "tuning.png".
            dense: the score of the dense network, drawn as a line.

        Returns:
            A matplotlib figure, which a notebook shows.

        Raises:
            ValueError: matplotlib is missing.

        Example:
            >>> fine_tune(small.model, loader, teacher=model, validate=accuracy).plot("tuning.png", dense=accuracy(model))
        """
        epochs = [e.epoch for e in self.epochs]
        curves = [Curve("loss, mean of each epoch", "epoch", "loss", epochs, [e.loss for e in self.epochs], integers=True)]
        if best := self.best:
            scores = [math.nan if e.score is None else e.score for e in self.epochs]
            options: dict[str, Any] = {"level": dense, "level_name": "dense network", "integers": True}
            if self.before is not None:
                epochs, scores, options["first_name"] = [0, *epochs], [self.before, *scores], "before tuning"
            title = f"score, best {best.score:.4g} in epoch {best.epoch}"
            curves.append(Curve(title, "epoch", "score", epochs, scores, **options))
        return draw_curves(f"Fine-tuning, {counted(len(self.epochs), 'epoch')}", curves, path)
