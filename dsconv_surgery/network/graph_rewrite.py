"""Look at a model: which layers are there, which can be cut, on what sizes they run. The only user of torch.fx."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import fx, nn

from dsconv_surgery.network.layers import is_layer


class _Tracer(fx.Tracer):
    """Keeps subclasses of convolutions whole, which torch.fx would trace through."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_layer(m) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.GraphModule:
    """The model as a graph over its own modules, every layer a node."""
    return fx.GraphModule(model, _Tracer().trace(model))


def graph_calls(model: fx.GraphModule, target: str) -> Iterator[fx.Node]:
    """The nodes that call the submodule of this name."""
    return (node for node in list(model.graph.nodes) if node.op == "call_module" and node.target == target)


def expand_calls(model: nn.Module, chains: Mapping[str, Sequence[str]]) -> None:
    """In a GraphModule, write each call of a cut layer as calls of its links, one node each; any other module calls its chain itself.

    Args:
        model: holds the chains already.
        chains: layer name -> its links' names, in running order.
    """
    if not isinstance(model, fx.GraphModule):
        return
    for name, links in chains.items():
        for node in graph_calls(model, name):
            value: Any = node.args[0] if node.args else node.kwargs["input"]
            with model.graph.inserting_before(node):
                for link in links:
                    value = model.graph.call_module(f"{name}.{link}", (value,))
            value.meta = dict(node.meta)
            node.replace_all_uses_with(value)
            model.graph.erase_node(node)
    _settle(model)


def collapse_calls(model: nn.Module, chains: Mapping[str, Sequence[str]]) -> None:
    """The reverse of `expand_calls`; `model` holds the single layers already."""
    if not isinstance(model, fx.GraphModule):
        return
    for name, links in chains.items():
        for last in graph_calls(model, f"{name}.{links[-1]}"):
            run = [last]
            for link in reversed(links[:-1]):
                before = run[-1].args[0]
                if not isinstance(before, fx.Node) or before.target != f"{name}.{link}":
                    raise ValueError(f"{name}: its links no longer run one after the other in the graph, found {before} before {run[-1]}.")
                run.append(before)
            with model.graph.inserting_before(last):
                whole = model.graph.call_module(name, run[-1].args)
            whole.meta = dict(last.meta)
            last.replace_all_uses_with(whole)
            for node in run:
                model.graph.erase_node(node)
    _settle(model)


def _settle(model: fx.GraphModule) -> None:
    # Once, at the end: halfway through, the graph still calls modules that are no longer there.
    model.graph.lint()
    model.recompile()
