"""Random small networks, each described by plain data, so that a failing network can be shrunk and printed.

`describe(seed)` draws a `Description`, and `make_case(description)` builds the network with inputs, calibration batches and what to expect.
"""

from __future__ import annotations

import contextlib
import random
import threading
import types
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.parametrizations import weight_norm

KERNELS = ((1, 1), (3, 3), (3, 3), (3, 3), (2, 2), (4, 4), (5, 5), (1, 3), (3, 1), (1, 5), (2, 3), (5, 3))
WIDTHS = (1, 4, 6, 8, 8, 12, 16, 16, 24)
IMAGES, BATCHES = 8, 3  # of calibration


@dataclass(frozen=True)
class Description:
    """A network as data: every block is a kind and a seed."""

    seed: int
    blocks: tuple[tuple[str, int], ...]
    features: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call of a network."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def call(self, model: nn.Module) -> Any:
        return model(*self.args, **self.kwargs)

    @property
    def batch(self) -> Any:
        """The arguments as a data loader would give them."""
        if self.kwargs:
            return self.kwargs
        return self.args[0] if len(self.args) == 1 and not isinstance(self.args[0], tuple) else self.args


@dataclass(frozen=True)
class Case:
    """A network, how to build it with other weights, its inputs, and what to expect of it."""

    description: Description
    build: Callable[[int], nn.Module]
    inputs: Arguments
    batches: list[Arguments]
    refused: str | None  # a word of the error with which find_convs and make_plan have to refuse the network
    warned: str | None  # a word of the warnings that may come
    depends_on_values: bool  # which layers run depends on values of activations
    is_random: bool  # draws random numbers in evaluation mode


# --- layers ----------------------------------------------------------------------------------------------------------------------
class Unit(nn.Module):
    """A convolution, a normalisation and an activation, which is a module or a function."""

    def __init__(self, conv: nn.Module, norm: nn.Module | None, activation: Any) -> None:
        super().__init__()
        self.conv, self.norm, self.activation = conv, norm, activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return self.activation(x)


class Apply(nn.Module):
    """A function of a tensor and of layers, as a module: `function(self, x)`."""

    def __init__(self, function: Callable[..., Tensor], **children: Any) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


ACTIVATIONS: tuple[Callable[[], Any], ...] = (
    nn.ReLU,
    lambda: nn.ReLU(inplace=True),
    lambda: F.relu,
    lambda: F.relu_,
    lambda: torch.relu,
    nn.GELU,
    lambda: nn.LeakyReLU(0.1, inplace=True),
    lambda: F.hardswish,
    lambda: nn.SiLU(inplace=True),
    nn.Identity,
)


class Builder:
    """Draws layers that fit each other: knows the channels and the size of the activations so far."""

    def __init__(self, rng: random.Random, channels: int, size: tuple[int, int]) -> None:
        self.rng, self.channels, self.size = rng, channels, size

    def conv(self, outputs: int | None = None, keep_size: bool = False, **fixed: Any) -> nn.Conv2d:
        """A convolution with random settings."""
        rng, inputs = self.rng, self.channels
        outputs = outputs or rng.choice(WIDTHS)
        groups = fixed.pop("groups", None) or rng.choice([g for g in range(1, inputs + 1) if inputs % g == outputs % g == 0] + [1] * 6)
        kernel, dilation = rng.choice(KERNELS), rng.choice(((1, 1), (1, 1), (1, 1), (2, 2), (1, 2)))
        stride = (1, 1) if keep_size else rng.choice(((1, 1), (1, 1), (1, 1), (2, 2), (2, 1), (3, 3)))
        mode = rng.choice(("zeros", "zeros", "zeros", "reflect", "replicate", "circular"))
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding: Any = "same" if keep_size else rng.choice(("valid", 0, "number", "number", "same"))
        if padding == "same" and (stride != (1, 1) or (keep_size and not any(r % 2 for r in reach) and rng.random() < 0.6)):
            padding = "number"
        if padding == "number":
            padding = tuple(r // 2 for r in reach) if keep_size else tuple(rng.randint(0, r // 2 + 1) for r in reach)
        pads = padding if isinstance(padding, tuple) else [(r + 1) // 2 if padding == "same" else 0 for r in reach]
        if padding != "same":
            axes = zip(self.size, pads, reach, stride, strict=True)
            size = tuple((n + 2 * p - r - 1) // s + 1 if n + 2 * p > r else 0 for n, p, r, s in axes)
        else:
            size = self.size
        if min(size) < 2 or any(p >= n for p, n in zip(pads, self.size, strict=True)):
            kernel, dilation, stride, mode, padding, size = (1, 1), (1, 1), (1, 1), "zeros", 0, self.size
        self.channels, self.size = outputs, size
        bias = rng.random() < 0.6
        settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": bias, "padding_mode": mode}
        return nn.Conv2d(inputs, outputs, kernel, **settings | fixed)

    def norm(self) -> nn.Module | None:
        groups = self.rng.choice([g for g in (1, 2, 4) if self.channels % g == 0])
        makers = (lambda: nn.BatchNorm2d(self.channels), lambda: nn.GroupNorm(groups, self.channels), lambda: None)
        return self.rng.choice((makers[0], *makers))()

    def activation(self) -> Any:
        return self.rng.choice(ACTIVATIONS)()

    def unit(self, outputs: int | None = None, keep_size: bool = False, **fixed: Any) -> Unit:
        return Unit(self.conv(outputs, keep_size, **fixed), self.norm(), self.activation())

    def plain(self, outputs: int | None = None) -> nn.Conv2d:
        """A 3x3 convolution that keeps the size."""
        inputs, self.channels = self.channels, outputs or self.channels
        return nn.Conv2d(inputs, self.channels, 3, padding=1)

    def pointwise(self) -> nn.Conv2d:
        inputs, self.channels = self.channels, self.rng.choice(WIDTHS)
        return nn.Conv2d(inputs, self.channels, 1, bias=self.rng.random() < 0.5)


# --- blocks ----------------------------------------------------------------------------------------------------------------------
def unit(b: Builder) -> nn.Module:
    return b.unit()


def residual(b: Builder) -> nn.Module:
    """A sum with the input; the activation before the body may change the input in place."""
    channels = b.channels
    first = b.rng.choice((nn.Identity(), nn.ReLU(inplace=True), nn.ReLU()))
    body = nn.Sequential(first, b.unit(keep_size=True), b.conv(channels, keep_size=True))
    add = b.rng.choice((lambda s, x: x + s.body(x), lambda s, x: F.relu_(s.body(x).add_(x)), lambda s, x: s.body(x) * 0.5 + x))
    return Apply(add, body=body)


def branches(b: Builder) -> nn.Module:
    inputs, parts, total = b.channels, [], 0
    for _ in range(b.rng.randint(2, 3)):
        b.channels = inputs
        parts.append(b.unit(b.rng.choice((1, 4, 6, 8)), keep_size=True))
        total += b.channels
    b.channels = total
    if b.rng.random() < 0.4:
        b.channels += inputs
        return Apply(lambda s, x: torch.cat([x, *[part(x) for part in s.parts]], dim=1), parts=nn.ModuleList(parts))
    return Apply(lambda s, x: torch.cat([part(x) for part in s.parts], 1), parts=nn.ModuleList(parts))


def called_twice(b: Builder) -> nn.Module:
    conv = b.conv(b.channels, keep_size=True)
    pads = max(conv._reversed_padding_repeated_twice)
    if b.rng.random() < 0.5 or pads >= min(b.size) - 1:  # the pool leaves one row less, and reflecting needs more rows than it adds
        return Apply(lambda s, x: s.conv(F.relu(s.conv(x))), conv=conv)
    return Apply(lambda s, x: s.conv(x) + s.conv(F.max_pool2d(x, 2, 1)).mean((2, 3), keepdim=True), conv=conv)


def two_names(b: Builder) -> nn.Module:
    conv = b.conv(b.channels, keep_size=True)
    if b.rng.random() < 0.5:
        return Apply(lambda s, x: s.second(F.relu(s.first(x))), first=conv, second=conv)
    return Apply(lambda s, x: s.second(x), first=nn.Sequential(conv), second=conv)


def separable(b: Builder) -> nn.Module:
    inputs = b.channels
    depthwise = b.conv(inputs * b.rng.choice((1, 1, 2)), groups=inputs)
    return nn.Sequential(Unit(depthwise, b.norm(), b.activation()), b.pointwise())


def one_channel_groups(b: Builder) -> nn.Module:
    """Groups with several input channels and one output channel each."""
    expand = nn.Conv2d(b.channels, 12, 1)
    b.channels = b.rng.choice((3, 4, 6))
    return nn.Sequential(expand, nn.Conv2d(12, b.channels, 3, padding=1, groups=b.channels), nn.ReLU())


def value_control(b: Builder) -> nn.Module:
    threshold = b.rng.choice((-0.3, 0.0, 0.1))
    outputs = b.channels
    first, second = b.conv(outputs, keep_size=True), b.conv(outputs, keep_size=True)
    return Apply(lambda s, x: s.first(x) if x.mean() > threshold else s.second(x), first=first, second=second)


def shape_control(b: Builder) -> nn.Module:
    conv = b.plain()
    return Apply(lambda s, x: s.conv(x) if x.shape[-1] > 6 else s.conv(F.interpolate(x, scale_factor=1.0)), conv=conv)


def dropout(b: Builder) -> nn.Module:
    return Apply(lambda s, x: F.dropout(s.conv(x), 0.2, training=True), conv=b.plain())


def noise(b: Builder) -> nn.Module:
    # Not randn_like, which draws in the order of x in memory: a chain's output may have another order than a layer's.
    return Apply(lambda s, x: s.conv(x + 0.1 * torch.randn(x.shape, dtype=x.dtype)), conv=b.plain())


def module_dropout(b: Builder) -> nn.Module:
    return nn.Sequential(b.plain(), nn.Dropout2d(0.3), nn.ReLU())


def module_list(b: Builder) -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        for layer in s.layers:
            x = F.relu(layer(x))
        return x

    return Apply(forward, layers=nn.ModuleList([b.conv(keep_size=True), b.conv()]))


def module_dict(b: Builder) -> nn.Module:
    layers = nn.ModuleDict({"b": b.conv(keep_size=True), "a": b.conv(keep_size=True)})
    return Apply(lambda s, x: s.layers["a"](torch.relu_(s.layers["b"](x))), layers=layers)


def nested(b: Builder) -> nn.Module:
    return nn.Sequential(OrderedDict(deep=nn.Sequential(nn.Sequential(b.unit()), OrderedSequential(b.unit()))))


class OrderedSequential(nn.Sequential):
    """A subclass of nn.Sequential with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x) * 1.5
        return x


def attributes(b: Builder) -> nn.Module:
    """Numbers that were put on the layers are read in the parent's forward."""
    layers = nn.ModuleList([b.plain(), b.plain()])
    for index, layer in enumerate(layers):
        layer.i = index + 1

    def forward(s: Any, x: Tensor) -> Tensor:
        for layer in s.layers:
            x = layer(x) * layer.i
        return x

    return Apply(forward, layers=layers)


def extra_state(b: Builder) -> nn.Module:
    """A parameter or a buffer that was put on a layer is read in the parent's forward."""
    conv = b.plain()
    if b.rng.random() < 0.5:
        conv.gain = nn.Parameter(torch.full((1,), 0.5))
    else:
        conv.register_buffer("gain", torch.full((1,), 0.5))
    return Apply(lambda s, x: s.conv(x) * s.conv.gain, conv=conv)


def type_test(b: Builder) -> nn.Module:
    layers = nn.ModuleList([b.plain(), nn.Identity(), b.plain()])

    def forward(s: Any, x: Tensor) -> Tensor:
        for layer in s.layers:
            x = F.relu(layer(x)) if isinstance(layer, nn.Conv2d) else layer(x)
        return x

    return Apply(forward, layers=layers)


def reads_dtype(b: Builder) -> nn.Module:
    return Apply(lambda s, x: s.conv(x.to(s.conv.weight.dtype).to(s.conv.weight.device)), conv=b.plain())


def reads_weight(b: Builder) -> nn.Module:
    return Apply(lambda s, x: s.conv(x) + s.conv.weight.abs().mean(), conv=b.plain())


def reads_geometry(b: Builder) -> nn.Module:
    return Apply(lambda s, x: s.conv(x) / s.conv.in_channels, conv=b.plain())


def keyword_call(b: Builder) -> nn.Module:
    return Apply(lambda s, x: s.conv(input=x), conv=b.plain())


def buffers(b: Builder) -> nn.Module:
    """A buffer that scales, and one that counts the calls."""
    block = Apply(lambda s, x: s.conv(x) * s.scale.add(s.calls.add_(1) * 0), conv=b.plain())
    block.register_buffer("scale", torch.rand(b.channels, 1, 1) + 0.5)
    block.register_buffer("calls", torch.zeros(1), persistent=b.rng.random() < 0.5)
    return block


def stored(b: Builder) -> nn.Module:
    """An activation is stored in a dict and read again."""

    def forward(s: Any, x: Tensor) -> Tensor:
        s.features["first"] = s.first(x)
        return s.second(F.relu(s.features["first"])) + s.features["first"]

    return Apply(forward, first=b.plain(), second=b.plain(), features={})


def squeeze_excite(b: Builder) -> nn.Module:
    gate = nn.Sequential(nn.Conv2d(b.channels, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, b.channels, 1), nn.Sigmoid())
    return Apply(lambda s, x: s.conv(x * s.gate(x.mean((2, 3), keepdim=True))), gate=gate, conv=b.plain())


def functional_conv(b: Builder) -> nn.Module:
    weight = nn.Parameter(torch.randn(b.channels, b.channels, 1, 1) / b.channels**0.5)
    return Apply(lambda s, x: s.conv(F.conv2d(x, s.weight)), weight=weight, conv=b.plain())


def transposed(b: Builder) -> nn.Module:
    up = nn.ConvTranspose2d(b.channels, 8, 2, stride=2)
    b.channels = 8
    return Apply(lambda s, x: s.conv(F.avg_pool2d(s.up(x), 2)), up=up, conv=b.plain())


def normed(b: Builder) -> nn.Module:
    return nn.Sequential(weight_norm(b.plain()), nn.ReLU(), b.plain())


def mlp(b: Builder) -> nn.Module:
    """Linear layers over the channels of channels-last activations."""
    first, second = nn.Linear(b.channels, 16), nn.Linear(16, b.channels)
    return Apply(
        lambda s, x: x + s.second(F.gelu(s.first(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2),
        first=first,
        second=second,
    )


def attention(b: Builder) -> nn.Module:
    qkv = nn.Linear(b.channels, 3 * b.channels)

    def forward(s: Any, x: Tensor) -> Tensor:
        q, k, v = s.qkv(x.flatten(2).mT).chunk(3, -1)
        return x + ((q @ k.mT).softmax(-1) @ v).mT.unflatten(2, x.shape[2:])

    return Apply(forward, qkv=qkv)


def shuffle(b: Builder) -> nn.Module:
    b.channels = 8 * (b.channels // 8) or b.channels
    return Apply(lambda s, x: s.conv(x.flip(1)[:, : s.count]), conv=b.plain(), count=b.channels)


def hooked(b: Builder) -> nn.Module:
    block = nn.Sequential(b.plain(), nn.ReLU(), b.plain())
    block[0].register_forward_hook(double)
    return block


def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def tied(b: Builder) -> nn.Module:
    block = nn.Sequential(b.plain(), nn.ReLU(), b.plain())
    block[2].weight = block[0].weight
    return block


def patched(b: Builder) -> nn.Module:
    """A layer whose padding was patched to be circular, as for seamless tiling."""

    def circular(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    block = nn.Sequential(b.plain(), nn.ReLU(), b.plain())
    block[2]._conv_forward = types.MethodType(circular, block[2])
    return block


class Scaled(nn.Conv2d):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Same(nn.Conv2d):
    """A subclass that computes the same as nn.Conv2d."""


def subclasses(b: Builder) -> nn.Module:
    kind = b.rng.choice((Scaled, Same))
    return nn.Sequential(kind(b.channels, b.channels, 3, padding=1), nn.ReLU(), b.plain())


def pool(b: Builder) -> nn.Module:
    if min(b.size) < 6:
        return nn.Sequential(nn.Upsample(scale_factor=2), b.plain())
    b.size = (b.size[0] // 2, b.size[1] // 2)
    return nn.Sequential(b.rng.choice((nn.MaxPool2d(2), nn.AvgPool2d(2))), b.plain())


# The more often a block is drawn, the higher its group.
_BLOCKS_BY_WEIGHT = {
    12: (unit,),
    5: (residual, branches, separable),
    3: (called_twice, two_names, one_channel_groups, module_list, nested, squeeze_excite, pool, mlp),
    2: (value_control, shape_control, dropout, noise, module_dict, attributes, keyword_call, buffers, stored, transposed),
    1: (
        module_dropout, extra_state, type_test, reads_dtype, reads_weight, reads_geometry, functional_conv, normed, attention, shuffle,
        hooked, tied, patched, subclasses,
    ),
}  # fmt: skip
BLOCKS = {function.__name__: (function, weight) for weight, functions in _BLOCKS_BY_WEIGHT.items() for function in functions}


# --- inputs and outputs ----------------------------------------------------------------------------------------------------------
@dataclass
class Result:
    """An output of a network that is no tensor."""

    main: Tensor
    middle: Tensor


OUTPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda main, middle: main,
    "tuple": lambda main, middle: (main, middle),
    "dict": lambda main, middle: {"out": main, "features": [middle]},
    "dataclass": Result,
    "namespace": lambda main, middle: types.SimpleNamespace(main=main, middle=middle),
}


class Network(nn.Module):
    """Blocks and a head; the subclasses take other inputs."""

    def __init__(self, blocks: nn.Module, head: nn.Module, output: str) -> None:
        super().__init__()
        self.blocks, self.head, self.output = blocks, head, output

    def run(self, x: Tensor) -> Any:
        middle = x
        for index, block in enumerate(self.blocks):
            x = block(x)
            middle = x if index == 0 else middle
        return OUTPUTS[self.output](self.head(x), middle)

    def forward(self, x: Tensor) -> Any:
        return self.run(x)


class TwoInputs(Network):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.run(torch.cat([x, y], 1))


class VectorInput(Network):
    def forward(self, x: Tensor, shift: Tensor) -> Any:
        return self.run(x + shift[:, :1, None, None])


class DictInput(Network):
    def forward(self, batch: dict[str, Tensor]) -> Any:
        return self.run(batch["image"])


class PairInput(Network):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Any:
        return self.run(pair[0] - 0.5 * pair[1])


class NumberInput(Network):
    def forward(self, x: Tensor, scale: float = 1.0, flip: bool = False) -> Any:
        return self.run((x.flip(3) if flip else x) * scale)


class KeywordInput(Network):
    def forward(self, *, pixels: Tensor) -> Any:
        return self.run(pixels)


class OptionalInput(Network):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        return self.run(x if mask is None else x * mask)


NETWORKS = {
    "tensor": Network,
    "two": TwoInputs,
    "vector": VectorInput,
    "dict": DictInput,
    "pair": PairInput,
    "number": NumberInput,
    "keyword": KeywordInput,
    "optional": OptionalInput,
}


def draw_inputs(kind: str, count: int, channels: int, size: tuple[int, int], features: dict[str, Any]) -> Arguments:
    """The arguments of a network for so many images."""

    def image(number: int = channels) -> Tensor:
        draw = torch.rand if features["images"] == "uniform" else torch.randn
        x = draw(count, number, *size, dtype=features["dtype"])
        return x.to(memory_format=torch.channels_last) if features["channels_last"] else x

    half = max(channels // 2, 1)
    if kind == "keyword":
        return Arguments((), {"pixels": image()})
    args: tuple[Any, ...] = {
        "tensor": lambda: (image(),),
        "two": lambda: (image(half), image(channels - half)),
        "vector": lambda: (image(), torch.rand(count, 3, dtype=features["dtype"])),
        "dict": lambda: ({"image": image(), "label": torch.zeros(count, dtype=torch.long)},),
        "pair": lambda: ((image(), image()),),
        "number": lambda: (image(), 1.5, True),
        "optional": lambda: (image(), None),
    }[kind]()
    return Arguments(args)


# --- weights ---------------------------------------------------------------------------------------------------------------------
def train_by_chance(model: nn.Module, inputs: Arguments) -> None:
    """Weights as after training: a decaying spectrum, some dead filters, BatchNorm with statistics, scales and shifts."""
    for module in list(model.modules()):
        weight = getattr(module, "_parameters", {}).get("weight")
        if isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d) and weight is not None:
            u, s, v = torch.linalg.svd(weight.detach().flatten(1), full_matrices=False)
            decay = torch.arange(1, len(s) + 1, dtype=s.dtype) ** -0.7
            weight.data.copy_((2.0 * (u * s * decay) @ v).reshape(weight.shape))
            if torch.rand(()) < 0.3:
                weight.data[torch.randint(len(weight), ())] = 0
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    mode = {module: module.training for module in model.modules()}
    with torch.no_grad():
        model.train()
        for _ in range(3):
            inputs.call(model)
    for module, training in mode.items():
        module.training = training


# --- descriptions ----------------------------------------------------------------------------------------------------------------
DEFAULTS: dict[str, Any] = {
    "inputs": "tensor",
    "output": "tensor",
    "head": "none",
    "images": "normal",
    "dtype": torch.float32,
    "channels_last": False,
    "graph_module": False,
    "training": False,
    "weights": "untrained",
    "frozen": False,
    "channels": 3,
    "size": (12, 12),
    "refused": None,
}


def describe(seed: int) -> Description:
    """Draw a network."""
    rng = random.Random(seed)
    names, weights = list(BLOCKS), [weight for _, weight in BLOCKS.values()]
    kinds = rng.choices(names, weights, k=rng.randint(1, 4))
    features = {
        "inputs": rng.choices(list(NETWORKS), (12, 2, 2, 3, 2, 2, 2, 1))[0],
        "output": rng.choices(list(OUTPUTS), (10, 2, 3, 2, 1))[0],
        "head": rng.choices(("none", "linear", "one_channel", "two_linear"), (3, 4, 2, 2))[0],
        "images": rng.choice(("normal", "uniform")),
        "dtype": torch.float64 if rng.random() < 0.15 else torch.float32,
        "channels_last": rng.random() < 0.15,
        "graph_module": rng.random() < 0.12,
        "training": rng.random() < 0.2,
        "weights": rng.choice(("untrained", "trained", "trained", "zero_layer" if rng.random() < 0.2 else "untrained")),
        "frozen": rng.random() < 0.15,
        "channels": rng.choice((1, 2, 3, 3, 4)),
        "size": (rng.randint(8, 20), rng.randint(8, 20)),
        "refused": rng.choice(("closure", "lock")) if rng.random() < 0.03 else None,
    }
    blocks = (("unit", rng.randrange(2**31)), *((kind, rng.randrange(2**31)) for kind in kinds))
    return Description(seed, blocks, features)


def make_network(description: Description, weights_seed: int) -> nn.Module:
    """The network of a description, with weights by a seed."""
    features = DEFAULTS | description.features
    kind = features["inputs"]
    channels = max(features["channels"], 2) if kind == "two" else features["channels"]
    torch.manual_seed(weights_seed)
    builder = Builder(random.Random(), channels, features["size"])
    modules = []
    for name, seed in description.blocks:
        builder.rng = random.Random(seed)
        modules.append(BLOCKS[name][0](builder))
    count, pooled = builder.channels, (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    heads = {
        "none": lambda: nn.Identity(),
        "linear": lambda: nn.Sequential(*pooled, nn.Linear(count, 10)),
        "one_channel": lambda: nn.Sequential(nn.Conv2d(count, 1, 1), nn.Sigmoid()),
        "two_linear": lambda: nn.Sequential(*pooled, nn.Linear(count, 16, bias=False), nn.ReLU(inplace=True), nn.Linear(16, 1)),
    }
    model = NETWORKS[kind](nn.Sequential(*modules), heads[features["head"]](), features["output"]).to(features["dtype"])
    if features["channels_last"]:
        model = model.to(memory_format=torch.channels_last)
    example = draw_inputs(kind, 4, channels, features["size"], features)
    if features["weights"] == "trained":
        train_by_chance(model, example)
    layers = [module for module in model.modules() if type(module) is nn.Conv2d]
    if features["weights"] == "zero_layer":
        nn.init.zeros_(layers[-1].weight)
    if features["frozen"] and not features["channels_last"]:  # torch 2.13 crashes: GroupNorm, channels last, no gradient for its input
        for parameter in list(model.parameters())[::2]:
            parameter.requires_grad_(False)
    if features["graph_module"] and kind != "optional":
        with contextlib.suppress(Exception):  # a network that cannot be traced stays as it is
            model = fx.symbolic_trace(model)
    if features["refused"] == "lock":
        model.guard = threading.Lock()
    elif features["refused"] == "closure":
        forward = model.forward
        model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    return model.train(features["training"])


def make_case(description: Description) -> Case:
    features = DEFAULTS | description.features
    channels = max(features["channels"], 2) if features["inputs"] == "two" else features["channels"]
    torch.manual_seed(description.seed)
    settings = (channels, features["size"], features)
    inputs = draw_inputs(features["inputs"], 2, *settings)
    batches = [draw_inputs(features["inputs"], IMAGES, *settings) for _ in range(BATCHES)]
    kinds = {kind for kind, _ in description.blocks}
    return Case(
        description,
        lambda seed: make_network(description, seed),
        inputs,
        batches,
        {"lock": "guard", "closure": "forward"}.get(features["refused"]),
        "outside" if kinds & {"functional_conv", "attention"} else None,
        "value_control" in kinds,
        bool(kinds & {"dropout", "noise"}),
    )
