"""Shapes and what they cost: integers only, no tensors and no modules."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from torch import nn


Pair = tuple[int, int]
Rank = int | Pair  # per group; a pair for Tucker
Size = tuple[int, int, int]  # one call's input: batch, height, width; a Linear's is (rows, 1, 1)


@dataclass(frozen=True)
class Cost:
    """Parameters, multiply-accumulates (MACs) and, where it was measured, time of a layer or a network.

    MACs count convolutions and linear layers as called, for the whole example batch; a bias adds parameters and no MACs.
    """

    params: int
    macs: int
    latency: float = 0.0  # milliseconds

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.params + other.params, self.macs + other.macs, self.latency + other.latency)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.params - other.params, self.macs - other.macs, self.latency - other.latency)


@dataclass(frozen=True)
class ConvSpec:
    """The geometry of one nn.Conv2d, or of one nn.Linear seen as a 1x1 convolution; pairs are (height, width)."""

    in_channels: int
    out_channels: int
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair | Literal["same"] = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    bias: bool = False
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros"
    kind: Literal["conv", "linear"] = "conv"

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    @classmethod
    def of(cls, module: nn.Module) -> ConvSpec:
        """The spec of an nn.Conv2d or nn.Linear."""
        layer: Any = module
        bias = layer.bias is not None
        if hasattr(layer, "in_features"):
            return cls(layer.in_features, layer.out_features, bias=bias, kind="linear")
        padding: Any = (0, 0) if layer.padding == "valid" else layer.padding
        return cls(
            in_channels=layer.in_channels,
            out_channels=layer.out_channels,
            kernel=tuple(layer.kernel_size),
            stride=tuple(layer.stride),
            padding=padding if padding == "same" else tuple(padding),
            dilation=tuple(layer.dilation),
            groups=layer.groups,
            bias=bias,
            padding_mode=layer.padding_mode,
        )

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Of the kernel as a convolution holds it: (out, in per group, height, width)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def params(self) -> int:
        """Weights, and the bias where there is one."""
        return math.prod(self.weight_shape) + (self.out_channels if self.bias else 0)

    def out_size(self, size: Size) -> Size:
        """The size of one call's output, which may be zero or less where the input is too small for the kernel."""
        if self.padding == "same":
            return size
        batch, *space = size
        height, width = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(space, self.padding, self.dilation, self.kernel, self.stride, strict=True)
        )
        return batch, height, width

    def macs(self, size: Size) -> int:
        """Multiply-accumulates of one call: taps x (in / groups) x out x output pixels x batch."""
        return math.prod(self.weight_shape) * math.prod(self.out_size(size))

    def one_group(self) -> ConvSpec:
        """The geometry of a single group, of which a grouped convolution's kernel holds `groups` as diagonal blocks."""
        return replace(self, in_channels=self.in_channels // self.groups, out_channels=self.out_channels // self.groups, groups=1)

    def __str__(self) -> str:
        if self.kind == "linear":
            return f"linear {self.in_channels} -> {self.out_channels}"
        text = f"{self.kernel[0]}x{self.kernel[1]} {self.in_channels} -> {self.out_channels}"
        defaults = ConvSpec(self.in_channels, self.out_channels, self.kernel)
        for field in ("stride", "padding", "dilation", "groups", "padding_mode"):
            value = getattr(self, field)
            if value != getattr(defaults, field):
                text += f", {field} {value if isinstance(value, int | str) else 'x'.join(map(str, value))}"
        return text + (", bias" if self.bias else "")


def chain_cost(chain: dict[str, ConvSpec], sizes: tuple[Size, ...]) -> Cost:
    """The cost of links that run one after the other, called once for each of `sizes`."""
    macs = 0
    for size in sizes:
        for link in chain.values():
            macs += link.macs(size)
            size = link.out_size(size)
    return Cost(sum(link.params for link in chain.values()), macs)
