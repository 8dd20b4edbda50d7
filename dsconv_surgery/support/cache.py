"""Option tables and timings on disk, each under a digest of everything that it was computed from."""

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
FORMAT = 1  # of the entries; another one, another version of torch or other sources of this library, and entries are not found


class Cache:
    """Small results by the content that they follow from; lost, damaged or half written ones are computed anew.

    Args:
        where: True for the folder in the environment variable DSCONV_SURGERY_CACHE or else the user's cache folder, False for
            none, or a folder.
    """

    def __init__(self, where: bool | str | Path) -> None:
        default = os.environ.get(FOLDER_VARIABLE) or platformdirs.user_cache_dir("dsconv-surgery")
        self.folder: Path | None = None if where is False else Path(default) if where is True else Path(where)

    def get(self, kind: str, key: Any, compute: Callable[[], Any]) -> Any:
        """The value kept for a key, or computed now and kept; both are plain JSON data."""
        content = _canonical([FORMAT, _versions(), kind, key])
        path = None if self.folder is None else self.folder / kind / f"{hashlib.sha256(content).hexdigest()}.json"
        if path is None:
            return compute()
        kept = self._read(path, content)
        if kept is not None:
            return kept[0]
        value = compute()
        self._write(path, content, value)
        return value

    def _read(self, path: Path, content: bytes) -> list[Any] | None:
        try:
            entry = json.loads(path.read_bytes())
            whole = entry["sha256"] == hashlib.sha256(content + _canonical(entry["value"])).hexdigest()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if whole:
            return [entry["value"]]
        warnings.warn(f"{path}: a damaged cache entry; what it held is computed anew.", stacklevel=3)
        return None

    def _write(self, path: Path, content: bytes, value: Any) -> None:
        """Into place by a rename: an entry is there whole, or not at all."""
        entry = {"value": value, "sha256": hashlib.sha256(content + _canonical(value)).hexdigest()}
        try:
            with atomic_write(path, durable=False) as written:
                written.write_text(json.dumps(entry))
        except OSError as error:
            warnings.warn(f"{path}: cannot be written ({error}); nothing is kept for the next time.", stacklevel=3)
            self.folder = None


def digest(*parts: Tensor | str) -> str:
    """SHA-256 of texts and of tensors' shapes, types and contents."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            plain = part.detach().cpu().contiguous()
            found.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            found.update(plain.flatten().view(torch.uint8).numpy().data if plain.numel() else b"")
        else:
            found.update(f"{len(part)}:{part}".encode())
    return found.hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


@cache
def _versions() -> list[str]:
    home = Path(__file__).parent.parent
    sources = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(home.rglob("*.py"))))
    return [version("dsconv_surgery"), sources.hexdigest(), torch.__version__]
