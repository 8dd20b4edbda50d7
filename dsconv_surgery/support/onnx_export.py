"""Networks and chains of plain layers as ONNX, and onnxruntime sessions (needs the extra `onnx`)."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dsconv_surgery.support.copies import evaluation_copy
from dsconv_surgery.support.formatting import as_sentence, first_line
from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.outputs import output_tensors

TOLERANCE = 1e-4  # of the largest output
OPSET, IR_VERSION = 20, 10  # of chains; torch 2.13 writes the same for networks
PAD_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}  # torch's padding mode -> ONNX's


def import_onnx_extra(module: str) -> Any:
    """A module of the extra `onnx`; ValueError with the command that installs it if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"ONNX needs {module}: pip install 'dsconv_surgery[onnx]'.") from error


def network_to_onnx(model: nn.Module, inputs: Inputs) -> bytes:
    """A network in evaluation mode, for inputs of these shapes."""
    return _export(model, inputs)


def network_to_onnx_for_any_batch(model: nn.Module, inputs: Inputs) -> bytes:
    """A network in evaluation mode, for any batch size.

    Args:
        inputs: positional tensors, batch first, all with the same batch size.

    Raises:
        ValueError: the network cannot be exported, or in onnxruntime its outputs differ from torch's.
    """
    # torch.export takes a dimension of size one for a constant, so the example has a batch of two.
    batch = torch.export.Dim("batch")
    data = _export(model, _random_batch(inputs, 2), dynamic_shapes=tuple({0: batch} for _ in inputs.args))
    for size in (1, 3):
        _check(data, model, _random_batch(inputs, size))
    return data


def _random_batch(inputs: Inputs, size: int) -> Inputs:
    return Inputs(*(torch.randn(size, *tensor.shape[1:], dtype=tensor.dtype) for tensor in inputs.args))


def _check(data: bytes, model: nn.Module, inputs: Inputs) -> None:
    """Raise ValueError if onnxruntime's outputs differ from torch's by more than TOLERANCE, relative to the largest value."""
    try:
        with torch.no_grad():
            expected = output_tensors(evaluation_copy(model)(*inputs.args))
        results = output_tensors([torch.from_numpy(array) for array in session_call(data, inputs)()])
    except Exception as error:  # a network may raise anything
        size, problem = len(inputs.tensors[0]), as_sentence(first_line(error))
        raise ValueError(
            f"ONNX export: {type(model).__name__} does not run with a batch of {size}: {problem} If it takes one batch size only, "
            "export it with torch.onnx.export."
        ) from error
    for output, result in zip(expected, results, strict=True):
        difference = float((output - result).abs().max() / output.abs().max().clamp_min(1e-30)) if output.numel() else 0.0
        if not difference <= TOLERANCE:
            raise ValueError(
                f"ONNX export: outputs in onnxruntime differ from torch's by {difference:.2g} of the largest value, expected up to "
                f"{TOLERANCE:g}. Export another way, such as torch.onnx.export with another opset_version."
            )


def _export(model: nn.Module, inputs: Inputs, **options: Any) -> bytes:
    for module in ("onnx", "onnxscript"):
        import_onnx_extra(module)
    try:
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter about itself
            copy, args = evaluation_copy(model), tuple(value.clone() if isinstance(value, Tensor) else value for value in inputs.args)
            program: Any = torch.onnx.export(copy, args, kwargs=inputs.kwargs, dynamo=True, verbose=False, **options)
            return program.model_proto.SerializeToString()
    except Exception as error:  # the exporter raises many kinds of errors, and protobuf one for more than 2 GB
        problem = as_sentence(first_line(error.__cause__ or error))
        raise ValueError(f"ONNX export: {type(model).__name__} cannot be exported: {problem} See torch.onnx.export.") from error


def session_call(model: bytes, inputs: Inputs) -> Callable[[], Any]:
    """onnxruntime's call of a network on the CPU with torch's current thread count; it returns a list of arrays."""
    session = _open_session(model)
    names = [item.name for item in session.get_inputs()]
    return partial(session.run, None, dict(zip(names, map(_array, inputs.tensors), strict=True)))


def _open_session(model: bytes) -> Any:
    runtime = import_onnx_extra("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    # Otherwise threads of one session still wait actively while the next one is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3  # errors
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def chain_to_onnx(chain: nn.Module, inputs: Inputs) -> bytes:
    """A chain of plain nn.Conv2d and nn.Linear layers, one ONNX node each, without the seconds that an export takes."""
    onnx, (x,) = import_onnx_extra("onnx"), inputs.args
    graph: tuple[list[Any], list[Any]] = ([], [])
    name = "x"
    for index, layer in enumerate(chain.children()):
        name = _add_layer(onnx, graph, index, layer, name)
    kind = onnx.helper.np_dtype_to_tensor_dtype(_array(x).dtype)
    ends = [[onnx.helper.make_tensor_value_info(value, kind, shape)] for value, shape in (("x", list(x.shape)), (name, None))]
    result = onnx.helper.make_graph(graph[0], "chain", *ends, graph[1])
    return onnx.helper.make_model(result, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR_VERSION).SerializeToString()


def _add_layer(onnx: Any, graph: tuple[list[Any], list[Any]], index: int, layer: Any, x: str) -> str:
    """Add a layer's nodes and constants to a graph; the name of its output."""
    nodes, constants = graph
    parameters = []
    for name, parameter in layer.named_parameters():
        constants.append(onnx.numpy_helper.from_array(_array(parameter), f"{name}{index}"))
        parameters.append(f"{name}{index}")
    output = f"y{index}"
    if isinstance(layer, nn.Linear):
        nodes.append(onnx.helper.make_node("Gemm", [x, *parameters], [output], transB=1))
        return output
    pads = _pads(layer)
    if layer.padding_mode != "zeros":
        constants.append(onnx.numpy_helper.from_array(torch.tensor([0, 0, *pads[:2], 0, 0, *pads[2:]]).numpy(), f"pads{index}"))
        nodes.append(onnx.helper.make_node("Pad", [x, f"pads{index}"], [f"padded{index}"], mode=PAD_MODES[layer.padding_mode]))
        x, pads = f"padded{index}", [0, 0, 0, 0]
    geometry = {"kernel_shape": layer.kernel_size, "strides": layer.stride, "dilations": layer.dilation, "group": layer.groups}
    nodes.append(onnx.helper.make_node("Conv", [x, *parameters], [output], pads=pads, **geometry))
    return output


def _pads(layer: nn.Conv2d) -> list[int]:
    """Top, left, bottom and right padding."""
    if isinstance(layer.padding, str):
        totals = [d * (k - 1) if layer.padding == "same" else 0 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [total // 2 for total in totals] + [total - total // 2 for total in totals]
    return [*layer.padding, *layer.padding]


def _array(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().numpy()
