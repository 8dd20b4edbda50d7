"""Make layers plain whose forward only computes a weight or pads the input: weight norm, standardised weights, 'same' padding."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsconv_surgery.network.geometry import Pair
from dsconv_surgery.network.layer_call import LayerCall, input_shapes, record_call
from dsconv_surgery.network.layers import (
    carry_attributes,
    check_unwrapped,
    is_plain,
    layers_in_encoders,
    named_layers,
    uncarried_attributes,
)
from dsconv_surgery.network.source_reads import source_reads
from dsconv_surgery.support.copies import copy_model
from dsconv_surgery.support.random_state import preserve_random_state

TOLERANCE = 1e-5  # relative, of outputs in float32 and float64; of lower precisions, 16 roundings


class SamePad2d(nn.Module):
    """Zero padding as TensorFlow's 'same': `ceil(size / stride)` outputs, the odd pixel at the bottom and on the right."""

    def __init__(self, kernel_size: Pair, stride: Pair = (1, 1), dilation: Pair = (1, 1)) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation

    def pads(self, size: Any) -> tuple[int, int, int, int]:
        """Left, right, top and bottom for an input of (height, width)."""
        axes = zip(size, self.kernel_size, self.stride, self.dilation, strict=True)
        height, width = (torch.sym_max(d * (k - 1) - (n - 1) % s, 0) for n, k, s, d in axes)
        return width // 2, width - width // 2, height // 2, height - height // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pads((x.shape[-2], x.shape[-1])))

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}"


def plain(model: nn.Module) -> nn.Module:
    """Make a copy of a network in which layers that only compute their weight or pad their input are plain nn.Conv2d and nn.Linear.

    Such a layer computes `conv(pad(x), w(v), b)`, where w(v) does not depend on the input x: 'same' padding, standardised weights,
    weight norm, spectral norm, pruning, and parametrisations. The plain layer holds `w(v)` as its weight and pads by itself. If the
    padding depends on the input size, it is an nn.Sequential of `SamePad2d` and nn.Conv2d. Names of modules, dtypes, devices, training
    flags and `requires_grad` stay.

    Each such layer runs alone in evaluation mode, on random inputs of several sizes. It is replaced only if outputs agree to a relative
    error of 1e-5. Other layers stay as they are: `find_convs` tells why.

    Args:
        model: any nn.Module. It is not changed.

    Returns:
        The copy. To load a network that was cut from it, pass `plain(fresh_model)` to `load`.

    Raises:
        TypeError: the model is compiled, scripted or wrapped for data parallelism, or its class does not let submodules be replaced.

    Source: Qiao et al. 2019 (weight standardisation); Salimans & Kingma 2016 (weight norm); Miyato et al. 2018 (spectral norm).

    Example:
        >>> small = compress(plain(model), images, budget=Budget(macs=0.5))
    """
    check_unwrapped(model)
    layers = named_layers(model)
    reads, in_encoder = source_reads(model, layers), layers_in_encoders(model)
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    by_id: dict[int, Any] = {}
    replaced: dict[str, nn.Module] = {}
    for layer, (name, *_) in layers.items():
        own = Counter(id(p) for module in layer.modules() for p in module._parameters.values() if p is not None)
        tied = any(uses[key] > count for key, count in own.items())
        read = any(not r.only_properties for r in reads.get(layer, ()))
        if tied or read or layer in in_encoder or _holds_more(layer) or is_plain(layer):
            continue
        with preserve_random_state(), torch.inference_mode(False):
            result = _plain_layer(layer)
        if result is not None and not (reads.get(layer) and isinstance(result, nn.Sequential)):
            by_id[id(layer)] = replaced[name] = result
    result = copy_model(model, by_id)
    if id(model) in by_id:
        return result
    for name, module in replaced.items():
        if result.get_submodule(name) is not module:
            raise TypeError(f"{name}: cannot be replaced, as {type(model).__name__} or a module in it copies itself (__deepcopy__).")
    return result


def _holds_more(layer: nn.Module) -> bool:
    """Whether a layer has hooks beside those of torch.nn.utils that compute its weight, or objects that would be lost."""
    hooks = [hook for name, group in vars(layer).items() if name.endswith("_hooks") for hook in group.values()]
    modules = [getattr(hook, "hook", hook).__module__ for hook in hooks]  # torch wraps some hooks in an object
    others = {*uncarried_attributes(layer)} - {"weight", "bias"}  # what the hooks computed
    return bool(others) or not all(name.startswith("torch.nn.utils.") for name in modules)


def _plain_layer(layer: nn.Module) -> nn.Module | None:
    """A plain layer with the same outputs in evaluation mode, or None."""
    parameters = list(layer.parameters())
    if not isinstance(layer, nn.Conv2d | nn.Linear) or not parameters or not all(p.is_floating_point() for p in parameters):
        return None
    shapes, generator, probe = list(input_shapes(layer)), torch.Generator("cpu").manual_seed(0), copy_model(layer).eval()
    inputs = [torch.randn(shape, generator=generator, device="cpu").to(parameters[0]) for shape in (shapes[0], shapes[-1])]
    try:
        computed = [record_call(probe, x) for x in inputs]
        probe.to("meta")  # other sizes and modes: only the geometry counts
        calls = [
            (shape, record_call(probe.train(mode), inputs[0].new_empty(shape, device="meta"))) for mode in (False, True) for shape in shapes
        ]
        result = _build([*zip((x.shape for x in inputs), computed, strict=True), *calls])
        if result is None or not all(_agree(call, result, x) for call, x in zip(computed, inputs, strict=True)):
            return None
    except Exception:  # the layer's code may raise anything: the layer stays
        return None
    bias = layer._parameters.get("bias")
    for name, parameter in result.named_parameters():
        sources = [bias] if name.endswith("bias") and bias is not None else [p for p in parameters if p is not bias]
        parameter.requires_grad_(any(p.requires_grad for p in sources))
    carry_attributes(layer, result)
    return result.train(layer.training)


def _build(calls: list[tuple[tuple[int, ...], LayerCall | None]]) -> nn.Module | None:
    """A plain layer, with values of the first call, that makes the calls recorded for some input shapes; None if there is none."""
    first = calls[0][1]
    if first is None or any(call is None or call.geometry != first.geometry for _, call in calls):
        return None
    pads = [(call.pads, shape) for shape, call in calls if call is not None]
    outputs, inputs, *kernel = *first.weight.shape, *(1,) * (2 if first.product == "linear" else 0)
    same = SamePad2d((kernel[0], kernel[1]), first.stride, first.dilation)
    padding, mode = first.padding, "zeros" if first.pad_mode == "constant" else first.pad_mode
    in_front = False
    if first.pads and first.padding not in ((0, 0), "valid"):
        return None
    if first.pads and first.pads[::2] == first.pads[1::2] and all(other == first.pads for other, _ in pads):
        padding = (first.pads[2], first.pads[0])
    elif first.pads and mode == "zeros" and all(other == same.pads(shape[-2:]) for other, shape in pads):
        padding, in_front = (0, 0), True
    elif first.pads:
        return None
    options: Any = {"bias": first.bias is not None, "device": first.weight.device, "dtype": first.weight.dtype}
    if first.product == "linear":
        result: Any = nn.utils.skip_init(nn.Linear, inputs, outputs, **options)
    else:
        geometry: Any = (inputs * first.groups, outputs, tuple(kernel), first.stride, padding, first.dilation, first.groups)
        result = nn.utils.skip_init(nn.Conv2d, *geometry, padding_mode=mode, **options)
    result.weight = nn.Parameter(first.weight.detach().clone())
    if first.bias is not None:
        result.bias = nn.Parameter(first.bias.detach().clone())
    return nn.Sequential(same, result) if in_front else result


@torch.no_grad()
def _agree(call: LayerCall | None, result: Any, x: Tensor) -> bool:
    """Whether a plain layer has the recorded weight and output; without values, the shape of the output."""
    if call is None:
        return False
    output, last = result(x), list(result.modules())[-1]
    tensors: Any = ((call.weight, last.weight), (call.bias, last.bias))
    if output.is_meta:
        return output.shape == call.output.shape
    if not all(tensor is None or torch.equal(tensor, other) for tensor, other in tensors):
        return False  # the weight or the bias depends on the input
    difference = torch.linalg.vector_norm((output - call.output).double())
    tolerance = max(TOLERANCE, 16 * torch.finfo(output.dtype).eps) if output.dtype.itemsize < 4 else TOLERANCE
    return bool(difference <= tolerance * torch.linalg.vector_norm(call.output.double()))
