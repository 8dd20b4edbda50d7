"""Depthwise, pointwise and depthwise separable convolutions, for networks written by hand."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Literal

from torch import nn

IntOrPair = int | tuple[int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class DepthwiseConv2d(nn.Conv2d):
    """A convolution that applies `kernels_per_layer` filters to each input channel separately.

    `out[i * m + j, v, h] = sum_yx D[i, j, y, x] in[i, v + y, h + x]` for input channel i < I and filter j < m = kernels_per_layer.
    For a kernel of K taps, it has K I m weights and needs K I m MACs per output pixel. A normal convolution to I m channels has
    K I^2 m of both.

    Args:
        in_channels: I; the output has `I * kernels_per_layer` channels.
        kernels_per_layer: m, the number of filters of each input channel.
        kernel_size, stride, padding, dilation, bias, padding_mode, device, dtype: as for nn.Conv2d.

    Raises:
        ValueError: kernels_per_layer is below 1.

    Source: Sifre 2014; Howard et al. 2017 (MobileNets).

    Example:
        >>> DepthwiseConv2d(16, kernels_per_layer=2, padding=1)(torch.rand(1, 16, 8, 8)).shape
        torch.Size([1, 32, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        kernels_per_layer: int = 1,
        kernel_size: IntOrPair = 3,
        stride: IntOrPair = 1,
        padding: IntOrPair | str = 0,
        dilation: IntOrPair = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if kernels_per_layer < 1:
            raise ValueError(f"DepthwiseConv2d: expected kernels_per_layer of 1 or more, found {kernels_per_layer}.")
        groups, out_channels = in_channels, in_channels * kernels_per_layer
        geometry = (kernel_size, stride, padding, dilation, groups)
        super().__init__(in_channels, out_channels, *geometry, bias, padding_mode, device, dtype)


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution: a linear map of the channels at each pixel.

    `out[o] = sum_i P[o, i] in[i]` for input channel i < I and output channel o < O. It has I O weights and needs I O MACs per output
    pixel.

    Args:
        in_channels, out_channels: I, O.
        bias, stride, device, dtype: as for nn.Conv2d.

    Example:
        >>> PointwiseConv2d(16, 32)(torch.rand(1, 16, 8, 8)).shape
        torch.Size([1, 32, 8, 8])
    """

    def __init__(
        self, in_channels: int, out_channels: int, bias: bool = True, stride: IntOrPair = 1, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(in_channels, out_channels, 1, stride, bias=bias, device=device, dtype=dtype)


class DepthwiseSeparableConv2d(nn.Sequential):
    """A depthwise convolution, then a pointwise one: a cheaper replacement of a normal k x k convolution.

    Its kernel is `V[o, i, y, x] = sum_j P[o, i, j] D[i, j, y, x]` for j < m = kernels_per_layer. For K taps, I input channels and
    O output channels:

    |                                   | normal | separable                        | separable / normal |
    |---|---|---|---|
    | weights, and MACs per output pixel | K I O  | K I m + m I O                    | m (1 / O + 1 / K)  |
    | bias                              | O      | O, of the pointwise convolution  | 1                  |

    With m = min(K, O), every normal convolution can be written so without error.

    Its submodules are `depthwise` and `pointwise`, as in layers cut with the scheme "depthwise", whose state_dicts it can load.

    Args:
        in_channels, out_channels: I, O.
        kernels_per_layer: m, the number of depthwise filters of each input channel.
        kernel_size, stride, padding, dilation, bias, padding_mode, device, dtype: as for nn.Conv2d.

    Raises:
        ValueError: kernels_per_layer is below 1.

    Source: Howard et al. 2017 (MobileNets); Guo et al. 2018 (several kernels per layer).

    Example:
        >>> DepthwiseSeparableConv2d(16, 32, kernels_per_layer=2, padding=1)(torch.rand(1, 16, 8, 8)).shape
        torch.Size([1, 32, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernels_per_layer: int = 1,
        kernel_size: IntOrPair = 3,
        stride: IntOrPair = 1,
        padding: IntOrPair | str = 0,
        dilation: IntOrPair = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        geometry = (kernel_size, stride, padding, dilation)
        depthwise = DepthwiseConv2d(in_channels, kernels_per_layer, *geometry, False, padding_mode, device, dtype)
        # The bias is on the last layer: after an earlier one, zero padding would be wrong at the border.
        pointwise = PointwiseConv2d(in_channels * kernels_per_layer, out_channels, bias, device=device, dtype=dtype)
        super().__init__(OrderedDict(depthwise=depthwise, pointwise=pointwise))
