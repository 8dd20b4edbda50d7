"""Random states of torch, NumPy and Python: preserved, or set by a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restore the random states of torch (the CPU and all CUDA devices in use), NumPy and Python at the end of the block."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Begin all random draws in the block with a seed, and restore the random states at its end.

    Two networks that sample (dropout that is always on, noise, a VAE) then draw the same numbers for the same images.
    """
    with preserve_random_state():
        set_seed(seed)
        yield


def set_seed(seed: int) -> None:
    """Seed the random draws of torch, NumPy and Python."""
    seed_torch(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def seed_torch(seed: int) -> None:
    """Seed the random draws of torch on the CPU, on all CUDA devices and on MPS.

    `torch.manual_seed` takes a hundred times as long, as it also serves devices that are not in use. CUDA is left alone until it is
    in use: the seed would be kept for its first use, after the states are restored.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def generator_states() -> tuple[Any, ...]:
    """The states of all random number generators in use, to be compared: random draws change them."""
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    _, keys, position, *_ = np.random.get_state()
    states = [np.asarray(state).tobytes() for state in (torch.get_rng_state(), *cuda_states, keys)]
    return states, position, random.getstate()


def random_state(device: torch.device) -> tuple[Any, ...]:
    """The random states of torch on the CPU and on a CUDA device, of NumPy and of Python."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


@contextmanager
def from_random_state(state: tuple[Any, ...], device: torch.device) -> Iterator[None]:
    """Begin the random draws in the block with a state, and restore the present one at its end."""
    before = random_state(device)
    try:
        _set_random_state(state, device)
        yield
    finally:
        _set_random_state(before, device)


def _set_random_state(state: tuple[Any, ...], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
    np.random.set_state(state[2])
    random.setstate(state[3])
