"""Run the dense and the cut network side by side over calibration images, halting where layers are to be replaced."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

_PLAIN = (Tensor, int, float, bool, str, type(None), torch.dtype, torch.device)
Values = dict[fx.Node, Any]


class ActivationStore:
    """Live values of both networks, chunk by chunk: in memory up to a limit, in temporary files beyond."""

    def __init__(self, memory: int, graph: fx.GraphModule) -> None:
        self._nodes = {node.name: node for node in graph.graph.nodes}
        self._free = memory
        self._kept: list[tuple[int, Any, Any]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def keep(self, first: int, dense: Values, cut: Values) -> None:
        leaves = pytree.tree_leaves((list(dense.values()), list(cut.values())))
        size = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in leaves if isinstance(t, Tensor)}.values())
        self._free -= size
        if self._free >= 0 or not all(isinstance(leaf, _PLAIN) for leaf in leaves):
            self._kept.append((first, dense, cut))
            return
        self._free += size
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="dsconv-surgery-", ignore_cleanup_errors=True)
        path = Path(self._folder.name) / f"{first}.pt"
        torch.save([{node.name: value for node, value in side.items()} for side in (dense, cut)], path)  # keeps views of one tensor so
        self._kept.append((first, path, None))

    def __iter__(self) -> Iterator[tuple[int, Values, Values]]:
        return (self._read(kept) for kept in self._kept)

    def drain(self) -> Iterator[tuple[int, Values, Values]]:
        """All of it once, letting go of what has been given."""
        while self._kept:
            yield self._read(self._kept.pop(0))

    def _read(self, kept: tuple[int, Any, Any]) -> tuple[int, Values, Values]:
        first, dense, cut = kept
        if isinstance(dense, Path):
            dense, cut = ({self._nodes[name]: value for name, value in side.items()} for side in torch.load(dense, weights_only=True))
        return first, dense, cut

    def close(self) -> None:
        self._kept = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
