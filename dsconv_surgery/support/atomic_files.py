"""Write files so that a crash leaves the old file or the new one, never a part of one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def temporary_file(folder: Path) -> Iterator[Path]:
    """A new, empty file in a folder. It is removed at the end of the block, unless it was renamed."""
    handle, name = tempfile.mkstemp(dir=folder, prefix=".writing-")
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path, durable: bool = True) -> Iterator[Path]:
    """A file to write to, renamed to `path` at the end unless the block raised; `durable` flushes it to disk first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_file(path.parent) as temporary:
        yield temporary
        if durable:
            flush_to_disk(temporary)
        os.replace(temporary, path)
        if durable:
            flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
