"""Save a cut network to a folder, as plan.json and safetensors, and load it again. Nothing is pickled."""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from contextlib import suppress
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dsconv_surgery.compression import Compressed
from dsconv_surgery.network.layers import class_path, is_plain_tensor
from dsconv_surgery.plan import Plan
from dsconv_surgery.schemes import is_channels_last
from dsconv_surgery.support.atomic_files import atomic_write, folder_lock, make_folder, read_file
from dsconv_surgery.support.cache import json_sha256
from dsconv_surgery.support.formatting import as_sentence
from dsconv_surgery.support.records import JsonRecord, parse_json, quoted, record
from dsconv_surgery.surgery import apply_plan, check_cut, listed

PLAN_FILE = "plan.json"
WEIGHTS_FILE = re.compile(r"weights-[0-9a-f]{16}\.safetensors")
CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)


@record
class _Saved(JsonRecord):
    """The contents of plan.json."""

    plan: Plan
    weights_file: str
    weights_sha256: str
    channels_last: tuple[str, ...]  # names of weights in this memory format, which safetensors does not keep
    # The state_dict's metadata of each module, without those of version 1 and nothing else. None: not saved by an older version.
    module_metadata: dict[str, dict[str, Any]] | None = None
    sha256: str | None = None  # of all other fields, to notice changes


def save(compressed: Compressed | nn.Module, folder: str | PathLike[str], plan: Plan | None = None) -> None:
    """Save a cut network to a folder.

    The weights go to a file that is named by their content. plan.json, with its SHA-256, is renamed into place last. Then the
    weights of the previous plan.json are removed. So a crash leaves the old network or the new one, never a mixture. Processes that
    save to one folder wait for each other.

    Args:
        compressed: the result of `compress`; or a cut model, fine-tuned or not, with its plan.
        folder: created if it does not exist.
        plan: required with a model.

    Raises:
        ValueError: there is no plan, the model was not cut by it or was folded (`fold_batchnorm`) afterwards, its state cannot be saved,
            the folder holds a plan.json that `save` did not write, or no folder can have its name.
        OSError: the files cannot be written. A network that was there before is unchanged.

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
        if value.layout is not torch.strided or value.dtype == torch.complex128:
            raise ValueError(
                f"{name}: found a tensor of {value.dtype}, {value.layout}, which safetensors does not store. Convert it first."
            )
        if not is_plain_tensor(value):
            kind = class_path(type(value.data))
            raise ValueError(f"{name}: expected a plain tensor, found a {kind}. Save the network before you quantise or shard it.")
    metadata = _plain_metadata(state)
    target = Path(folder)
    make_folder(target)
    # safetensors takes neither overlapping nor channels-last tensors. A tensor with several names is saved once.
    tensors = {names[0]: state[names[0]].clone(memory_format=torch.contiguous_format) for names in _names_by_tensor(state)}
    data = safetensors.torch.save(tensors)
    digest = hashlib.sha256(data).hexdigest()
    weights = target / f"weights-{digest[:16]}.safetensors"
    channels_last = tuple(name for name, value in state.items() if is_channels_last(value))
    saved = _Saved(plan, weights.name, digest, channels_last, metadata)
    saved = replace(saved, sha256=_own_sha256(saved.to_json().encode()))
    with folder_lock(target):
        previous = _previous_weights(target / PLAN_FILE)
        # The inner file is renamed first, after both are written.
        with atomic_write(target / PLAN_FILE) as plan_file, atomic_write(weights) as weights_file:
            plan_file.write_bytes(saved.to_json().encode())
            weights_file.write_bytes(data)
        if previous not in (None, weights.name):
            with suppress(OSError):
                (target / str(previous)).unlink()


def _plain_metadata(state: Any) -> dict[str, dict[str, Any]]:
    """A state_dict's metadata as JSON data; ValueError names a module whose metadata are something else."""
    metadata = {name: values for name, values in getattr(state, "_metadata", {}).items() if values != {"version": 1}}
    for name, values in metadata.items():
        try:
            metadata[name] = json.loads(json.dumps(values, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: its metadata in the state_dict cannot be saved as JSON: {error}. Nothing was written.") from None
    return metadata


def _previous_weights(path: Path) -> str | None:
    """The weights file that a plan.json of `save` names, if it is there; ValueError for any other plan.json."""
    try:
        content = json.loads(read_file(path))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not {"plan", "weights_file", "weights_sha256"} <= content.keys():
        message = "found a file that save did not write, or a damaged one. Nothing was written. Choose another folder, or remove the file."
        raise ValueError(f"{path}: {message}")
    name = str(content["weights_file"])
    return name if WEIGHTS_FILE.fullmatch(name) else None


def load(fresh_model: nn.Module, folder: str | PathLike[str]) -> nn.Module:
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
    saved, data = _read(Path(folder))
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        weights = Path(folder) / saved.weights_file
        raise ValueError(f"{weights}: expected a safetensors file, found another ({error}). Save the network again.") from error
    model = apply_plan(fresh_model, saved.plan, init="empty")
    if any(value.is_meta for value in model.state_dict().values() if isinstance(value, Tensor)):
        raise ValueError("load: expected a fresh model with values, found one on the meta device. Build it on a real device.")
    _shape_buffers(model, tensors)
    state = model.state_dict()
    _check_tensors(tensors, state, saved.weights_file)
    for name in state.keys() & set(saved.channels_last):
        owner, _, attribute = name.rpartition(".")
        tensor: Any = getattr(model.get_submodule(owner), attribute)
        tensor.data = tensor.data.to(memory_format=torch.channels_last)
    loaded: Any = OrderedDict(tensors)
    if saved.module_metadata is not None:
        names = (name for name, _ in model.named_modules(remove_duplicate=False))
        loaded._metadata = OrderedDict({name: {"version": 1} for name in names} | saved.module_metadata)
    try:
        result = model.load_state_dict(loaded, strict=False)  # a shared tensor is saved under one of its names
    except RuntimeError as error:
        raise ValueError(
            f"{saved.weights_file} does not fit the fresh model. {as_sentence(str(error))} Pass a model of the class that was saved."
        ) from error
    if missing := {name for name in result.missing_keys if name in tensors} | set(result.unexpected_keys):
        raise ValueError(f"{', '.join(sorted(missing))}: saved, but the fresh model's class did not take these names while loading.")
    return model


def _shape_buffers(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give buffers of a user's modules, which may take their shape in use, their saved shape. Layers of torch.nn keep theirs."""
    aliases = {name: names for names in _names_by_tensor(model.state_dict()) for name in names}
    for name, tensor in tensors.items():
        for alias in aliases.get(name, [name]):
            place, _, attribute = alias.rpartition(".")
            with suppress(AttributeError):  # no such module: refused later
                owner = model.get_submodule(place)
                bases = [base for base in type(owner).__mro__ if base.__module__.startswith("torch.nn.") and base not in CONTAINERS]
                if attribute in owner._buffers and not bases:
                    buffer = owner._buffers[attribute]
                    if buffer is None:
                        device = next((value.device for value in model.state_dict().values()), tensor.device)
                        setattr(owner, attribute, torch.empty_like(tensor, device=device))
                    elif buffer.shape != tensor.shape:
                        setattr(owner, attribute, torch.empty(tensor.shape, dtype=buffer.dtype, device=buffer.device))


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
        raise ValueError(
            f"{file} does not fit the fresh model. {listed(problems)} Pass a model of the class that was saved, and "
            "fold_batchnorm(fresh_model, ...) if its BatchNorms were folded."
        )
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


def read_plan(folder: str | PathLike[str]) -> Plan:
    """The plan of a saved network, after a check that its weights are whole."""
    return _read(Path(folder))[0].plan


def _read(folder: Path) -> tuple[_Saved, bytes]:
    """The contents of plan.json and of the weights file, both checked for damage.

    Another process may save beside this one and remove the weights that were about to be read. Then plan.json is read again.
    """
    path, data = folder / PLAN_FILE, b""
    while True:
        previous = data
        try:
            data = read_file(path)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: not there. Expected a folder written by dsconv_surgery.save.") from None
        saved = _parse(path, data)
        weights = folder / saved.weights_file
        try:
            content = read_file(weights)
        except FileNotFoundError:
            if data == previous:
                message = f"not there, but {PLAN_FILE} names it. Copy the whole folder, or save again."
                raise FileNotFoundError(f"{weights}: {message}") from None
            continue
        if (digest := hashlib.sha256(content).hexdigest()) != saved.weights_sha256:
            digests = f"expected SHA-256 {saved.weights_sha256[:16]}..., found {digest[:16]}..."
            raise ValueError(f"{weights}: the file is damaged: {digests} Copy it again, or save again.")
        return saved, content


def _parse(path: Path, data: bytes) -> _Saved:
    saved = parse_json(_Saved, data, str(path))
    if not WEIGHTS_FILE.fullmatch(saved.weights_file):
        raise ValueError(f"{path}: expected a plain file name, found weights_file {quoted(saved.weights_file)}. Save the network again.")
    if saved.sha256 not in (None, digest := _own_sha256(data)):
        digests = f"expected SHA-256 {quoted(saved.sha256)}, found {digest!r}"
        raise ValueError(f"{path}: the file was changed or damaged: {digests}. Copy it again, or save again.")
    return saved


def _own_sha256(text: bytes) -> str:
    """SHA-256 of a plan.json without its field `sha256`."""
    content = json.loads(text.decode())
    content.pop("sha256", None)
    return json_sha256(content)
