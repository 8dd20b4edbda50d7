"""Factorise for the data: layer after layer in running order, on what the network already cut sees, towards what the dense one gives."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dsconv_surgery.calibration.images import Images
from dsconv_surgery.support import distributed
from dsconv_surgery.support.copies import model_device, to_device


def output_metrics(model: nn.Module, images: Images, names: Sequence[str]) -> dict[str, Tensor]:
    """For each layer the second moment (out, out) of the gradients that random directions of the network's outputs send to its own.

    An error of a layer's output counts as much as it moves the network's: `E[g g^T]` with g the gradient of `v . f(x)`, v drawn
    from a normal distribution, is the mean of `J^T J` for the Jacobian J (Gauss-Newton, as in K-FAC, Martens & Grosse 2015).
    """
    probe = copy.deepcopy(model).requires_grad_()
    sums: dict[str, Tensor] = {}
    draws = torch.Generator().manual_seed(images.settings.seed)

    def note(name: str, linear: bool, gradient: Tensor) -> None:
        rows = (gradient if linear else gradient.movedim(1, -1)).flatten(0, -2).double()
        sums[name] = sums.get(name, torch.zeros(())) + rows.mT @ rows

    def watch(name: str, layer: nn.Module, output: Tensor) -> None:
        output.register_hook(lambda gradient: note(name, isinstance(layer, nn.Linear), gradient))

    for name in names:
        layer = probe.get_submodule(name)
        layer.register_forward_hook(lambda _module, _args, output, name=name, layer=layer: watch(name, layer, output))
    with torch.enable_grad():
        for inputs in images.probe_batches():
            outputs = [
                t for t in pytree.tree_leaves(probe(*to_device(inputs, model_device(probe)))) if isinstance(t, Tensor) and t.requires_grad
            ]
            if not outputs:
                return {}
            probes = [torch.randn(t.shape, generator=draws).to(t) for t in outputs]
            torch.autograd.backward(outputs, probes)
            probe.zero_grad(set_to_none=True)
    if distributed.process_and_world_size()[1] > 1:
        zeros = {name: torch.zeros(2 * model.get_submodule(name).get_parameter("weight").shape[:1], dtype=torch.float64) for name in names}
        sums = {name: distributed.all_reduce_sum(sums.get(name, zeros[name])) for name in names}
    return sums
