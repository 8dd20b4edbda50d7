"""A cache of small results on disk, keyed by a digest of everything that they were computed from."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import platformdirs
import torch
from torch import Tensor

from dsconv_surgery.support.atomic_files import atomic_write

FOLDER_VARIABLE = "DSCONV_SURGERY_CACHE"
FORMAT = 1  # of the entries; part of every key, with the versions of torch and of this library's sources


class Cache:
    """Stores results by content. Missing or damaged entries are computed again.

    Args:
        where: a folder; True for the folder in the environment variable DSCONV_SURGERY_CACHE or else the user's cache folder; False
            for no cache.
    """

    def __init__(self, where: bool | str | Path) -> None:
        default = os.environ.get(FOLDER_VARIABLE) or platformdirs.user_cache_dir("dsconv-surgery")
        self.folder: Path | None = None if where is False else Path(default) if where is True else Path(where)

    def get(self, kind: str, key: Any, compute: Callable[[], Any]) -> Any:
        """The stored value for a key, computed and stored if there is none; key and value are plain JSON data."""
        if self.folder is None:
            return compute()
        content = _canonical([FORMAT, _versions(), kind, key])
        path = self.folder / kind / f"{_sha256(content)}.json"
        try:
            entry = json.loads(path.read_bytes())
            if entry["sha256"] == _sha256(content + _canonical(entry["value"])):
                return entry["value"]
            raise ValueError
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError, KeyError, TypeError):
            warnings.warn(f"{path}: the cache entry is damaged; its value is computed again.", stacklevel=2)
        value = compute()
        entry = {"value": value, "sha256": _sha256(content + _canonical(value))}
        try:
            with atomic_write(path, durable=False) as temporary:
                temporary.write_text(json.dumps(entry))
        except OSError as error:
            warnings.warn(f"{path}: cannot be written ({error}); results of this run are not cached.", stacklevel=2)
            self.folder = None
        return value


def digest(*parts: Tensor | str) -> str:
    """SHA-256 of texts, and of tensors' shapes, types and contents."""
    result = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            plain = part.detach().cpu().contiguous()
            result.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            result.update(plain.flatten().view(torch.uint8).numpy().data if plain.numel() else b"")
        else:
            result.update(f"{len(part)}:{part}".encode())
    return result.hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


@cache
def _versions() -> list[str]:
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.parent.rglob("*.py")))
    return [version("dsconv_surgery"), _sha256(sources), torch.__version__]
