"""The registry of schemes: name -> scheme."""

from __future__ import annotations

from dsconv_surgery.schemes.base import Scheme
from dsconv_surgery.schemes.channel import Bottleneck, Channel
from dsconv_surgery.schemes.cp import CP, SplitCP
from dsconv_surgery.schemes.depthwise import Depthwise, PointwiseDepthwise
from dsconv_surgery.schemes.spatial import Spatial
from dsconv_surgery.schemes.tucker import Tucker
from dsconv_surgery.support.formatting import did_you_mean
from dsconv_surgery.support.records import QUOTED, quoted

_SCHEMES: dict[str, Scheme] = {}


def register_scheme(scheme: Scheme) -> None:
    """Add an instance of a subclass of `Scheme`, or any object with the same methods, so that plans and commands find it by its name.

    Raises:
        TypeError: the object lacks a method of `Scheme`.
        ValueError: the name is taken.

    Example:
        >>> class Narrow(type(get_scheme("channel"))):
        ...     name = "narrow"
        >>> register_scheme(Narrow())
        >>> get_scheme("narrow").full_rank(ConvSpec(8, 16, (3, 3)))
        16
    """
    if isinstance(scheme, type):
        raise TypeError(f"{scheme.__name__} is a class. Register an instance: register_scheme({scheme.__name__}()).")
    missing = [name for name in ("name", *vars(Scheme)) if not name.startswith("_") and not hasattr(scheme, name)]
    if missing:
        raise TypeError(f"{scheme!r} has no {', '.join(missing)}. Derive it from dsconv_surgery.schemes.Scheme, which has defaults.")
    if scheme.name in _SCHEMES:
        raise ValueError(f"a scheme named {scheme.name!r} is registered already. Choose another name.")
    _SCHEMES[scheme.name] = scheme


for _scheme in (Depthwise(), PointwiseDepthwise(), CP(), SplitCP(), Tucker(), Spatial(), Channel(), Bottleneck()):
    register_scheme(_scheme)


def get_scheme(name: str) -> Scheme:
    """The scheme of this name; ValueError with the most similar name if there is none."""
    if name not in _SCHEMES:
        hint = did_you_mean(str(name)[:QUOTED], _SCHEMES)
        raise ValueError(f"unknown scheme {quoted(name)}.{hint} Known: {', '.join(_SCHEMES)}; add your own with register_scheme.")
    return _SCHEMES[name]


def scheme_names() -> tuple[str, ...]:
    """The names of all registered schemes."""
    return tuple(_SCHEMES)
