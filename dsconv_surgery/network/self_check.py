"""The check after a cut: the cut network computes what the dense network computes with the outputs of its cut layers replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dsconv_surgery.network.layers import named_layers
from dsconv_surgery.support.copies import evaluation_copy, run_model
from dsconv_surgery.support.formatting import as_sentence
from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.outputs import all_tensors, output_tensors

# Largest difference by dtype, relative to the largest value: the operations are the same, only their order on a GPU may differ.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
LOW_PRECISION_TOLERANCE = 1e-2


class DenseRunError(ValueError):
    """The dense network does not run on the inputs of the check, or none of its outputs is finite."""


def check_computes_same(dense: nn.Module, cut: nn.Module, last_links: Mapping[str, str], inputs: Inputs) -> None:
    """Raise ValueError if a cut network does not compute what the dense network computes with chains in the place of its layers.

    Args:
        dense, cut: networks with values; neither is changed.
        last_links: cut layers, and the name of the last link of each chain.
        inputs: what both networks run on, in evaluation mode.
    """
    if any(tensor.is_meta for tensor in (*dense.parameters(), *dense.buffers(), *cut.parameters(), *cut.buffers())):
        return
    sides = evaluation_copy(dense), evaluation_copy(cut)
    calls = _replace_outputs(sides[0], sides[1], list(last_links)), _count_calls(sides[1], last_links)
    with torch.no_grad():
        try:
            expected = run_model(sides[0], inputs)
        except Exception as error:
            raise DenseRunError(
                f"the dense network does not run on the inputs of the check: {as_sentence(error)} Pass example inputs as "
                "apply_plan(model, plan, *example_inputs), or check=False."
            ) from error
        try:
            result = run_model(sides[1], inputs)
        except Exception as error:
            raise ValueError(
                f"the cut network does not run, but the dense network does: {as_sentence(error)} It uses more of a layer "
                f"than a call. Exclude that layer; these were cut: {', '.join(list(last_links)[:5])}."
            ) from error
    if not calls[0]:
        raise ValueError(
            f"none of the cut layers ({', '.join(list(last_links)[:5])}) is called when a copy of the network runs. Its forward may belong "
            "to the original network, as a function in an attribute does. Define forward as a method of the class."
        )
    if calls[0] != calls[1] or not outputs_equal(expected, result):
        raise ValueError(_explain(dense, cut, last_links, inputs))
    tensors = [tensor for tensor in output_tensors(expected) if tensor.numel()]
    if tensors and not any(bool(tensor.isfinite().any()) for tensor in tensors):
        raise DenseRunError(
            "all outputs on the inputs of the check are NaN or infinite, so they cannot be compared. Pass example inputs for which the "
            "network's outputs are finite, or repair the network."
        )


def _replace_outputs(dense: nn.Module, cut: nn.Module, names: list[str]) -> list[str]:
    """Replace the outputs of layers by those of the chains; the list that names each call when it is made."""
    calls: list[str] = []

    def replace(name: str, chain: nn.Module) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, _output: Any) -> Any:
            calls.append(name)
            return chain(*args, **kwargs)

        return hook

    for name in names:
        # A copy, because calls of the chain itself are counted.
        dense.get_submodule(name).register_forward_hook(replace(name, evaluation_copy(cut.get_submodule(name))), with_kwargs=True)
    return calls


def _count_calls(cut: nn.Module, last_links: Mapping[str, str]) -> list[str]:
    calls: list[str] = []
    for name, link in last_links.items():
        cut.get_submodule(name).get_submodule(link).register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


def outputs_equal(expected: Any, result: Any) -> bool:
    """Whether two outputs of a network are equal but for rounding; whole numbers, such as classes, have to be the same."""
    sides = [[*output_tensors(side), *(t for t in all_tensors(side) if _is_whole(t))] for side in (expected, result)]
    return len(sides[0]) == len(sides[1]) and all(map(is_close, *sides))


def _is_whole(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def is_close(a: Tensor, b: Tensor) -> bool:
    """Whether two results of the same operations are equal but for rounding, relative to the largest value."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    values = a[a.isfinite()]
    largest = float(values.abs().max()) if values.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=TOLERANCES.get(a.dtype, LOW_PRECISION_TOLERANCE) * largest, equal_nan=True)


def _explain(dense: nn.Module, cut: nn.Module, last_links: Mapping[str, str], inputs: Inputs) -> str:
    """The message for networks that differ: run both again, and name the first layer with another output."""
    sides = evaluation_copy(dense), evaluation_copy(cut)
    _replace_outputs(sides[0], sides[1], list(last_links))
    outputs: tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]] = ([], [])
    for name in (names[0] for names in named_layers(dense).values()):
        modules = [sides[0].get_submodule(name), sides[1].get_submodule(name)]
        if name in last_links:
            modules[1] = modules[1].get_submodule(last_links[name])
        for module, side in zip(modules, outputs, strict=True):
            module.register_forward_hook(lambda _m, _args, output, name=name, side=side: side.append((name, output.detach().clone())))
    with torch.no_grad():
        for network in sides:
            run_model(network, inputs)
    place = "after the last layer"
    for (expected_name, expected), (name, result) in zip(*outputs, strict=False):
        if expected_name != name or not is_close(expected, result):
            place = f"in the output of layer {expected_name!r}"
            break
    return (
        f"the cut network does not compute what the dense network computes with the same chains in the place of its layers; they differ "
        f"first {place}. The network treats a layer by its type, or keeps it somewhere else. Exclude the layers before that place."
    )
