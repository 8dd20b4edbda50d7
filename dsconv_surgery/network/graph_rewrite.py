"""Trace a model to a torch.fx graph, and rewrite the calls of cut layers in one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from dsconv_surgery.network.layers import is_layer
from dsconv_surgery.support.inputs import Inputs


class _Tracer(fx.Tracer):
    """Does not trace into subclasses of convolutions and linear layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_layer(m) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.GraphModule:
    """A graph over the model's own modules in which every layer is a node.

    Raises:
        TypeError: forward was replaced on the instance, and fx would trace the class's.
    """
    if "forward" in vars(model):
        raise TypeError("forward was replaced on the instance, and fx would trace the method of the class.")
    patched = {name: getattr(nn.Module, name) for name in ("__call__", "__getattr__")}
    try:
        return fx.GraphModule(model, _Tracer().trace(model))
    finally:  # fx patches these methods, and leaves them so if Ctrl-C comes while it restores them
        for name, method in patched.items():
            setattr(nn.Module, name, method)


def placeholder_values(model: nn.Module, graph: fx.GraphModule, inputs: Inputs) -> list[Any]:
    """The values of the placeholders in a model's graph, in order; TypeError if the model does not take these inputs."""
    bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    bound.apply_defaults()
    return [bound.arguments[str(node.target).lstrip("*")] for node in graph.graph.find_nodes(op="placeholder") if node.target[0] != "*"]


def expand_calls(model: nn.Module, chains: Mapping[str, Sequence[str]]) -> None:
    """In a GraphModule, replace each call of a cut layer by calls of its links. Other modules stay as they are.

    Args:
        model: a copy whose cut layers are chains already.
        chains: the link names of each cut layer, in running order.
    """
    if not isinstance(model, fx.GraphModule):
        return
    for name, links in chains.items():
        for node in model.graph.find_nodes(op="call_module", target=name):
            value: Any = node.args[0] if node.args else node.kwargs["input"]
            with model.graph.inserting_before(node):
                for link in links:
                    value = model.graph.call_module(f"{name}.{link}", (value,))
            _substitute(model, [node], value)
    model.graph.lint()  # only now: until the last call is replaced, the graph calls modules that no longer exist
    model.recompile()


def collapse_calls(model: nn.Module, chains: Mapping[str, Sequence[str]]) -> None:
    """The reverse of `expand_calls`, for a copy whose chains are single layers already."""
    if not isinstance(model, fx.GraphModule):
        return
    for name, links in chains.items():
        for last in model.graph.find_nodes(op="call_module", target=f"{name}.{links[-1]}"):
            nodes = [last]  # from the last link to the first
            for link in reversed(links[:-1]):
                previous = nodes[-1].args[0]
                if not isinstance(previous, fx.Node) or previous.target != f"{name}.{link}":
                    raise ValueError(f"{name}: expected a call of {link} before {nodes[-1]}, found {previous}. Undo edits of its graph.")
                nodes.append(previous)
            with model.graph.inserting_before(last):
                call = model.graph.call_module(name, nodes[-1].args)
            _substitute(model, nodes, call)
    model.graph.lint()
    model.recompile()


def _substitute(model: fx.GraphModule, nodes: Sequence[fx.Node], result: fx.Node) -> None:
    """Use `result` for the first of some nodes, and erase them all, users before what they use."""
    result.meta = dict(nodes[0].meta)
    nodes[0].replace_all_uses_with(result)
    for node in nodes:
        model.graph.erase_node(node)
