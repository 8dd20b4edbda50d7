"""Run the dense and the cut network side by side over calibration images, halting where layers are to be replaced."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dsconv_surgery.calibration.activation_store import ActivationStore, Values
from dsconv_surgery.calibration.hooks import Following, HookedPair, LayerCall, NetworkPair
from dsconv_surgery.calibration.images import Images, check_model_runs
from dsconv_surgery.network.graph_rewrite import trace
from dsconv_surgery.network.layers import is_layer, named_layers
from dsconv_surgery.support.copies import model_device, to_device

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_ADDITIONS: frozenset[Any] = frozenset((operator.add, operator.iadd, torch.add, "add", "add_"))
_RELUS: frozenset[Any] = frozenset((F.relu, torch.relu, torch.relu_, "relu", "relu_"))


def network_pair(model: nn.Module, images: Images, names: Sequence[str]) -> NetworkPair:
    """A walk where the model can be traced and its trace does as it does, passes with hooks elsewhere."""
    graph = _checked_trace(model, images)
    return HookedPair(model, images, names) if graph is None else SideBySide(model, graph, images, names)


def _checked_trace(model: nn.Module, images: Images) -> fx.GraphModule | None:
    """The model's graph, if it can be traced and computes what the model does."""
    expected = pytree.tree_leaves(check_model_runs(model, images))
    if is_layer(model):  # tracing would go into it
        return None
    _, inputs = next(iter(images))
    try:
        with torch.no_grad():
            graph = trace(model)
            found = pytree.tree_leaves(graph(*to_device(inputs, model_device(model))))
    except Exception:  # whatever stands against tracing, or a graph that took another turn than these images would
        return None
    same = (torch.allclose(a, b, equal_nan=True) if isinstance(a, Tensor) else a == b for a, b in zip(expected, found, strict=False))
    return graph if len(expected) == len(found) and all(same) else None


class _Side(fx.Interpreter):
    """One of the two networks; `instead` holds modules that stand in for those of the graph."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.instead: dict[str, nn.Module] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.instead[target](*args, **kwargs) if target in self.instead else super().call_module(target, args, kwargs)


class SideBySide:
    """A traced network walked node by node over all images at once: one pass for all layers.

    Values live from the node that makes them to the last that uses them, in memory up to the calibration's limit, in temporary
    files beyond.
    """

    def __init__(self, model: nn.Module, graph: fx.GraphModule, images: Images, names: Sequence[str]) -> None:
        self.graph, self.images = graph, images
        self._dense, self._cut = _Side(graph), _Side(graph)
        known = {name: next((n for n in every if n in names), None) for every in named_layers(model).values() for name in every}
        self._nodes: dict[str, list[fx.Node]] = {}
        for node in graph.graph.nodes:
            name = known.get(str(node.target)) if node.op == "call_module" else None
            if name is not None:
                self._nodes.setdefault(name, []).append(node)
        self.after = {name: _following(graph, nodes[0]) if len(nodes) == 1 else Following() for name, nodes in self._nodes.items()}
        self._order = self._ordered()
        self._place = {node: at for at, node in enumerate(self._order)}
        self._last_use = {value: at for at, node in enumerate(self._order) for value in node.all_input_nodes}
        self._at, self._store = 0, ActivationStore(images.settings.memory, graph)

    def groups(self) -> Iterator[list[str]]:
        for name in sorted(self._nodes, key=lambda name: self._place[self._nodes[name][0]]):
            self._advance(self._place[self._nodes[name][0]])
            yield [name]

    def calls(self, names: Sequence[str]) -> Iterator[LayerCall]:
        for name in names:
            nodes, other = self._nodes[name], self.after[name].other
            for first, dense, cut in self._store:
                if len(nodes) > 1:  # later calls depend on the first: run ahead, on copies, the layer still dense
                    dense, cut = _copied(dense), _copied(cut)
                at = self._at
                for node in nodes:
                    with torch.no_grad():
                        self._run(dense, cut, at, self._place[node])
                        at = self._place[node]
                        x = dense[node.all_input_nodes[0]]
                        wanted = self.graph.get_submodule(str(node.target))(x)
                    shortcut = (dense[other], cut[other]) if other is not None and other in dense else None
                    yield LayerCall(name, first, x, cut[node.all_input_nodes[0]], wanted, shortcut)

    def install(self, name: str, layer: nn.Module, norm: nn.Module | None) -> None:
        self._cut.instead.update({str(node.target): layer for node in self._nodes[name]})
        if norm is not None:
            self._cut.instead[str(self.after[name].norm)] = norm

    def outputs(self) -> Iterator[tuple[int, Any, Any]]:
        self._advance(len(self._order))
        return ((first, dense[self._order[-1]], cut[self._order[-1]]) for first, dense, cut in self._store)

    def close(self) -> None:
        self._store.close()

    def _advance(self, stop: int) -> None:
        """Run both networks up to a node, for all images."""
        store = ActivationStore(self.images.settings.memory, self.graph)
        with torch.no_grad():
            if self._at == 0:  # up to the first cut the two are one
                for first, inputs in self.images:
                    dense: Values = {}
                    self._dense.args_iter = iter(to_device(inputs, model_device(self.graph)))
                    self._run(dense, None, 0, stop)
                    store.keep(first, dense, _copied(dense))
            else:
                for first, dense, cut in self._store.drain():
                    self._run(dense, cut, self._at, stop)
                    store.keep(first, dense, cut)
        self._store.close()
        self._at, self._store = stop, store

    def _run(self, dense: Values, cut: Values | None, start: int, stop: int) -> None:
        for at in range(start, stop):
            node = self._order[at]
            for side, values in ((self._dense, dense), (self._cut, cut)):
                if values is not None:
                    side.env = values
                    values[node] = side.run_node(node)
                    for value in (node, *node.all_input_nodes):
                        if self._last_use.get(value, -1) <= at and node.op != "output":
                            values.pop(value, None)
                    side.env = {}

    def _ordered(self) -> list[fx.Node]:
        """The graph's nodes, the shortcut's before the layer that closes the branch beside it where nothing speaks against it."""
        order: dict[fx.Node, None] = {}
        closing = {nodes[0]: other for name, nodes in self._nodes.items() if (other := self.after[name].other) is not None}

        begun: set[fx.Node] = set()  # both sides of a sum may be layers to cut, each the other's shortcut

        def place(node: fx.Node) -> None:
            if node in closing and node not in begun:
                begun.add(node)
                first = [n for n in _ancestors(closing[node]) if n not in order]
                if node not in first and not any(self._in_place(n) for n in first):
                    for earlier in first:
                        place(earlier)
            order.setdefault(node)

        for node in self.graph.graph.nodes:
            if node not in order:
                place(node)
        return list(order)

    def _in_place(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self.graph.get_submodule(str(node.target)), "inplace", False))
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
        operators = name.startswith("i") and hasattr(operator, f"__{name}__")  # iadd and the like
        return operators or name.endswith("_") or any(value is True for value in (*node.args, *node.kwargs.values()))


def _following(graph: fx.GraphModule, node: fx.Node) -> Following:
    norm, other = None, None
    following = _only_user(node)
    if following is not None and following.op == "call_module":
        module: Any = graph.get_submodule(str(following.target))
        once = sum(n.target == following.target for n in graph.graph.nodes) == 1
        if type(module) in _NORMS and once and not module.training and module.running_mean is not None:
            norm, following = str(following.target), _only_user(following)
    if following is not None and following.target in _ADDITIONS and not following.kwargs and len(following.args) == 2:
        addends = [n for n in following.all_input_nodes if node not in _ancestors(n)]
        if len(following.all_input_nodes) == 2 and len(addends) == 1:
            other, following = addends[0], _only_user(following)
        else:
            following = None
    relu = following is not None and (
        following.target in _RELUS if following.op != "call_module" else type(graph.get_submodule(str(following.target))) is nn.ReLU
    )
    return Following(norm, other, relu)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _ancestors(node: fx.Node) -> list[fx.Node]:
    """A node and all that it is computed from, in the graph's order."""
    found, open_ends = {node}, [node]
    while open_ends:
        for earlier in open_ends.pop().all_input_nodes:
            if earlier not in found:
                found.add(earlier)
                open_ends.append(earlier)
    return [n for n in node.graph.nodes if n in found]


def _copied(values: Values) -> Values:
    return dict(zip(values, copy.deepcopy(list(values.values())), strict=True))
