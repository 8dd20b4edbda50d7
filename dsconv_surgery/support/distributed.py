"""Several processes: the number of this one, its part of a batch, and sums over all. With one process, every function does nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T")


def process_and_world_size() -> tuple[int, int]:
    """The number of this process, from 0, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def several_processes() -> bool:
    """Whether a process group of several processes exists, or torchrun launched several."""
    launched = dist.is_available() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1
    return launched or process_and_world_size()[1] > 1


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Under torchrun, create a process group for the block unless there is one already: nccl for CUDA tensors, gloo for others."""
    create = dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized() and int(os.environ["WORLD_SIZE"]) > 1
    if create:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        if create:
            dist.destroy_process_group()


def local_part(batch: Any) -> tuple[Any, float]:
    """This process's part of every tensor of a batch, along the first dimension, and its weight in a mean over processes.

    Parts differ by at most one image. If a batch has fewer images than processes, the others get one image of weight zero, because all
    processes must take part in every step.
    """
    process, world_size = process_and_world_size()
    if world_size == 1:
        return batch, 1.0
    count = next(t.shape[0] for t in pytree.tree_leaves(batch) if isinstance(t, Tensor) and t.ndim)
    first, last = process * count // world_size, (process + 1) * count // world_size
    weight = (last - first) * world_size / count
    part = slice(first, max(last, first + 1)) if first < count else slice(0, 1)
    # Tensors without a row per image are the same for all processes.
    return pytree.tree_map_only(Tensor, lambda t: t[part] if t.ndim and len(t) == count else t, batch), weight


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum over processes, the same in all of them; with one process, the tensor itself."""
    if process_and_world_size()[1] > 1:
        # A group of nccl alone sums nothing on the CPU.
        target = torch.device("cuda") if value.device.type == "cpu" and dist.get_backend() == "nccl" else value.device
        total = value.detach().to(target, copy=True)
        dist.all_reduce(total)
        value = total.to(value.device)
    return value


def all_reduce_mean(value: float) -> float:
    """The mean over processes, the same in all of them."""
    return float(all_reduce_sum(torch.tensor(value, dtype=torch.float64, device="cpu"))) / process_and_world_size()[1]


def from_first_process(make: Callable[[], T], device: torch.device) -> T:
    """The result of `make` in the first process, sent to all of them through `device`; all raise its exception if it raises one."""
    process, world_size = process_and_world_size()
    if world_size == 1:
        return make()
    try:
        message: list[Any] = [make() if process == 0 else None, None]  # result, exception
    except Exception as error:
        message = [None, error]
    dist.broadcast_object_list(message, device=device)
    if message[1] is not None:
        raise message[1]
    return message[0]


def all_gather_rows(rows: Tensor) -> Tensor:
    """The (groups, rows, n) of all processes, concatenated along the rows, the same in all of them."""
    process, world_size = process_and_world_size()
    if world_size == 1:
        return rows
    counts = torch.zeros(world_size, dtype=torch.long, device="cpu")
    counts[process] = rows.shape[1]
    starts = [0, *all_reduce_sum(counts).cumsum(0).tolist()]
    result = rows.new_zeros(rows.shape[0], starts[-1], rows.shape[2])
    result[:, starts[process] : starts[process + 1]] = rows
    return all_reduce_sum(result)
