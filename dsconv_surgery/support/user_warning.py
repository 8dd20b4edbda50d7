"""Warnings that point at the user's call."""

from __future__ import annotations

import sys
import warnings

# Packages between the user's call and the warning: this one, and the decorators that it uses.
INNER = {"dsconv_surgery", "torch", "contextlib", "functools"}


def warn_user(message: str) -> None:
    """Warn at the nearest call outside of this library. Python 3.12 has `skip_file_prefixes` for it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in INNER:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
