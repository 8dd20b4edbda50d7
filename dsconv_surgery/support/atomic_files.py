"""Read regular files, and write files so that a crash leaves the old file or the new one, never a part of one."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: writers do not lock, and files of killed writers stay
    fcntl = None  # type: ignore[assignment]

PREFIX = ".writing-"  # of temporary files and of the lock of a folder
SHOWN = 200  # characters of a path in a message, at most


def check_regular(path: Path) -> None:
    """Raise FileNotFoundError if there is no such file, and ValueError for a folder, a pipe, a device or an impossible name."""
    try:
        with _possible_name(path):
            mode = path.stat().st_mode
    except NotADirectoryError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "pipe" if stat.S_ISFIFO(mode) else "device or socket"
        raise ValueError(f"{path}: expected a regular file, found a {kind}. Name another file.")


@contextmanager
def _possible_name(path: Path) -> Iterator[None]:
    """Turn the errors for a path that cannot exist into a ValueError."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{str(path)[:SHOWN]!r}: cannot be a file or folder: {reason}. Choose another name.") from None


def make_folder(path: Path) -> None:
    """Create a folder, and those around it, if it does not exist; ValueError for an impossible name."""
    with _possible_name(path):
        path.mkdir(parents=True, exist_ok=True)


def read_file(path: Path) -> bytes:
    """The contents of a regular file; errors as for `check_regular`."""
    check_regular(path)
    return path.read_bytes()


@contextmanager
def temporary_file(folder: Path) -> Iterator[Path]:
    """A new, empty file in a folder. It is removed at the end of the block, unless it was renamed.

    Its writer holds a lock on it, which the system releases when the process ends. Temporary files without a lock are those of
    killed writers, and are removed here.
    """
    for abandoned in folder.glob(PREFIX + "[0-9a-f]" * 16):
        with suppress(OSError):
            handle = _lock(abandoned, os.O_RDWR, wait=False)
            if handle is not None:
                abandoned.unlink()
                os.close(handle)
    path, handle = folder / f"{PREFIX}{secrets.token_hex(8)}", None
    try:
        handle = _lock(path, os.O_RDWR | os.O_CREAT, wait=True)
        yield path
    finally:
        path.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder for the block; wait while another process or thread holds it."""
    path = folder / f"{PREFIX}lock"
    handle = _lock(path, os.O_RDWR | os.O_CREAT, wait=True)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


def _lock(path: Path, flags: int, wait: bool) -> int | None:
    """Open a file and lock it until it is closed; None if it cannot be locked, or is locked by another writer and `wait` is false."""
    while True:
        handle = os.open(path, flags, 0o666)
        try:
            if fcntl is None:
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:  # locked by another writer, or a file system without locks
            os.close(handle)
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        os.close(handle)  # another writer removed the file between the two calls


@contextmanager
def atomic_write(path: Path, durable: bool = True) -> Iterator[Path]:
    """A file to write to, renamed to `path` at the end unless the block raised; `durable` flushes it to disk first.

    Where `path` is a symbolic link, the file that it names is replaced. A new file has the permissions of the umask, a replaced one
    those of the old file.
    """
    target = Path(os.path.realpath(path))
    exists = True
    try:
        check_regular(target)
    except FileNotFoundError:
        exists = False
    try:
        make_folder(target.parent)
        with temporary_file(target.parent) as temporary:
            yield temporary
            if exists:
                shutil.copymode(target, temporary)
            if durable:
                _flush_to_disk(temporary)
            os.replace(temporary, target)
            if durable:
                _flush_to_disk(target.parent)
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, f"{error.strerror}, and the file was not replaced", str(path)) from error


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
