"""What a network costs, counted and timed: parameters, MACs, latency. Imports nothing of ours."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Random states are at the end what they were: torch's on every device, Python's and NumPy's."""
    drawn, drawn_too = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(drawn)
        np.random.set_state(drawn_too)
