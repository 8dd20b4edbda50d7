"""The file that a fine-tuning run is resumed from: its checksum, and the run that it belongs to."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dsconv_surgery.support.atomic_files import atomic_write, read_file
from dsconv_surgery.support.cache import digest
from dsconv_surgery.support.records import shortened

F = TypeVar("F", bound=Callable[..., Any])
HEADER = b"dsconv_surgery fine_tune 1\n"  # then the SHA-256 of the rest, which torch.save wrote
REMEDY = "Remove the file to start the run again, or name another."
_TRAINED = (
    "fine_tune trains in place, so after a run that ended (as in a notebook) the network is no longer as it was cut: to repeat the run, "
    "cut again, or train a copy.deepcopy of the network; to train on, name another file. "
)

# Weights of the models whose run was interrupted in this process: their digests before the run and at the interruption.
_interrupted: WeakKeyDictionary[nn.Module, tuple[str, str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A checkpoint file and the identity of the run that writes and reads it; without a path, nothing is written or read."""

    path: Path | None
    identity: dict[str, str]

    def write(self, state: dict[str, Any]) -> None:
        """Replace the file."""
        if self.path is not None:
            buffer = io.BytesIO()
            torch.save({"run": self.identity, **state}, buffer)
            content = buffer.getvalue()
            with atomic_write(self.path) as temporary:
                temporary.write_bytes(HEADER + hashlib.sha256(content).digest() + content)

    def read(self) -> dict[str, Any] | None:
        """The last state that was written, None without a file; ValueError if the file is damaged, of another kind, or of another run."""
        if self.path is None:
            return None
        try:
            data = read_file(self.path)
        except FileNotFoundError:
            return None
        start = len(HEADER) + hashlib.sha256().digest_size
        if data[: len(HEADER)] != HEADER:
            raise ValueError(f"{self.path}: not a checkpoint of fine_tune, or one of another version. {REMEDY}")
        if hashlib.sha256(data[start:]).digest() != data[len(HEADER) : start]:
            raise ValueError(f"{self.path}: the checkpoint is damaged, its SHA-256 differs. {REMEDY}")
        try:
            state: dict[str, Any] = torch.load(io.BytesIO(data[start:]), map_location="cpu", weights_only=True)
            identity = state["run"]
        except Exception as error:  # torch.load raises many types of errors
            raise ValueError(f"{self.path}: not a checkpoint of fine_tune ({type(error).__name__}). {REMEDY}") from error
        if differences := _differences(identity, self.identity):
            trained = _TRAINED if "initial weights" in differences else ""
            raise ValueError(
                f"{self.path}: the checkpoint is of another run, which differs in: {differences}. To resume a run, make the same call and "
                f"pass the network as it was cut. {trained}{REMEDY}"
            )
        return state


def run_identity(
    model: nn.Module, teacher: nn.Module | None, optimizer: torch.optim.Optimizer, settings: dict[str, Any], steps: int, path: Path | None
) -> dict[str, str]:
    """The properties that the run of a checkpoint and this run must have in common. Images and functions are not compared."""
    identity = {f"setting {name}": repr(value) for name, value in settings.items()}
    identity |= {"number of steps": str(steps), "optimizer": _text(optimizer)}
    identity |= {"structure of the model": digest(_text(model)), "initial weights": _initial_weights(model, path)}
    identity["teacher"] = "none" if teacher is None else digest(_text(teacher), _weights(teacher))
    return identity


def resumable(run: F) -> F:
    """A decorator for the run of a loop that has `model` and `file`: remembers an interruption, so that the run can be resumed."""

    @functools.wraps(run)
    def wrapper(loop: Any, *args: Any) -> Any:
        with suppress(TypeError):  # a model without a hash is not remembered
            _interrupted.pop(loop.model, None)
        try:
            return run(loop, *args)
        except BaseException:
            with suppress(TypeError):
                _interrupted[loop.model] = (loop.file.identity["initial weights"], _weights(loop.model))
            raise

    return wrapper  # type: ignore[return-value]


def _initial_weights(model: nn.Module, path: Path | None) -> str:
    """The digest of a model's weights; of those before the interrupted run if the model has the weights of the interruption."""
    weights = _weights(model)
    with suppress(TypeError):
        initial, interrupted = _interrupted.get(model, ("", ""))
        if weights == interrupted and path is not None and os.path.exists(path):
            return initial
    return weights


def _weights(model: nn.Module) -> str:
    state = model.state_dict()
    return digest(*(part if isinstance(part, Tensor | str) else repr(part) for item in state.items() for part in item))


def _text(value: object) -> str:
    """The text of an object without addresses in memory, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _differences(saved: Any, current: dict[str, str]) -> str:
    """The differences between two identities, with short values of both."""
    saved = saved if isinstance(saved, dict) else {}
    texts = []
    for name in [*current, *(saved.keys() - current.keys())]:
        values = [str(identity.get(name, "not there")) for identity in (saved, current)]
        if values[0] != values[1]:
            shown = name.startswith("setting") or name == "number of steps"
            texts.append(f"{name} ({shortened(values[0])} in the checkpoint, {shortened(values[1])} now)" if shown else str(name))
    return ", ".join(texts)
