"""Operations on whole layers that work alike for all schemes: checks, factors, dense kernels, and building the chain."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from dsconv_surgery.network.geometry import ConvSpec, Cost, Rank, Size, chain_cost
from dsconv_surgery.network.layers import take_place
from dsconv_surgery.schemes.base import Factors, Scheme


def refusal(scheme: Scheme, spec: ConvSpec) -> str | None:
    """Why a scheme does not apply to this layer, or None."""
    return scheme.refuses(spec.one_group())


def check_rank(name: str, scheme: Scheme, spec: ConvSpec, rank: Rank) -> None:
    """Raise ValueError, with the layer's name, unless the scheme applies to this layer at this rank."""
    if reason := refusal(scheme, spec):
        raise ValueError(f"{name}: scheme {scheme.name!r} does not apply: {reason}")
    full = scheme.full_rank(spec.one_group())
    per_group = f" per group ({spec.groups} groups)" if spec.groups > 1 else ""
    if isinstance(full, int):
        if not isinstance(rank, int) or isinstance(rank, bool):
            raise ValueError(f"{name}: {scheme.name!r} has one rank, found {rank!r}. Choose 1..{full}.")
        if not 1 <= rank <= full:
            side = "above the full rank" if rank > full else "below 1; the full rank is"
            raise ValueError(f"{name}: rank {rank} is {side} {full} of {scheme.name!r} ({spec}){per_group}. Choose 1..{full}.")
        return
    choices = f"(1..{full[0]}, 1..{full[1]})"
    if not (isinstance(rank, tuple) and [type(number) for number in rank] == [int, int]):
        raise ValueError(f"{name}: scheme {scheme.name!r} has a pair of ranks, found {rank!r}. Choose {choices}.")
    if not (1 <= rank[0] <= full[0] and 1 <= rank[1] <= full[1]):
        raise ValueError(f"{name}: rank {rank} is outside {choices} of {scheme.name!r} ({spec}){per_group}. Choose both within.")


def chain_of(scheme: Scheme, spec: ConvSpec, rank: Rank) -> dict[str, ConvSpec]:
    """The chain of a whole layer: the links of one group, repeated for every group, with the bias on the last link."""
    g = spec.groups
    chain = {
        name: replace(link, in_channels=g * link.in_channels, out_channels=g * link.out_channels, groups=g * link.groups)
        for name, link in scheme.chain(spec.one_group(), rank).items()
    }
    last = next(reversed(chain))  # the padding of later links would not see the bias of an earlier one
    chain[last] = replace(chain[last], bias=spec.bias)
    return chain


def option_cost(scheme: Scheme, spec: ConvSpec, rank: Rank, sizes: tuple[Size, ...]) -> Cost:
    """The cost of a whole layer's chain, called once for each input size; kept for built-in schemes, as networks repeat layers."""
    return (_cached_cost if is_built_in(scheme) else _cost)(scheme, spec, rank, sizes)


def _cost(scheme: Scheme, spec: ConvSpec, rank: Rank, sizes: tuple[Size, ...]) -> Cost:
    return chain_cost(chain_of(scheme, spec, rank), sizes)


_cached_cost = lru_cache(2**16)(_cost)


def is_built_in(scheme: Scheme) -> bool:
    """Whether a scheme is of this package. What is kept of others could be wrong: another may have the same name in the next run."""
    return type(scheme).__module__.startswith("dsconv_surgery.")


def kernel_tensor(spec: ConvSpec, weight: Tensor) -> Tensor:
    """A layer's weight as schemes see it: (groups, out, in, height, width) in float64, on the CPU if the device has no float64."""
    device = "cpu" if weight.device.type == "mps" else weight.device
    return weight.detach().to(device, torch.float64).reshape(spec.groups, -1, *spec.weight_shape[1:])


def factorize(scheme: Scheme, spec: ConvSpec, weight: Tensor, ranks: Sequence[Rank], rough: bool = False) -> Iterator[Factors]:
    """The factors of a whole layer's weight for ascending ranks, in float64; see `Scheme.factorize`."""
    return scheme.factorize(spec.one_group(), kernel_tensor(spec, weight), list(ranks), rough)


def spectrum(scheme: Scheme, spec: ConvSpec, weight: Tensor) -> Tensor | None:
    """The scheme's spectrum for a whole layer; see `Scheme.spectrum`."""
    return scheme.spectrum(spec.one_group(), kernel_tensor(spec, weight))


def kernel_of(scheme: Scheme, spec: ConvSpec, factors: Factors) -> Tensor:
    """The dense kernel of a whole layer, (out, in / groups, height, width)."""
    return scheme.kernel(spec.one_group(), factors).flatten(0, 1)


def degeneracy(scheme: Scheme, spec: ConvSpec, factors: Factors) -> float | None:
    """`sum_r |term_r|^2 / |V|^2`, which is large if the terms of a kernel V cancel each other; None if a scheme has no such terms."""
    energy = scheme.term_energy(factors)
    if energy is None:
        return None
    squares = float(scheme.kernel(spec.one_group(), factors).square().sum())
    return energy / squares if squares else 1.0


def relative_error(weight: Tensor, kernel: Tensor) -> float:
    """`sum (W - V)^2 / sum W^2` in float64; zero if both kernels are zero."""
    w, v = weight.detach().double(), kernel.detach().to(weight.device).double()
    squares = float(w.square().sum())
    difference = float((w.reshape(v.shape) - v).square().sum())
    return difference / squares if squares else float(difference > 0)


@torch.no_grad()
def build(chain: dict[str, ConvSpec], dense_layer: nn.Module, factors: Factors | None, weight_properties: bool = False) -> nn.Sequential:
    """An nn.Sequential of plain layers for a chain, with the dtype, device, memory format, bias, flags and plain attributes of a layer.

    Args:
        chain: link name -> geometry, as from `chain_of`.
        dense_layer: the layer that the chain replaces.
        factors: weights by link name; None leaves the weights uninitialised. The bias is always copied.
        weight_properties: the network reads `weight.dtype` or `weight.device` of the layer. The chain gets an empty buffer `weight` for it.
    """
    original: Any = dense_layer
    links: OrderedDict[str, nn.Module] = OrderedDict()
    for name, spec in chain.items():
        layer: Any = make_layer(spec, original.weight)
        if is_channels_last(original.weight):
            layer.to(memory_format=torch.channels_last)
        if factors is not None:
            layer.weight.copy_(factors[name].reshape(layer.weight.shape))
        layer.weight.requires_grad_(original.weight.requires_grad)
        if spec.bias:
            layer.bias.copy_(original.bias)
            layer.bias.requires_grad_(original.bias.requires_grad)
        links[name] = layer
    result = nn.Sequential(links).train(original.training)
    take_place(original, result, weight_properties)
    return result


def make_layer(spec: ConvSpec, example: Tensor) -> nn.Module:
    """A plain, uninitialised layer with the dtype and device of a tensor."""
    options: Any = {"bias": spec.bias, "device": example.device, "dtype": example.dtype}
    if spec.kind == "linear":
        return nn.utils.skip_init(nn.Linear, spec.in_channels, spec.out_channels, **options)
    geometry = (spec.in_channels, spec.out_channels, spec.kernel, spec.stride, spec.padding, spec.dilation, spec.groups)
    return nn.utils.skip_init(nn.Conv2d, *geometry, padding_mode=spec.padding_mode, **options)


def is_channels_last(weight: Tensor) -> bool:
    """Whether a weight is stored channels-last and not contiguous as well."""
    return weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def links_of(chain: dict[str, ConvSpec], sequence: nn.Module) -> bool:
    """Whether a module is the nn.Sequential that `build` makes for this chain."""
    if type(sequence) is not nn.Sequential or list(sequence._modules) != list(chain):
        return False
    return all(
        type(layer) is (nn.Linear if spec.kind == "linear" else nn.Conv2d) and ConvSpec.of(layer) == spec
        for layer, spec in zip(sequence, chain.values(), strict=True)
    )
