"""Geometry of planned convolutions, and the cost that follows from it: plain integers, no tensors and no modules."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from dsconv_surgery.support.records import record

# Integers have a range, checked where they are read from JSON, so that products of them stay printable.
Integer = Annotated[int, Field(ge=-(2**53), le=2**53)]
Count = Annotated[int, Field(ge=0, le=2**63)]
Pair = tuple[Integer, Integer]
Rank = Integer | Pair  # of each group; a pair for Tucker
# The input of one call: (batch, height, width). For a linear layer: (rows, 1, 1).
Size = tuple[Count, Count, Count]


@record
class Cost:
    """Parameters, multiply-accumulates (MACs) and latency of a layer or a network.

    MACs count every call of convolutions and linear layers, for the whole example batch. A bias adds parameters, but no MACs.
    """

    params: Count
    macs: Count
    latency: float = 0.0  # milliseconds; zero if not measured

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.params + other.params, self.macs + other.macs, self.latency + other.latency)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.params - other.params, self.macs - other.macs, self.latency - other.latency)


@record
class ConvSpec:
    """The geometry of an nn.Conv2d, or of an nn.Linear as a 1x1 convolution; pairs are (height, width)."""

    in_channels: Integer
    out_channels: Integer
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair | Literal["same"] = (0, 0)
    dilation: Pair = (1, 1)
    groups: Integer = 1
    bias: bool = False
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros"
    kind: Literal["conv", "linear"] = "conv"

    @classmethod
    def of(cls, layer: Any) -> ConvSpec:
        """The spec of an nn.Conv2d or nn.Linear."""
        bias = layer.bias is not None
        if hasattr(layer, "in_features"):
            return cls(layer.in_features, layer.out_features, bias=bias, kind="linear")
        kernel, stride, dilation = _pair(layer.kernel_size), _pair(layer.stride), _pair(layer.dilation)
        padding: Any = {"same": "same", "valid": (0, 0)}[layer.padding] if isinstance(layer.padding, str) else _pair(layer.padding)
        return cls(layer.in_channels, layer.out_channels, kernel, stride, padding, dilation, layer.groups, bias, layer.padding_mode)

    def problem(self) -> str | None:
        """Why no layer can have this geometry, or None."""
        positive: dict[str, tuple[int, ...]] = {
            "in_channels": (self.in_channels,),
            "out_channels": (self.out_channels,),
            "groups": (self.groups,),
        }
        positive |= {"kernel": self.kernel, "stride": self.stride, "dilation": self.dilation}
        for field, values in positive.items():
            if min(values) < 1:
                return f"{field} {getattr(self, field)} is impossible, expected 1 or more."
        if self.padding != "same" and min(self.padding) < 0:
            return f"padding {self.padding} is impossible, expected 0 or more."
        if self.padding == "same" and max(self.stride) > 1:
            return f"padding 'same' is impossible with stride {self.stride}."
        if self.in_channels % self.groups or self.out_channels % self.groups:
            return f"{self.groups} groups do not divide {self.in_channels} -> {self.out_channels} channels."
        if self.kind == "linear" and self != ConvSpec(self.in_channels, self.out_channels, bias=self.bias, kind="linear"):
            return "a linear layer has a 1x1 kernel, one group, no stride, padding or dilation."
        return None

    @property
    def taps(self) -> int:
        """Kernel positions: height times width."""
        return self.kernel[0] * self.kernel[1]

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """(out channels, in channels of one group, height, width)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def params(self) -> int:
        """Entries of the weight and of the bias."""
        return math.prod(self.weight_shape) + (self.out_channels if self.bias else 0)

    def out_size(self, size: Size) -> Size:
        """The output size of one call: zero or less if the input is too small for the kernel."""
        if self.padding == "same":
            return size
        axes = zip(size[1:], self.padding, self.dilation, self.kernel, self.stride, strict=True)
        height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in axes)
        return size[0], height, width

    def macs(self, size: Size) -> int:
        """MACs of one call: `taps * (in / groups) * out * output pixels * batch`."""
        return math.prod(self.weight_shape) * math.prod(self.out_size(size))

    def one_group(self) -> ConvSpec:
        """The geometry of one group, without the bias."""
        inputs, outputs = self.in_channels // self.groups, self.out_channels // self.groups
        return replace(self, in_channels=inputs, out_channels=outputs, groups=1, bias=False)

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


def _pair(value: Any) -> Any:
    """A pair from the attribute of a layer: programs set `layer.stride = 2`, too."""
    return (value, value) if isinstance(value, int) else tuple(value)


def chain_cost(chain: dict[str, ConvSpec], sizes: tuple[Size, ...]) -> Cost:
    """The cost of a chain of links that is called once for each input size."""
    macs = 0
    for size in sizes:
        for link in chain.values():
            macs += link.macs(size)
            size = link.out_size(size)
    return Cost(sum(link.params for link in chain.values()), macs)
