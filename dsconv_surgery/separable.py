"""The building blocks by name, for networks written by hand."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Literal

from torch import nn

from dsconv_surgery.network.geometry import ConvSpec
from dsconv_surgery.schemes import build, chain_of, check_rank, factorize, get_scheme

IntOrPair = int | tuple[int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class DepthwiseConv2d(nn.Conv2d):
    """A convolution of every input channel on its own, `kernels_per_layer` filters each.

    `out[c * m + j] = sum_yx D[c, j, y, x] in[c, ...]`, j < m = kernels_per_layer. Per output pixel it costs K m I
    multiply-accumulates and as many weights, for K taps and I channels; a normal convolution to m I channels K m I^2.

    Args:
        in_channels: I; the output has `I * kernels_per_layer` channels.
        kernels_per_layer: filters for each input channel.
        kernel_size, stride, padding, dilation, bias, padding_mode, device, dtype: as for nn.Conv2d.

    Raises:
        ValueError: kernels_per_layer below 1.

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
            raise ValueError(f"DepthwiseConv2d: kernels_per_layer is {kernels_per_layer}; expected 1 or more.")
        super().__init__(
            in_channels,
            in_channels * kernels_per_layer,
            kernel_size,
            stride,
            padding,
            dilation,
            groups=in_channels,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution: a linear map of the channels at every pixel.

    `out[o] = sum_i P[o, i] in[i]`: I O multiply-accumulates per output pixel and I O weights.

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
    """A depthwise convolution, then a pointwise one: what stands in for a normal k x k convolution at a fraction of its cost.

    `V[o,i,y,x] = sum_j P[o,i,j] D[i,j,y,x]`, j < m = kernels_per_layer. With K taps, I input and O output channels:

    |                          | normal    | separable           | ratio           |
    |---|---|---|---|
    | MACs per output pixel    | K I O     | K I m + m I O       | m (1/O + 1/K)   |
    | weights                  | K I O     | K I m + m I O       | m (1/O + 1/K)   |
    | bias                     | O         | O, on the pointwise |                 |

    (Popular notes multiply by the input's pixels instead of the output's; each output pixel is computed once.) From
    m = min(K, O) on, any normal convolution can be written so exactly.

    Its submodules are `depthwise` and `pointwise`, as in networks cut with the scheme "depthwise", so state_dicts are exchangeable.

    Args:
        in_channels, out_channels: I, O.
        kernels_per_layer: m.
        kernel_size, stride, padding, dilation, bias, padding_mode, device, dtype: as for nn.Conv2d.

    Raises:
        ValueError: kernels_per_layer below 1.

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
        depthwise = DepthwiseConv2d(
            in_channels, kernels_per_layer, kernel_size, stride, padding, dilation, False, padding_mode, device, dtype
        )
        # Bias goes on the last link: an earlier one would leak it in at the padded border.
        pointwise = PointwiseConv2d(in_channels * kernels_per_layer, out_channels, bias, device=device, dtype=dtype)
        super().__init__(OrderedDict(depthwise=depthwise, pointwise=pointwise))

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, kernels_per_layer: int) -> DepthwiseSeparableConv2d:
        """The separable convolution nearest to a normal one in its weights: a truncated SVD of each input channel's O x K slice.

        Args:
            conv: not grouped; it is not changed.
            kernels_per_layer: 1 .. min(K, O), where it is exact.

        Raises:
            ValueError: a 1x1 or grouped convolution, or kernels_per_layer out of range.

        Example:
            >>> DepthwiseSeparableConv2d.from_conv(nn.Conv2d(16, 32, 3, padding=1), kernels_per_layer=2)
        """
        spec = ConvSpec.of(conv)
        if spec.groups != 1:
            raise ValueError(
                f"from_conv: the convolution has {spec.groups} groups; expected 1. "
                "Cut grouped layers with compress(model, ..., schemes='depthwise')."
            )
        scheme = get_scheme("depthwise")
        check_rank("from_conv", scheme, spec, kernels_per_layer)
        made: Any = build(chain_of(scheme, spec, kernels_per_layer), conv, next(factorize(scheme, spec, conv.weight, [kernels_per_layer])))
        result = cls(
            spec.in_channels,
            spec.out_channels,
            kernels_per_layer,
            spec.kernel,
            spec.stride,
            spec.padding,
            spec.dilation,
            spec.bias,
            spec.padding_mode,
            conv.weight.device,
            conv.weight.dtype,
        )
        result.load_state_dict(made.state_dict())
        return result.train(conv.training)
