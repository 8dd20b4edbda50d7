"""One batch of a user's data: its items, and the inputs among them."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def batch_items(batch: Any) -> tuple[Any, ...]:
    """The items of a batch: those of a tuple or list, else the batch itself."""
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def batch_inputs(batch: Any, count: int, where: str) -> tuple[Any, ...]:
    """The first items of a batch, which a network takes as its inputs; what follows are labels.

    Raises:
        ValueError: there are fewer items, or one of them is not a tensor; `where` names the caller and the batch.
    """
    items = batch_items(batch)
    inputs = items[:count]
    if len(inputs) < count or not all(isinstance(item, Tensor) for item in inputs):
        types = ", ".join(type(item).__name__ for item in items) or "nothing"
        raise ValueError(f"{where} holds {types}, expected {count} input tensor(s), as the network takes them, and then labels.")
    return inputs
