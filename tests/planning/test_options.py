"""The schemes that a layer's table offers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dsconv_surgery.calibration.images import Images
from dsconv_surgery.network.discovery import ConvSite, Skip
from dsconv_surgery.network.geometry import ConvSpec
from dsconv_surgery.planning.damage import DamageEstimator
from dsconv_surgery.planning.options import layer_options
from dsconv_surgery.support.cache import Cache
from dsconv_surgery.support.inputs import Inputs


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


@pytest.mark.parametrize("scheme", ["cp", "tucker"])
def test_estimates_in_wide_layers_are_those_of_a_whole_fit(scheme: str) -> None:
    """A fit of the last link alone overestimates errors, and more so for tucker: each scheme's gain is measured there."""
    torch.manual_seed(0)
    conv = nn.Conv2d(128, 32, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 128, 1), nn.ReLU(), conv, nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 10)).eval()
    images = torch.randn(128, 3, 8, 8)
    site = ConvSite("2", (), ConvSpec.of(conv), ((1, 8, 8),))
    estimator = DamageEstimator(model, [site], Images(images.split(32), Inputs(images[:1])), Cache(False))
    result = layer_options(site, conv, [scheme], ("macs",), estimator)
    assert not isinstance(result, Skip)
    errors = result[1]
    rank = errors._sample_ranks[scheme][2]
    assert errors.estimate(scheme, [rank])[0] == pytest.approx(errors.measure(scheme, rank), rel=0.1)
