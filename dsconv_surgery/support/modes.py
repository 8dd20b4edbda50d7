"""The caller's modes of torch, which must not change a result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch

# The switches of TF32 and bfloat16 inside operations on float32, and the value that switches them off. torch before 2.9 has others.
_backends: Any = torch.backends
_SWITCHES: list[tuple[Any, str, Any]] = [(_backends.cuda.matmul, "allow_tf32", False), (_backends.cudnn, "allow_tf32", False)]
if hasattr(_backends.cuda.matmul, "fp32_precision"):
    _names = {"cuda": ["matmul"], "cudnn": ["conv", "rnn"], "mkldnn": ["matmul", "conv"]}
    _operations = [getattr(getattr(_backends, backend), name, None) for backend, group in _names.items() for name in group]
    _SWITCHES = [(operation, "fp32_precision", "ieee") for operation in _operations if operation is not None]
_callers: ContextVar[Sequence[Any] | None] = ContextVar("callers", default=None)  # values of the switches outside of `standard_modes`


@contextmanager
def standard_modes() -> Iterator[None]:
    """Inference mode, autocast and TF32 off, gradients on. It also decorates public functions.

    Default dtypes and devices stay as they are, because a network may need the caller's. So the library names the dtype and the device
    of every tensor that it makes.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda", "xpu", "mps"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if _callers.get() is None:
            stack.callback(_callers.set, None)
            _callers.set([getattr(operation, name) for operation, name, _ in _SWITCHES])
        stack.enter_context(_switched([value for _, _, value in _SWITCHES]))
        yield


@contextmanager
def callers_precision() -> Iterator[None]:
    """Inside `standard_modes`, TF32 as the caller has set it: for training and for timings."""
    with _switched(_callers.get()):
        yield


@contextmanager
def _switched(values: Sequence[Any] | None) -> Iterator[None]:
    """Set the switches, and set them back at the end; None leaves them as they are."""
    before = [getattr(operation, name) for operation, name, _ in _SWITCHES]
    try:
        _set_switches(before if values is None else values)
        yield
    finally:
        _set_switches(before)


def _set_switches(values: Sequence[Any]) -> None:
    for (operation, name, _), value in zip(_SWITCHES, values, strict=True):
        setattr(operation, name, value)
