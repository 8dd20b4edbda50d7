"""Schemes: ways to write one convolution as a chain of smaller ones, and the operations that work alike for all of them."""

from dsconv_surgery.schemes.base import Factors, Scheme, rank_pair, single_rank, split_taps
from dsconv_surgery.schemes.chain import (
    build,
    chain_of,
    check_rank,
    degeneracy,
    factorize,
    is_built_in,
    is_channels_last,
    kernel_of,
    kernel_tensor,
    links_of,
    make_layer,
    option_cost,
    refusal,
    relative_error,
    spectrum,
)
from dsconv_surgery.schemes.fitting import can_approximate, fit, has_optimum, naming_layer
from dsconv_surgery.schemes.objective import LinAlgError, Objective
from dsconv_surgery.schemes.registry import get_scheme, register_scheme, scheme_names

__all__ = [
    "Factors", "LinAlgError", "Objective", "Scheme", "build", "can_approximate", "chain_of", "check_rank", "degeneracy", "factorize",
    "fit", "get_scheme", "has_optimum", "is_built_in", "is_channels_last", "kernel_of", "kernel_tensor", "links_of", "make_layer",
    "naming_layer", "option_cost", "rank_pair", "refusal", "register_scheme", "relative_error", "scheme_names", "single_rank", "spectrum",
    "split_taps",
]  # fmt: skip
