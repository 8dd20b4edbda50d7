"""Activations of both networks between two layers: in memory up to a limit, then in temporary files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

_STORABLE = (Tensor, int, float, bool, str, type(None), torch.dtype, torch.device)
Values = dict[fx.Node, Any]
Chunk = tuple[int, Values, Values]  # number of the first image, values in the dense and in the cut network


class ActivationStore:
    """The values of a graph's nodes in both networks, for one chunk of images after another; `memory` is in bytes."""

    def __init__(self, memory: int, graph: fx.GraphModule) -> None:
        self._nodes = {node.name: node for node in graph.graph.nodes}
        self._free = memory
        self._chunks: list[tuple[int, Any]] = []  # number of the first image, and values of both networks or the path to them
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def add(self, first_image: int, dense: Values, cut: Values) -> None:
        leaves = pytree.tree_leaves((list(dense.values()), list(cut.values())))
        storages = [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor)]
        size = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        if size <= self._free or not all(isinstance(leaf, _STORABLE) for leaf in leaves):
            self._free -= size
            self._chunks.append((first_image, (dense, cut)))
            return
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="dsconv-surgery-", ignore_cleanup_errors=True)
        path = Path(self._folder.name) / f"{first_image}.pt"
        # One file for both networks: tensors that share memory still do after loading.
        torch.save([{node.name: value for node, value in side.items()} for side in (dense, cut)], path)
        self._chunks.append((first_image, path))

    def __iter__(self) -> Iterator[Chunk]:
        return (self._load(*chunk) for chunk in self._chunks)

    def drain(self) -> Iterator[Chunk]:
        """All chunks once, each released when it is yielded."""
        while self._chunks:
            yield self._load(*self._chunks.pop(0))

    def _load(self, first_image: int, sides: Any) -> Chunk:
        if isinstance(sides, Path):
            sides = [{self._nodes[name]: value for name, value in side.items()} for side in torch.load(sides, weights_only=True)]
        return first_image, *sides

    def close(self) -> None:
        self._chunks = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
