"""More than one process: who this one is, its share of a batch, and sums over all. Everything is a plain no-op in a single process."""

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
    """This process's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Under torchrun, a process group for as long as this lasts, unless there is one already: nccl for CUDA, gloo elsewhere."""
    begin = dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized() and int(os.environ["WORLD_SIZE"]) > 1
    if begin:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        if begin:
            dist.destroy_process_group()


def local_part(batch: Any) -> tuple[Any, float]:
    """This rank's part of every tensor of a batch, along the first dimension, and its weight in a mean over all parts.

    Parts differ by one image at most. A rank for which nothing is left works on one image at weight zero, so that all keep step.
    """
    rank, ranks = process_and_world_size()
    if ranks == 1:
        return batch, 1.0
    count = next(t.shape[0] for t in pytree.tree_leaves(batch) if isinstance(t, Tensor))
    first, last = rank * count // ranks, (rank + 1) * count // ranks
    weight = (last - first) * ranks / count
    return pytree.tree_map_only(Tensor, lambda t: t[first : max(last, first + 1)] if first < count else t[:1], batch), weight


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum over ranks, everywhere the same; the tensor itself where there is one rank."""
    if process_and_world_size()[1] == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, value: Tensor) -> Tensor:
        return all_reduce_sum(value)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient)


def all_reduce_sum_with_gradient(value: Tensor) -> Tensor:
    """The sum over ranks, more than one, through which gradients flow back to every rank's part."""
    found: Tensor = _AllReduceSum.apply(value)  # type: ignore[no-untyped-call]
    return found


def from_first_process(make: Callable[[], T], device: torch.device) -> T:
    """What the first rank makes, or raises, on all of them; sent by way of this device."""
    rank, count = process_and_world_size()
    if count == 1:
        return make()
    found: list[Any] = [None, None]
    if rank == 0:
        try:
            found[0] = make()
        except Exception as error:
            found[1] = error
    dist.broadcast_object_list(found, device=device)
    if found[1] is not None:
        raise found[1]
    made: T = found[0]
    return made


def all_reduce_mean(value: float) -> float:
    """The mean over ranks, everywhere the same."""
    return float(all_reduce_sum(torch.tensor(value, dtype=torch.float64))) / process_and_world_size()[1]


def all_gather_rows(rows: Tensor) -> Tensor:
    """All ranks' (groups, rows, n), one after the other, everywhere the same."""
    rank, count = process_and_world_size()
    if count == 1:
        return rows
    each = torch.zeros(count, dtype=torch.long)
    each[rank] = rows.shape[1]
    first = [0, *all_reduce_sum(each).cumsum(0).tolist()]
    every = rows.new_zeros(rows.shape[0], first[-1], rows.shape[2])
    every[:, first[rank] : first[rank + 1]] = rows
    return all_reduce_sum(every)
