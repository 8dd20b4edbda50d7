"""The caller's modes of torch, which must not change a result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def standard_modes() -> Iterator[None]:
    """Inference mode and autocast off, gradients on. It also decorates public functions.

    Default dtypes and devices stay as they are, because a network may need the caller's. So the library names the dtype and the device
    of every tensor that it makes.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda", "xpu", "mps"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
