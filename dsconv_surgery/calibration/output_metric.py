"""How strongly each layer's output moves the network's output: a second moment of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dsconv_surgery.calibration.images import Images
from dsconv_surgery.support import distributed
from dsconv_surgery.support.copies import copy_model, model_device, run_model, to_device


def output_metrics(model: nn.Module, images: Images, names: Sequence[str]) -> dict[str, Tensor]:
    """For each layer the second moment `sum g g^T` over output positions, (out, out), of the gradients g at the layer's output.

    g is the gradient of `v . f(x)`, with f the network and v drawn from a normal distribution for each image. `E[g g^T]` is then the mean
    of `J^T J`, with J the Jacobian of f (Gauss-Newton, as in K-FAC, Martens & Grosse 2015). As there are few images, it is shrunk
    towards a multiple of the identity. Layers whose gradients are not finite are left out; empty if the output has no gradient, or if
    the network cannot be differentiated, as with some operations in place.
    """
    probe = copy_model(model)
    for parameter in probe.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    sums = {name: _Sums.zeros(model.get_submodule(name).get_parameter("weight")) for name in names}
    draws = torch.Generator("cpu").manual_seed(images.settings.seed)

    def watch(name: str, layer: nn.Module, _args: object, output: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            rows = (gradient if isinstance(layer, nn.Linear) else gradient.movedim(1, -1)).unsqueeze(1).flatten(1, -2).double()
            for image in rows:
                sums[name].add(image.mT @ image)

        output.register_hook(add)

    for name in names:
        probe.get_submodule(name).register_forward_hook(partial(watch, name))
    refused = False
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
            if refused := not outputs:
                break
            probe.zero_grad(set_to_none=True)
    if float(distributed.all_reduce_sum(torch.tensor(float(refused), device=model_device(probe)))):  # in any process
        return {}
    metrics = {name: total.all_reduced().shrunk() for name, total in sums.items()}
    # The root of zero has no finite gradient, and unused outputs have none.
    return {name: metric for name, metric in metrics.items() if bool(metric.isfinite().all()) and bool(metric.any())}


@dataclass
class _Sums:
    """Sums over images k of the second moments P_k of their gradients."""

    products: Tensor  # sum of P_k, (out, out)
    squares: Tensor  # sum of |P_k|^2
    images: Tensor  # their number n

    @classmethod
    def zeros(cls, weight: Tensor) -> _Sums:
        out = weight.shape[0]
        return cls(*(weight.new_zeros(shape, dtype=torch.float64) for shape in ((out, out), (), ())))

    def add(self, product: Tensor) -> None:
        """Add an image."""
        self.products += product
        self.squares += product.square().sum()
        self.images += 1

    def all_reduced(self) -> _Sums:
        """The sums over all processes."""
        return _Sums(*map(distributed.all_reduce_sum, (self.products, self.squares, self.images)))

    def shrunk(self) -> Tensor:
        """`(1 - s) M + s m I`, with M the mean of the P_k and m the mean of its diagonal.

        The shrinkage `s = sum_k |P_k - M|^2 / (n (n - 1) |M - m I|^2)`, at most 1, has the least expected error (Ledoit & Wolf 2004).
        """
        count = self.images.clamp(min=1)
        mean = self.products / count
        rest = mean - mean.diagonal().mean() * torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
        scatter = (self.squares - count * mean.square().sum()).clamp(min=0)
        share = scatter / (count * (count - 1) * rest.square().sum()).clamp(min=1e-300)
        return mean - torch.where(count > 1, share.clamp(max=1), 1.0) * rest
