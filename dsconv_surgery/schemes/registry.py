"""The registry of schemes, and everything that follows for all of them alike from `chain` and `kernel`."""

from __future__ import annotations

import difflib

from dsconv_surgery.schemes.base import Scheme
from dsconv_surgery.schemes.bottleneck import Bottleneck
from dsconv_surgery.schemes.channel import Channel
from dsconv_surgery.schemes.cp import CP, SplitCP
from dsconv_surgery.schemes.depthwise import Depthwise, PointwiseDepthwise
from dsconv_surgery.schemes.spatial import Spatial
from dsconv_surgery.schemes.tucker import Tucker

_SCHEMES: dict[str, Scheme] = {}


def register_scheme(scheme: Scheme) -> None:
    """Make a scheme known by its name to plans, the command line and every test that runs over the registry.

    Args:
        scheme: a record of pure functions, see `Scheme`.

    Raises:
        ValueError: the name is taken.

    Example:
        >>> class Narrow(type(get_scheme("channel"))):
        ...     name = "narrow"
        >>> register_scheme(Narrow())
        >>> get_scheme("narrow").full_rank(ConvSpec(8, 16, (3, 3)))
        16
    """
    if scheme.name in _SCHEMES:
        raise ValueError(f"a scheme named {scheme.name!r} is registered already. Choose another name.")
    _SCHEMES[scheme.name] = scheme


for _scheme in (Depthwise(), PointwiseDepthwise(), CP(), SplitCP(), Tucker(), Spatial(), Channel(), Bottleneck()):
    register_scheme(_scheme)


def get_scheme(name: str) -> Scheme:
    """The scheme of this name; ValueError with the nearest known one otherwise."""
    if name not in _SCHEMES:
        close = difflib.get_close_matches(str(name), _SCHEMES, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown scheme {name!r}.{hint} Known: {', '.join(_SCHEMES)}; add your own with register_scheme.")
    return _SCHEMES[name]


def scheme_names() -> tuple[str, ...]:
    return tuple(_SCHEMES)
