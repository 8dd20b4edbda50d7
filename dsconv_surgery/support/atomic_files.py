"""Files that are there whole, or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def temporary_file(folder: Path) -> Iterator[Path]:
    """A new file in a folder, removed at the end unless it was renamed."""
    handle, name = tempfile.mkstemp(dir=folder, prefix=".writing-")
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path, durable: bool = True) -> Iterator[Path]:
    """A file to write to, renamed into place at the end unless something was raised; `durable`: on the disk before that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_file(path.parent) as written:
        yield written
        if durable:
            flush_to_disk(written)
        os.replace(written, path)
        if durable:
            flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
