"""The registry of schemes, and everything that follows for all of them alike from `chain` and `kernel`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dsconv_surgery.network.geometry import ConvSpec, Rank
from dsconv_surgery.schemes.base import Factors, Scheme
from dsconv_surgery.schemes.cp import CP, SplitCP, term_energy


def refusal(scheme: Scheme, spec: ConvSpec) -> str | None:
    """Why a scheme cannot write this layer, or None."""
    return scheme.refuses(_block(spec))


def check_rank(name: str, scheme: Scheme, spec: ConvSpec, rank: Rank) -> None:
    """Raise ValueError, naming the layer, unless the scheme takes this layer at this rank."""
    why = refusal(scheme, spec)
    if why:
        raise ValueError(f"{name}: scheme {scheme.name!r} does not apply - {why}")
    full = scheme.full_rank(_block(spec))
    per_group = f" per group ({spec.groups} groups)" if spec.groups > 1 else ""
    if isinstance(full, int):
        if not isinstance(rank, int) or not _whole(rank):
            raise ValueError(f"{name}: {scheme.name!r} has one rank, found {rank!r}. Choose 1..{full}.")
        if not 1 <= rank <= full:
            side = "above the full rank" if rank > full else "below 1; the full rank is"
            raise ValueError(f"{name}: rank {rank} is {side} {full} of {scheme.name!r} ({spec}){per_group}. Choose 1..{full}.")
    elif not (isinstance(rank, tuple) and len(rank) == 2 and all(map(_whole, rank))):
        raise ValueError(f"{name}: scheme {scheme.name!r} has a pair of ranks, found {rank!r}. Choose (1..{full[0]}, 1..{full[1]}).")
    elif not (1 <= rank[0] <= full[0] and 1 <= rank[1] <= full[1]):
        raise ValueError(f"{name}: rank {rank} is outside (1..{full[0]}, 1..{full[1]}) of {scheme.name!r} ({spec}){per_group}.")


def _whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def chain_of(scheme: Scheme, spec: ConvSpec, rank: Rank) -> dict[str, ConvSpec]:
    """The chain of a whole layer: each link of a group repeated for every group, the bias on the last link."""
    links = scheme.chain(_block(spec), rank)
    g = spec.groups
    chain = {
        link: replace(s, in_channels=g * s.in_channels, out_channels=g * s.out_channels, groups=g * s.groups) for link, s in links.items()
    }
    # Bias goes on the last link: earlier links would leak it in at the padded border.
    last = next(reversed(chain))
    chain[last] = replace(chain[last], bias=spec.bias)
    return chain


def kernel_tensor(spec: ConvSpec, weight: Tensor) -> Tensor:
    """A layer's weight as schemes see it: (groups, out, in, height, width) in float64, on the CPU where the device has no float64."""
    device = "cpu" if weight.device.type == "mps" else weight.device
    return weight.detach().to(device, torch.float64).reshape(spec.groups, -1, *spec.weight_shape[1:])


def factorize(scheme: Scheme, spec: ConvSpec, weight: Tensor, ranks: Sequence[Rank], rough: bool = False) -> Iterator[Factors]:
    """Factors of a whole layer for ascending ranks, in float64; `weight` is the layer's own; `rough`: to start a search with."""
    return scheme.factorize(_block(spec), kernel_tensor(spec, weight), list(ranks), rough)


def spectrum(scheme: Scheme, spec: ConvSpec, weight: Tensor) -> Tensor | None:
    """The scheme's spectrum for a whole layer, see `Scheme.spectrum`."""
    return scheme.spectrum(_block(spec), kernel_tensor(spec, weight))


def kernel_of(scheme: Scheme, spec: ConvSpec, factors: Factors) -> Tensor:
    """The dense kernel of a whole layer, (out, in / groups, height, width)."""
    return scheme.kernel(_block(spec), factors).flatten(0, 1)


def degeneracy(scheme: Scheme, spec: ConvSpec, factors: Factors) -> float | None:
    """`sum_r |term_r|^2 / |V|^2`, large where the terms of a CP decomposition cancel each other; None for other schemes."""
    if not isinstance(scheme, CP | SplitCP):
        return None
    kernel = float(scheme.kernel(_block(spec), factors).square().sum())
    return term_energy(factors) / kernel if kernel else 1.0


def relative_error(weight: Tensor, kernel: Tensor) -> float:
    """`sum (W - V)^2 / sum W^2` in float64; zero where both are zero."""
    w, v = weight.detach().double(), kernel.detach().to(weight.device).double()
    squares = float(w.square().sum())
    off = float((w.reshape(v.shape) - v).square().sum())
    return off / squares if squares else float(off > 0)


def build(chain: dict[str, ConvSpec], like: nn.Module, factors: Factors | None) -> nn.Sequential:
    """An nn.Sequential of plain layers for a chain, with a layer's dtype, device, memory format, bias, flags.

    Args:
        chain: link name -> geometry, as from `chain_of`.
        like: the layer that it replaces.
        factors: weights by link name; None leaves the weights uninitialised (the bias is copied all the same).
    """
    original: Any = like
    weight: Tensor = original.weight
    channels_last = is_channels_last(weight)
    links: OrderedDict[str, nn.Module] = OrderedDict()
    for link, spec in chain.items():
        made: Any = make_layer(spec, weight)
        if channels_last:
            made.to(memory_format=torch.channels_last)
        with torch.no_grad():
            if factors is not None:
                made.weight.copy_(factors[link].reshape(made.weight.shape))
            if spec.bias:
                made.bias.copy_(original.bias)
        made.weight.requires_grad_(weight.requires_grad)
        if spec.bias:
            made.bias.requires_grad_(original.bias.requires_grad)
        links[link] = made
    sequence = nn.Sequential(links)
    return sequence.train(original.training)


def is_channels_last(weight: Tensor) -> bool:
    """Whether a weight is stored channels-last and could have been stored otherwise."""
    return weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def links_of(chain: dict[str, ConvSpec], sequence: nn.Module) -> bool:
    """Whether a module is the nn.Sequential that `build` makes for this chain."""
    if type(sequence) is not nn.Sequential or list(sequence._modules) != list(chain):
        return False
    return all(
        type(layer) is (nn.Linear if spec.kind == "linear" else nn.Conv2d) and ConvSpec.of(layer) == spec
        for layer, spec in zip(sequence, chain.values(), strict=True)
    )


def _block(spec: ConvSpec) -> ConvSpec:
    return replace(spec.one_group(), bias=False)


def make_layer(spec: ConvSpec, like: Tensor) -> nn.Module:
    """A plain, uninitialised layer."""
    if spec.kind == "linear":
        return nn.utils.skip_init(nn.Linear, spec.in_channels, spec.out_channels, spec.bias, device=like.device, dtype=like.dtype)
    return nn.utils.skip_init(
        nn.Conv2d,
        spec.in_channels,
        spec.out_channels,
        spec.kernel,
        stride=spec.stride,
        padding=spec.padding,
        dilation=spec.dilation,
        groups=spec.groups,
        bias=spec.bias,
        padding_mode=spec.padding_mode,
        device=like.device,
        dtype=like.dtype,
    )
