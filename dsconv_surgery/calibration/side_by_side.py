"""Run the dense and the cut network in step over calibration images, and stop before each layer to be cut."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from dsconv_surgery.calibration.activation_store import ActivationStore, Values
from dsconv_surgery.calibration.hooks import Following, HookedPair, LayerCall
from dsconv_surgery.calibration.images import Images, check_model_runs
from dsconv_surgery.network.graph_rewrite import placeholder_values, trace
from dsconv_surgery.network.layers import is_layer, named_layers
from dsconv_surgery.network.self_check import is_close
from dsconv_surgery.support.copies import model_device, own_copy
from dsconv_surgery.support.outputs import output_tensors
from dsconv_surgery.support.random_state import generator_states, seeded, set_seed

_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_ADDITIONS: frozenset[Any] = frozenset((operator.add, operator.iadd, torch.add, "add", "add_"))
_RELUS: frozenset[Any] = frozenset((F.relu, torch.relu, torch.relu_, "relu", "relu_"))


class _Side(fx.Interpreter):
    """One of the two networks; `replacements` run in the place of the graph's modules of the same name."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.replacements: dict[str, nn.Module] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.replacements[target](*args, **kwargs) if target in self.replacements else super().call_module(target, args, kwargs)


class SideBySide:
    """A traced dense network and the network cut so far, run node by node over all images: one pass for all layers.

    A value lives from the node that computes it to the last node that uses it. With `probe`, there is the dense network alone, and it
    runs on few images: `outputs` tells what it computes if a layer is replaced.
    """

    def __init__(self, model: nn.Module, graph: fx.GraphModule, images: Images, names: Sequence[str], probe: bool = False) -> None:
        self._model, self._graph, self._images, self._probe = model, graph, images, probe
        self._dense, self._cut = _Side(graph), _Side(graph)
        self._nodes = _layer_nodes(model, graph, names)
        self.following = {name: _following(graph, nodes[0]) if len(nodes) == 1 else Following() for name, nodes in self._nodes.items()}
        self.first_layer = next(iter(self._nodes), "")
        self._order = _running_order(graph, {self._nodes[name][0]: after.addend for name, after in self.following.items() if after.addend})
        self._position = {node: index for index, node in enumerate(self._order)}
        self._last_use = {value: index for index, node in enumerate(self._order) for value in node.all_input_nodes}
        self._draws: dict[fx.Node, bool] = {}  # whether a node's operation draws random numbers
        self._next = 0  # position of the node to run next
        self._store = ActivationStore(images.settings.memory, graph)

    def groups(self) -> Iterator[list[str]]:
        """The layers in running order, in groups that are handled in one pass: here each alone."""
        first = {name: self._position[nodes[0]] for name, nodes in self._nodes.items()}
        for name in sorted(first, key=first.__getitem__):
            self._advance(first[name])
            yield [name]

    def calls(self, names: Sequence[str]) -> Iterator[LayerCall]:
        """Every call of the layers of a group on all images, a few images at a time."""
        for name in names:
            nodes, addend = self._nodes[name], self.following[name].addend
            for first_image, dense, cut in self._store:
                if len(nodes) > 1:  # a later call needs the outputs of earlier ones: run on with copies, this layer still dense
                    dense, cut = _copied(dense), _copied(cut)
                position = self._next
                for node in nodes:
                    self._run(first_image, dense, cut, position, self._position[node])
                    position, (source,) = self._position[node], node.all_input_nodes
                    with torch.no_grad():
                        target = self._graph.get_submodule(str(node.target))(dense[source])
                    shortcut = (dense[addend], cut[addend]) if addend in dense else None
                    yield LayerCall(name, first_image, dense[source], cut[source], target, shortcut)

    def outputs(self, name: str, replacement: nn.Module | None) -> Iterator[Any]:
        """The network's output for every chunk of images, run from the values before a layer, with the layer replaced or as it is."""
        first = self._position[self._nodes[name][0]]
        if first < self._next:
            self.close()
        if first > self._next:
            self._advance(first)
        if replacement is not None:
            self._dense.replacements = {str(node.target): replacement for node in self._nodes[name]}
        try:
            for first_image, dense, _ in self._store:
                yield self._run(first_image, _copied(dense), None, self._next, len(self._order))
        finally:
            self._dense.replacements = {}

    def install(self, name: str, layer: nn.Module, batchnorm: nn.Module | None) -> None:
        """Replace a layer of the cut network, and the BatchNorm after it if there is one."""
        self._cut.replacements.update({str(node.target): layer for node in self._nodes[name]})
        if batchnorm is not None:
            self._cut.replacements[str(self.following[name].batchnorm)] = batchnorm

    def close(self) -> None:
        """Release the stored values, and delete temporary files."""
        self._store.close()
        self._next = 0

    def _advance(self, stop: int) -> None:
        """Run both networks up to a position, for all images."""
        store = ActivationStore(self._images.settings.memory, self._graph)
        try:
            self._fill(store, stop)
        except BaseException:  # Ctrl-C, too
            store.close()
            raise
        self._store.close()
        self._next, self._store = stop, store

    def _fill(self, store: ActivationStore, stop: int) -> None:
        """Store the values of both networks at a position, for all images."""
        if self._next == 0:  # both networks are the same up to the first cut
            for first_image, _, inputs in self._images.probe_batches() if self._probe else self._images:
                dense: Values = {}
                values = own_copy(inputs, model_device(self._graph))  # the network may change them in place
                self._dense.args_iter = iter(placeholder_values(self._model, self._graph, values))
                self._run(first_image, dense, None, 0, stop)
                store.add(first_image, dense, {} if self._probe else _copied(dense))
        for first_image, dense, cut in self._store.drain():
            self._run(first_image, dense, None if self._probe else cut, self._next, stop)
            store.add(first_image, dense, cut)

    @torch.no_grad()
    def _run(self, first_image: int, dense: Values, cut: Values | None, start: int, stop: int) -> Any:
        """Run the nodes from `start` up to `stop` on some images' values, and drop the values that no later node uses.

        Returns the dense network's value of the last node.

        """
        result = None
        nodes = self._order[start:stop]
        with seeded(first_image) if any(self._draws.get(node, True) for node in nodes) else nullcontext():
            for index, node in enumerate(nodes, start):
                for side, values in ((self._dense, dense), (self._cut, cut)):
                    if values is not None:
                        side.env = values
                        values[node] = self._run_node(side, node, first_image * len(self._order) + index)
                        result = values[node] if values is dense else result
                        for value in (node, *node.all_input_nodes):
                            if self._last_use.get(value, -1) <= index:
                                values.pop(value, None)
                        side.env = {}
        return result

    def _run_node(self, side: _Side, node: fx.Node, seed: int) -> Any:
        """Run a node. Random draws depend on the node and the images only, so they are the same in both networks.

        Seeding takes longer than many an operation, so nodes that drew nothing on their first images are not seeded again.
        """
        if not self._draws.get(node, True):
            return side.run_node(node)
        set_seed(seed)
        before = None if node in self._draws else generator_states()
        result = side.run_node(node)
        self._draws.setdefault(node, before is None or generator_states() != before)
        return result


NetworkPair = SideBySide | HookedPair


def network_pair(model: nn.Module, images: Images, names: Sequence[str]) -> NetworkPair:
    """A dense network and its copy to be cut at these layers: by its graph where there is a correct one, else by hooks."""
    graph = checked_trace(model, images)
    return HookedPair(model, images, names) if graph is None else SideBySide(model, graph, images, names)


def checked_trace(model: nn.Module, images: Images) -> fx.GraphModule | None:
    """The model's graph, if the model can be traced and the graph's output on the first images is the same."""
    expected = output_tensors(check_model_runs(model, images))
    if is_layer(model):  # its graph would hold the layer's operations
        return None
    first_image, _, inputs = next(iter(images))
    try:
        with torch.no_grad():
            graph = trace(model)
            values = placeholder_values(model, graph, own_copy(inputs, model_device(model)))
            with seeded(first_image):
                outputs = output_tensors(fx.Interpreter(graph).run(*values))  # a GraphModule would print its traceback
    except Exception:  # tracing fails in many ways; a graph fails where the trace took another branch than these images
        return None
    return graph if len(expected) == len(outputs) and all(map(is_close, expected, outputs)) else None


def _layer_nodes(model: nn.Module, graph: fx.GraphModule, names: Sequence[str]) -> dict[str, list[fx.Node]]:
    """The graph's calls of each layer, by its aliases as well, in running order."""
    names_by_alias = {alias: name for aliases in named_layers(model).values() for name in aliases if name in names for alias in aliases}
    nodes: dict[str, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module" and str(node.target) in names_by_alias:
            nodes.setdefault(names_by_alias[str(node.target)], []).append(node)
    return nodes


def _running_order(graph: fx.GraphModule, addends: Mapping[fx.Node, fx.Node]) -> list[fx.Node]:
    """The graph's nodes, each layer after the other addend of its sum unless an operation in place forbids it.

    Where both addends come from layers to cut, the layer that is first in the graph stays first.
    """
    order: dict[fx.Node, None] = {}
    started: set[fx.Node] = set()  # two layers may each come from the addend of the other

    def place(node: fx.Node) -> None:
        if node in addends and node not in started:
            started.add(node)
            earlier = [other for other in _ancestors(addends[node]) if other not in order]
            if not any(_in_place(graph, other) for other in earlier):
                for other in earlier:
                    place(other)
        order.setdefault(node)

    for node in graph.graph.nodes:
        place(node)
    return list(order)


def _in_place(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node may change its input."""
    if node.op == "call_module":
        return bool(getattr(graph.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
    augmented = name.startswith("i") and hasattr(operator, f"__{name}__")  # operator.iadd and others
    return augmented or name.endswith("_") or any(value is True for value in (*node.args, *node.kwargs.values()))


def _following(graph: fx.GraphModule, layer: fx.Node) -> Following:
    batchnorm, addend = None, None
    node = _only_user(layer)
    if node is not None and node.op == "call_module":
        module: Any = graph.get_submodule(str(node.target))
        called_once = sum(other.target == node.target for other in graph.graph.nodes) == 1
        if type(module) in _BATCHNORMS and called_once and not module.training and module.running_mean is not None:
            batchnorm, node = str(node.target), _only_user(node)
    if node is not None and node.target in _ADDITIONS and not node.kwargs and len(node.args) == 2:
        addends = [other for other in node.all_input_nodes if layer not in _ancestors(other)]
        if len(node.all_input_nodes) != 2 or len(addends) != 1:
            return Following(batchnorm)
        addend, node = addends[0], _only_user(node)
    return Following(batchnorm, addend, node is not None and _is_relu(graph, node))


def _is_relu(graph: fx.GraphModule, node: fx.Node) -> bool:
    return type(graph.get_submodule(str(node.target))) is nn.ReLU if node.op == "call_module" else node.target in _RELUS


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _ancestors(node: fx.Node) -> list[fx.Node]:
    """A node and all nodes that it is computed from, in the graph's order."""
    ancestors, open_nodes = {node}, [node]
    while open_nodes:
        for earlier in open_nodes.pop().all_input_nodes:
            if earlier not in ancestors:
                ancestors.add(earlier)
                open_nodes.append(earlier)
    return [other for other in node.graph.nodes if other in ancestors]


def _copied(values: Values) -> Values:
    return dict(zip(values, copy.deepcopy(list(values.values())), strict=True))
