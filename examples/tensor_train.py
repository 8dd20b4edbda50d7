"""Add a scheme: a convolution as a tensor train, decomposed by tensorly (pip install tensorly).

python examples/tensor_train.py

`V[o,i,y,x] = sum_{a,b,c} R[a,i] Y[b,a,y] X[c,b,x] E[o,c]`: a 1x1, a k x 1, a 1 x k and a 1x1 convolution (Oseledets 2011). The
sums over a, b and c have at most `rank` terms each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import tensorly
import torch
from tensorly.decomposition import tensor_train
from torch import Tensor, nn

from dsconv_surgery import Budget, compress, fold_back, register_scheme
from dsconv_surgery.network.geometry import ConvSpec, Rank
from dsconv_surgery.schemes import Factors, Scheme, single_rank, split_taps


class TensorTrain(Scheme):
    """The TT-SVD of the kernel, with its dimensions in the order (in, height, width, out)."""

    name = "tensor_train"

    def terms(self, spec: ConvSpec, rank: int) -> tuple[int, int, int]:
        """The numbers of terms (a, b, c): the rank, but no more than an exact train needs."""
        (height, width), out = spec.kernel, spec.out_channels
        a = min(rank, spec.in_channels, height * width * out)
        b = min(rank, a * height, width * out)
        return a, b, min(rank, b * width, out)

    def full_rank(self, spec: ConvSpec) -> int:
        return max(self.terms(spec, spec.in_channels * spec.taps * spec.out_channels))

    def chain(self, spec: ConvSpec, rank: Rank) -> dict[str, ConvSpec]:
        a, b, c = self.terms(spec, single_rank(rank))
        vertical, horizontal = split_taps(spec)
        return {
            "reduce": ConvSpec(spec.in_channels, a),
            "vertical": replace(vertical, in_channels=a, out_channels=b),
            "horizontal": replace(horizontal, in_channels=b, out_channels=c),
            "expand": ConvSpec(c, spec.out_channels),
        }

    def factorize(self, spec: ConvSpec, weight: Tensor, ranks: list[Rank], rough: bool = False) -> Iterator[Factors]:
        for rank in ranks:
            tt_rank = [1, *self.terms(spec, single_rank(rank)), 1]
            with tensorly.backend_context("pytorch", local_threadsafe=True):  # the caller's backend is restored
                trains = [list(tensor_train(kernel.permute(1, 2, 3, 0), tt_rank)) for kernel in weight]
            reduce, vertical, horizontal, expand = (torch.stack(cores) for cores in zip(*trains, strict=True))  # (g, left, size, right)
            yield {
                "reduce": reduce.squeeze(1).mT[..., None, None],
                "vertical": vertical.permute(0, 3, 1, 2).unsqueeze(4),
                "horizontal": horizontal.permute(0, 3, 1, 2).unsqueeze(3),
                "expand": expand.squeeze(3).mT[..., None, None],
            }

    def kernel(self, spec: ConvSpec, factors: Factors) -> Tensor:
        reduce, expand = factors["reduce"].flatten(2), factors["expand"].flatten(2)
        return torch.einsum("gai,gbay,gcbx,goc->goiyx", reduce, factors["vertical"].squeeze(4), factors["horizontal"].squeeze(3), expand)


def main() -> None:
    register_scheme(TensorTrain())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU(), nn.Conv2d(64, 64, 3, groups=2)).eval()
    images = torch.rand(64, 3, 16, 16)
    small = compress(model, images[:1], budget=Budget(macs=0.4), schemes="tensor_train", exclude="0", calibration=[images])
    print(small.report)
    with torch.no_grad():
        difference = (fold_back(small.model, small.plan)(images) - small.model(images)).abs().max()
    print(f"folded back into dense layers, outputs differ by {float(difference):.1e}")


if __name__ == "__main__":
    main()
