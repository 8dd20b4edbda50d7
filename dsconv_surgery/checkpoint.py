"""Keep a cut network in a folder and bring it back: plan.json and safetensors, nothing pickled."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsconv_surgery.compression import Compressed
from dsconv_surgery.plan import Plan
from dsconv_surgery.schemes import is_channels_last
from dsconv_surgery.support.atomic_files import flush_to_disk, temporary_file
from dsconv_surgery.support.records import JsonRecord, parse_json
from dsconv_surgery.surgery import apply_plan, check_cut

PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class _Saved(JsonRecord):
    """What plan.json holds."""

    plan: Plan
    weights_file: str
    weights_sha256: str
    channels_last: tuple[str, ...]  # names of weights stored so; safetensors keeps values only

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}


def save(compressed: Compressed | nn.Module, folder: str | os.PathLike[str], plan: Plan | None = None) -> None:
    """Write a cut network to a folder, made if need be.

    The weights go to a file named by their content; plan.json, with its SHA-256, is renamed into place last and older weights
    are then removed: a crash leaves the old network or the new one, never a mixture.

    Args:
        compressed: what `compress` returned; or a cut model, fine-tuned perhaps, with its plan.
        folder: where to.
        plan: with a model.

    Raises:
        ValueError: no plan, the model was not cut by it, or its state holds what is not a tensor.

    Example:
        >>> save(small, "resnet18-half")
    """
    model, plan = (compressed.model, plan or compressed.plan) if isinstance(compressed, Compressed) else (compressed, plan)
    if plan is None:
        raise ValueError("save: a model alone does not say how it was cut. Pass its plan: save(model, folder, plan).")
    check_cut(model, plan)
    state = model.state_dict()
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    meta = [name for name, value in state.items() if isinstance(value, Tensor) and value.is_meta]
    if odd or meta:
        what = "state that is not a tensor, which safetensors cannot hold" if odd else "weights on the meta device, which hold no values"
        raise ValueError(f"{(odd + meta)[0]}: {what} ({len(odd + meta)} such entries). Nothing was written.")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with temporary_file(target) as written, temporary_file(target) as manifest:
        # Cloned, for safetensors takes neither overlapping nor channels-last tensors; one that has several names is written once.
        kept = {names[0]: state[names[0]] for names in _by_tensor(state)}
        save_file({name: value.clone(memory_format=torch.contiguous_format) for name, value in kept.items()}, written)
        digest = _sha256(written)
        weights = target / f"weights-{digest[:16]}.safetensors"
        channels_last = tuple(name for name, value in state.items() if is_channels_last(value))
        manifest.write_bytes(_Saved(plan, weights.name, digest, channels_last).to_json().encode())
        for source, place in ((written, weights), (manifest, target / PLAN_FILE)):
            source.chmod(0o644)
            flush_to_disk(source)
            os.replace(source, place)
    flush_to_disk(target)
    for old in target.glob("weights-*.safetensors"):
        if old.name != weights.name:
            old.unlink()


def load(fresh_model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """The cut network that a folder holds, built on a fresh dense one of the user's own class; nothing is factorised.

    Args:
        fresh_model: as it was before it was cut, with any weights; it is not changed.
        folder: written by `save`.

    Returns:
        A new model with the saved weights, in the fresh one's training mode and on its device.

    Raises:
        FileNotFoundError: no plan.json there, or its weights are missing.
        ValueError: damaged files, another network, changed layers, another dtype.

    Example:
        >>> small = load(torchvision.models.resnet18(), "resnet18-half")
    """
    saved, weights = _read(Path(folder))
    cut = apply_plan(fresh_model, saved.plan, init="empty")
    state = cut.state_dict()
    if any(value.is_meta for value in state.values() if isinstance(value, Tensor)):
        raise ValueError(
            "load: the fresh model is on the meta device: what is not saved (non-persistent buffers) would be lost. Build it on a real one."
        )
    _check_state(state, weights)
    for name in state.keys() & set(saved.channels_last):
        owner, _, leaf = name.rpartition(".")
        tensor: Any = getattr(cut.get_submodule(owner), leaf)
        tensor.data = tensor.data.to(memory_format=torch.channels_last)
    cut.load_state_dict(load_file(weights), strict=False)  # strict but for further names of a shared tensor, as checked
    return cut


def _check_state(state: dict[str, Any], weights: Path) -> None:
    """Raise ValueError unless a file holds each tensor of a state once, with its shape and dtype, and nothing else."""
    with safe_open(str(weights), framework="pt") as file:
        stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no dict
        problems = [f"{name}: saved, but not in the fresh model" for name in stored if name not in state]
        for names in _by_tensor(state):
            found = [name for name in names if name in stored]
            if not found:
                problems.append(f"{names[0]}: in the fresh model, but not saved")
            elif len(found) > 1:
                problems.append(f"{' and '.join(found)}: saved apart, one tensor in the fresh model")
            elif stored[found[0]].get_shape() != list(state[found[0]].shape):
                problems.append(f"{found[0]}: saved as {stored[found[0]].get_shape()}, the fresh model has {list(state[found[0]].shape)}")
        if problems:
            more = f" ... and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ValueError(
                f"{weights.name} does not fit the fresh model. {'; '.join(problems[:5])}{more}. "
                "Pass one of the class and settings that was saved."
            )
        for name, its in stored.items():
            if its.get_dtype() != _dtype_name(state[name]):
                expected = _dtype_name(state[name])
                raise ValueError(
                    f"{name}: saved as {its.get_dtype()}, the fresh model has {expected}. Convert it first, as in fresh_model.half()."
                )


def _by_tensor(state: dict[str, Any]) -> list[list[str]]:
    """The names of a state, those of one and the same tensor together."""
    groups: dict[Any, list[str]] = {}
    for name, value in state.items():
        known = isinstance(value, Tensor) and value.data_ptr()
        groups.setdefault((value.data_ptr(), value.shape, value.stride(), value.dtype) if known else name, []).append(name)
    return list(groups.values())


def read_plan(folder: str | os.PathLike[str]) -> Plan:
    """The plan of a saved network, its weights checked for damage."""
    return _read(Path(folder))[0].plan


def _read(folder: Path) -> tuple[_Saved, Path]:
    """plan.json and the path of its weights, once both are known to be whole."""
    path = folder / PLAN_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path}: not there. Expected a folder written by dsconv_surgery.save.")
    saved = parse_json(_Saved, path.read_bytes(), str(path))
    if Path(saved.weights_file).name != saved.weights_file:
        raise ValueError(f"{path}: weights_file {saved.weights_file!r} is not a plain file name. Save the network again.")
    weights = folder / saved.weights_file
    if not weights.exists():
        raise FileNotFoundError(f"{weights}: not there, though {PLAN_FILE} names it. Copy the whole folder, or save again.")
    digest = _sha256(weights)
    if digest != saved.weights_sha256:
        expected = saved.weights_sha256
        raise ValueError(
            f"{weights}: damaged - its SHA-256 is {digest[:16]}..., {PLAN_FILE} says {expected[:16]}... Copy it anew, or save again."
        )
    try:
        with safe_open(str(weights), framework="pt"):
            return saved, weights
    except SafetensorError as error:
        raise ValueError(f"{weights}: not a safetensors file: {error}. Save again.") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _dtype_name(tensor: Tensor) -> str:
    """As safetensors writes it."""
    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    names |= {torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
    return names.get(tensor.dtype, str(tensor.dtype))
