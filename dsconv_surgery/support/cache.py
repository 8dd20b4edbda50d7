"""Option tables and timings on disk, each under a digest of everything that it was computed from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs
import torch
from torch import Tensor

from dsconv_surgery.support.atomic_files import atomic_write, read_file
from dsconv_surgery.support.user_warning import warn_user

FOLDER_VARIABLE = "DSCONV_SURGERY_CACHE"


class Cache:
    """Small results on disk. Lost or damaged ones, and those of another version of torch or of this library, are computed again.

    Args:
        where: True for the folder in the environment variable DSCONV_SURGERY_CACHE or else the user's cache folder, False for
            none, or a folder.
    """

    def __init__(self, where: bool | str | Path) -> None:
        default = os.environ.get(FOLDER_VARIABLE) or platformdirs.user_cache_dir("dsconv-surgery")
        self.folder: Path | None = None if where is False else Path(default) if where is True else Path(where)

    def get(self, kind: str, key: Any, compute: Callable[[], Any]) -> Any:
        """The stored value of a key, else the result of `compute`, which is then stored; both are plain JSON data and not None."""
        value = self.read(kind, key)
        if value is None:
            value = compute()
            self.write(kind, key, value)
        return value

    def read(self, kind: str, key: Any) -> Any:
        """The stored value of a key, or None."""
        if self.folder is None:
            return None
        key = [_versions(), kind, key]
        path = self.folder / kind / f"{json_sha256(key)}.json"
        try:
            with suppress(FileNotFoundError):
                entry = json.loads(read_file(path))
                if entry["sha256"] == json_sha256([key, entry["value"]]):
                    return entry["value"]
                raise ValueError("the checksum differs")
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            warn_user(f"{path}: a damaged cache entry. Its value is computed again.")
        return None

    def write(self, kind: str, key: Any, value: Any) -> None:
        """Store a value under a key."""
        if self.folder is None:
            return
        key = [_versions(), kind, key]
        path = self.folder / kind / f"{json_sha256(key)}.json"
        try:
            with atomic_write(path, durable=False) as temporary:
                temporary.write_text(json.dumps({"value": value, "sha256": json_sha256([key, value])}))
        except (OSError, ValueError) as error:
            warn_user(f"{path}: cannot be written ({error}). Nothing more is stored in the cache.")
            self.folder = None


def digest(*parts: Tensor | str) -> str:
    """SHA-256 of texts and of tensors' shapes, types and contents."""
    result = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            plain = part.detach().cpu().contiguous()
            result.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            result.update(plain.flatten().view(torch.uint8).numpy().data if plain.numel() else b"")
        else:
            result.update(f"{len(part)}:{part}".encode())
    return result.hexdigest()


def json_sha256(value: Any) -> str:
    """SHA-256 of plain JSON data, the same for every order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@cache
def _versions() -> list[str]:
    paths = sorted(Path(__file__).parent.parent.rglob("*.py"))
    return [hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest(), torch.__version__]
