"""How strongly each layer's output moves the network's output: a second moment of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dsconv_surgery.calibration.images import Images
from dsconv_surgery.support import distributed
from dsconv_surgery.support.copies import copy_model, model_device, run_model, to_device


def output_metrics(model: nn.Module, images: Images, names: Sequence[str]) -> dict[str, Tensor]:
    """For each layer the second moment `sum g g^T` over output positions, (out, out), of the gradients g at the layer's output.

    g is the gradient of `v . f(x)`, with f the network and v drawn from a normal distribution. `E[g g^T]` is then the mean of
    `J^T J`, with J the Jacobian of f (Gauss-Newton, as in K-FAC, Martens & Grosse 2015). Layers whose gradients are not finite are
    left out; empty if the output has no gradient, or if the network cannot be differentiated, as with some operations in place.
    """
    probe = copy_model(model)
    for parameter in probe.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    sums: dict[str, Tensor] = {}
    draws = torch.Generator("cpu").manual_seed(images.settings.seed)

    def watch(name: str, layer: nn.Module, _args: object, output: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            rows = (gradient if isinstance(layer, nn.Linear) else gradient.movedim(1, -1)).flatten(0, -2).double()
            product = rows.mT @ rows
            sums[name] = sums[name] + product if name in sums else product

        output.register_hook(add)

    for name in names:
        probe.get_submodule(name).register_forward_hook(partial(watch, name))
    with torch.enable_grad():
        for first_image, _, inputs in images.probe_batches():
            try:
                outputs = [tensor for tensor in images.select_outputs(run_model(probe, inputs, first_image)) if tensor.requires_grad]
                drawn = [torch.randn(t.shape, generator=draws, device="cpu", dtype=torch.float32) for t in outputs]
                targets = [to_device(v, t.device).to(t.dtype) for v, t in zip(drawn, outputs, strict=True)]
                if outputs:
                    torch.autograd.backward(outputs, targets)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # torch refuses operations in place on values that a gradient needs
                outputs = []
            if not outputs:
                return {}
            probe.zero_grad(set_to_none=True)
    if distributed.process_and_world_size()[1] > 1:
        for name in names:
            size = model.get_submodule(name).get_parameter("weight").shape[0]
            sums[name] = distributed.all_reduce_sum(
                sums.get(name, torch.zeros(size, size, dtype=torch.float64, device=model_device(model)))
            )
    return {name: metric for name, metric in sums.items() if bool(metric.isfinite().all())}  # the root of zero has no finite gradient
