"""The schemes that a layer's table offers."""

from __future__ import annotations

import pytest
from torch import nn

from dsconv_surgery.network.discovery import ConvSite, Skip
from dsconv_surgery.network.geometry import ConvSpec
from dsconv_surgery.planning.damage import DamageEstimator
from dsconv_surgery.planning.options import layer_options
from dsconv_surgery.support.cache import Cache


def offered(conv: nn.Conv2d, *names: str) -> set[str]:
    """The schemes with options for a layer of 8x8 pixels."""
    site = ConvSite("layer", (), ConvSpec.of(conv), ((1, 8, 8),))
    result = layer_options(site, conv, names, ("macs", "params"), DamageEstimator(conv, [site], None, Cache(False)))
    assert not isinstance(result, Skip)
    return set(result[0].options)


@pytest.mark.parametrize(
    ("conv", "expected"),
    [
        (nn.Conv2d(48, 48, 3, padding=1), {"cp"}),  # 105 and 102 weights per term, 2.9 % more
        (nn.Conv2d(46, 46, 3, padding=1), {"cp", "cp_split"}),  # 101 and 98, 3.1 % more
        (nn.Conv2d(48, 48, 7, padding=3), {"cp", "cp_split"}),
        (nn.Conv2d(96, 96, 3, padding=1, groups=4), {"cp", "cp_split"}),  # narrow groups
    ],
    ids=["wide", "narrow", "7x7", "narrow groups"],
)
def test_cp_split_is_offered_beside_cp_where_it_saves_something(conv: nn.Conv2d, expected: set[str]) -> None:
    assert offered(conv, "cp", "cp_split") == expected
    assert offered(conv, "cp_split", "cp", "channel") == {*expected, "channel"}


def test_a_scheme_without_its_general_form_is_offered() -> None:
    conv = nn.Conv2d(48, 48, 3, padding=1)
    assert offered(conv, "cp_split") == {"cp_split"}
    assert offered(conv, "cp_split", "spatial") == {"cp_split", "spatial"}
