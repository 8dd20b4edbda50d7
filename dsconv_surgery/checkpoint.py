"""Save a cut network to a folder, as plan.json and safetensors, and load it again. Nothing is pickled."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsconv_surgery.compression import Compressed
from dsconv_surgery.plan import Plan
from dsconv_surgery.schemes import is_channels_last
from dsconv_surgery.support.atomic_files import flush_to_disk, temporary_file
from dsconv_surgery.support.records import JsonRecord, parse_json, record
from dsconv_surgery.surgery import apply_plan, check_cut, listed

PLAN_FILE = "plan.json"


@record
class _Saved(JsonRecord):
    """The contents of plan.json."""

    plan: Plan
    weights_file: str
    weights_sha256: str
    channels_last: tuple[str, ...]  # names of weights in this memory format, which safetensors does not keep


def save(compressed: Compressed | nn.Module, folder: str | os.PathLike[str], plan: Plan | None = None) -> None:
    """Save a cut network to a folder.

    The weights go to a file that is named by their content. plan.json, with its SHA-256, is renamed into place last. Then the
    weights of the previous plan.json are removed. So a crash leaves the old network or the new one, never a mixture.

    Args:
        compressed: the result of `compress`; or a cut model, fine-tuned or not, with its plan.
        folder: created if it does not exist.
        plan: required with a model.

    Raises:
        ValueError: there is no plan, the model was not cut by it, or its state cannot be saved.

    Example:
        >>> save(small, "resnet18-half")
    """
    model, plan = (compressed.model, plan or compressed.plan) if isinstance(compressed, Compressed) else (compressed, plan)
    if plan is None:
        raise ValueError("save: expected a plan with the model, found none. Call save(model, folder, plan).")
    check_cut(model, plan)
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.is_meta:
            kind = "a tensor on the meta device" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}: expected a tensor with values to save, found {kind}. Nothing was written.")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    previous: object = None
    with suppress(OSError, ValueError, KeyError, TypeError):  # without a readable plan.json, no file is removed
        previous = json.loads((target / PLAN_FILE).read_bytes())["weights_file"]
    with temporary_file(target) as weights_file, temporary_file(target) as plan_file:
        # safetensors takes neither overlapping nor channels-last tensors. A tensor with several names is saved once.
        tensors = {names[0]: state[names[0]].clone(memory_format=torch.contiguous_format) for names in _names_by_tensor(state)}
        save_file(tensors, weights_file)
        digest = _sha256(weights_file)
        weights = target / f"weights-{digest[:16]}.safetensors"
        channels_last = tuple(name for name, value in state.items() if is_channels_last(value))
        plan_file.write_bytes(_Saved(plan, weights.name, digest, channels_last).to_json().encode())
        for source, path in ((weights_file, weights), (plan_file, target / PLAN_FILE)):
            source.chmod(0o644)
            flush_to_disk(source)
            os.replace(source, path)
    flush_to_disk(target)
    for path in target.glob("weights-*.safetensors"):
        if path.name == previous and path != weights:
            path.unlink()


def load(fresh_model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Load a saved network, as a new model made from a fresh one of your class. Nothing is factorised.

    Args:
        fresh_model: the model as it was before it was cut, with any weights. It is not changed.
        folder: written by `save`.

    Returns:
        A new model with the saved weights, on the device and in the training mode of the fresh one.

    Raises:
        FileNotFoundError: there is no plan.json, or its weights are missing.
        ValueError: files are damaged, or the fresh model has other layers or another dtype than the saved one.

    Example:
        >>> small = load(torchvision.models.resnet18(), "resnet18-half")
    """
    saved, weights = _read(Path(folder))
    model = apply_plan(fresh_model, saved.plan, init="empty")
    state = model.state_dict()
    if any(value.is_meta for value in state.values() if isinstance(value, Tensor)):
        raise ValueError("load: expected a fresh model with values, found one on the meta device. Build it on a real device.")
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights}: expected a safetensors file, found another ({error}). Save the network again.") from error
    _check_tensors(tensors, state, weights.name)
    for name in state.keys() & set(saved.channels_last):
        owner, _, attribute = name.rpartition(".")
        tensor: Any = getattr(model.get_submodule(owner), attribute)
        tensor.data = tensor.data.to(memory_format=torch.channels_last)
    model.load_state_dict(tensors, strict=False)  # a shared tensor is saved under one of its names
    return model


def _check_tensors(tensors: dict[str, Tensor], state: dict[str, Any], file: str) -> None:
    """Raise ValueError unless saved tensors are those of a state: each once, with its shape and dtype, and no others."""
    problems = [f"{name}: saved, but not in the fresh model." for name in tensors if name not in state]
    for names in _names_by_tensor(state):
        saved = [name for name in names if name in tensors]
        if not saved:
            problems.append(f"{names[0]}: in the fresh model, but not saved.")
        elif len(saved) > 1:
            problems.append(f"{' and '.join(saved)}: saved as separate tensors, but one tensor in the fresh model.")
        elif tensors[saved[0]].shape != state[saved[0]].shape:
            shapes = list(tensors[saved[0]].shape), list(state[saved[0]].shape)
            problems.append(f"{saved[0]}: saved with shape {shapes[0]}, found {shapes[1]} in the fresh model.")
    if problems:
        raise ValueError(f"{file} does not fit the fresh model. {listed(problems)} Pass a model of the class that was saved.")
    for name, tensor in tensors.items():
        if tensor.dtype != state[name].dtype:
            dtypes = f"saved as {tensor.dtype}, found {state[name].dtype} in the fresh model"
            raise ValueError(f"{name}: {dtypes}. Convert the fresh model first, as in fresh_model.half().")


def _names_by_tensor(state: dict[str, Any]) -> list[list[str]]:
    """The names in a state, grouped by tensor."""
    groups: dict[Any, list[str]] = {}
    for name, value in state.items():
        address = value.data_ptr() if isinstance(value, Tensor) else 0
        key = (address, value.shape, value.stride(), value.dtype) if address else name
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def read_plan(folder: str | os.PathLike[str]) -> Plan:
    """The plan of a saved network, after a check that its weights are whole."""
    return _read(Path(folder))[0].plan


def _read(folder: Path) -> tuple[_Saved, Path]:
    """The contents of plan.json and the path of its weights, both checked for damage."""
    path = folder / PLAN_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path}: not there. Expected a folder written by dsconv_surgery.save.")
    saved = parse_json(_Saved, path.read_bytes(), str(path))
    if Path(saved.weights_file).name != saved.weights_file:
        raise ValueError(f"{path}: expected a plain file name, found weights_file {saved.weights_file!r}. Save the network again.")
    weights = folder / saved.weights_file
    if not weights.exists():
        raise FileNotFoundError(f"{weights}: not there, but {PLAN_FILE} names it. Copy the whole folder, or save again.")
    digest = _sha256(weights)
    if digest != saved.weights_sha256:
        digests = f"expected SHA-256 {saved.weights_sha256[:16]}..., found {digest[:16]}..."
        raise ValueError(f"{weights}: the file is damaged: {digests} Copy it again, or save again.")
    return saved, weights


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
