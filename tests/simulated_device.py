"""A second device without the hardware: tensors that count as being on it are CPU tensors whose memory is marked.

As with CUDA, an operation on tensors of both devices is an error, and reading a value waits for the device. Factory functions without
`device=` make CPU tensors. Everything that happens under FakeTensorMode is left to torch, which knows devices itself.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import dsconv_surgery

DEVICE = torch.device("cuda", 0)
PACKAGE = str(Path(dsconv_surgery.__file__).parent)
_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}
_INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}
_SAME_DEVICE_SCALARS = {torch.ops.aten.cat.default, torch.ops.aten.stack.default}  # these take not even numbers of another device


class SimulatedDevice:
    """The memory on the device, and where the program waited for it: lines of the package, with how often."""

    def __init__(self) -> None:
        self._memory: dict[int, StorageWeakRef] = {}  # a weak reference keeps the address from being used again
        self.waits: Counter[str] = Counter()
        self.computing = False  # whether a function of torch runs on tensors of the device

    def holds(self, tensor: Any) -> bool:
        return _is_plain(tensor) and tensor.untyped_storage()._cdata in self._memory

    def mark(self, value: Any) -> Any:
        """Count the tensors in a value as being on the device."""
        for tensor in pytree.tree_leaves(value):
            if _is_plain(tensor):
                storage = tensor.untyped_storage()
                self._memory[storage._cdata] = StorageWeakRef(storage)
        if len(self._memory) > 20_000:
            self._memory = {key: reference for key, reference in self._memory.items() if not reference.expired()}
        return value

    def put(self, value: Any) -> Any:
        """A network or tensors, on the device: networks are moved, tensors copied."""
        if isinstance(value, nn.Module):
            self.mark([*value.parameters(), *value.buffers()])
            return value
        return pytree.tree_map_only(Tensor, lambda t: self.mark(t.clone()), value)

    def wait(self) -> None:
        frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
        if frames:
            self.waits[f"{Path(frames[-1].filename).relative_to(PACKAGE)}:{frames[-1].name}"] += 1

    def _grouped(self, lists: Any) -> dict[Any, Any]:
        """The groups of tensors that torch scales at once; it finds their device in C++."""
        groups = _group_tensors_by_device_and_dtype(lists)
        return {(DEVICE if self.holds(group[0][0][0]) else key[0], key[1]): group for key, group in groups.items()}

    @contextmanager
    def active(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch, _Operations(self), _Calls(self):
            patch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state())
            patch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
            patch.setattr("torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype", self._grouped)
            yield


def _is_plain(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor) and tensor.layout is torch.strided and not tensor.is_meta


def _is_fake(values: Any) -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None or any(
        isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves(values)
    )


class _Operations(TorchDispatchMode):
    """Refuses operations on tensors of both devices, and marks their results."""

    def __init__(self, device: SimulatedDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_fake((args, kwargs)):
            return func(*args, **kwargs)
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if _is_plain(leaf)]
        if func in _INDEXING:  # indices may be on the CPU
            inputs = [leaf for leaf in inputs if leaf is args[0] or self._device.holds(leaf)]
        here = [tensor for tensor in inputs if self._device.holds(tensor)]
        away = [t for t in inputs if not self._device.holds(t) and (t.ndim > 0 or func in _SAME_DEVICE_SCALARS)]
        if here and away and func is not torch.ops.aten.copy_.default:
            shapes = [tuple(tensor.shape) for tensor in away]
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found {DEVICE} and cpu {shapes}")
        if here and isinstance(kwargs.get("generator"), torch.Generator):
            raise RuntimeError(f"{func}: expected a 'cuda' device type for generator but found 'cpu'")
        if here and func in _READS:
            self._device.wait()
        result = func(*args, **kwargs)
        inner = not inputs and self._device.computing  # torch itself makes tensors where its inputs are
        return self._device.mark(result) if (here and func is not torch.ops.aten.copy_.default) or inner else result


class _Calls(TorchFunctionMode):
    """Answers questions about the device, and carries out calls that name one."""

    def __init__(self, device: SimulatedDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, first = dict(kwargs or {}), args[0] if args else None
        here = self._device.holds(first)
        if here and func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return DEVICE
        if here and func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if func in (Tensor.numpy, Tensor.__array__) and here:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if _is_fake((args, kwargs)):
            return func(*args, **kwargs)
        if func in (Tensor.tolist, Tensor.__repr__) and here:
            self._device.wait()
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._to(func, first, args[1:], kwargs)
        if func in (Tensor.__deepcopy__, Tensor.new_tensor) and here:
            return self._device.mark(func(*args, **kwargs))
        device = kwargs.get("device")
        if device is None or torch.device(device).type == "meta":
            before = self._device.computing
            self._device.computing = any(map(self._device.holds, pytree.tree_leaves((args, kwargs))))
            try:
                return func(*args, **kwargs)
            finally:
                self._device.computing = before
        if torch.device(device).type == "cpu":
            result = func(*args, **kwargs)
            return result.clone() if self._device.holds(result) else result
        if isinstance(kwargs.get("generator"), torch.Generator):
            raise RuntimeError(f"{func}: expected a 'cuda' device type for generator but found 'cpu'")
        return self._device.mark(func(*args, **{**kwargs, "device": "cpu"}))

    def _to(self, func: Any, tensor: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        here = there = self._device.holds(tensor)
        if func is Tensor.cpu:
            there, args = False, ()
        elif func is Tensor.cuda:
            there, args, func = True, (), Tensor.cpu
        elif args and isinstance(args[0], Tensor):
            there = self._device.holds(args[0])
        else:
            named = kwargs.pop("device", None) or next((a for a in args if isinstance(a, torch.device | str)), None)
            args = tuple(a for a in args if not isinstance(a, torch.device | str))
            if named is not None and torch.device(named).type == "meta":
                return tensor.to("meta", *args, **kwargs)
            there = here if named is None else torch.device(named).type != "cpu"
        if here == there:
            return func(tensor, *args, **kwargs)
        if here or not kwargs.get("non_blocking"):
            self._device.wait()
        if here and kwargs.get("non_blocking"):
            raise AssertionError("a copy to the CPU with non_blocking=True returns before the values have arrived")
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            result = func(tensor, *args, **kwargs)
            result = result.clone() if result.untyped_storage()._cdata == tensor.untyped_storage()._cdata else result
        return self._device.mark(result) if there else result
