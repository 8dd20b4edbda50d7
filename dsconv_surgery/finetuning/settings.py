"""A fine-tuning run as plain data: its settings, and what it did."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal


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
