"""Patterns of layer names: modules, wildcards, and what matches nothing."""

from __future__ import annotations

import pytest

from dsconv_surgery.support.patterns import check_patterns, first_match, matches

NAMES = ("conv1", "layer1.0.conv1", "layer1.0.conv2", "layer10.0.conv1", "fc")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("conv1", ["conv1"]),
        ("layer1", ["layer1.0.conv1", "layer1.0.conv2"]),
        ("layer1.0", ["layer1.0.conv1", "layer1.0.conv2"]),
        ("layer1*", ["layer1.0.conv1", "layer1.0.conv2", "layer10.0.conv1"]),
        ("*.conv1", ["layer1.0.conv1", "layer10.0.conv1"]),
        ("layer?.0", ["layer1.0.conv1", "layer1.0.conv2"]),
        ("*", list(NAMES)),
        ("conv", []),
        ("layer1.0.conv", []),
    ],
)
def test_a_name_means_the_layer_and_everything_below_it(pattern: str, expected: list[str]) -> None:
    assert [name for name in NAMES if matches(pattern, (name,))] == expected


def test_the_first_pattern_counts() -> None:
    values = {"layer1.0.conv1": 1, "layer1": 2, "*": 3}
    assert [first_match(values, (name,), 0) for name in NAMES] == [3, 1, 2, 3, 3]
    assert first_match({"other": 1}, NAMES, 7) == 7
    assert first_match({"fc": None, "*": 3}, ("fc",), 7) is None


def test_a_pattern_without_a_layer_is_refused_with_the_nearest_name() -> None:
    check_patterns("exclude", ["layer1", "*"], NAMES)
    with pytest.raises(ValueError, match=r"^exclude: no layer matches 'layer1.0.conv3'. Did you mean 'layer1.0.conv\d'\? A pattern is"):
        check_patterns("exclude", ["fc", "layer1.0.conv3"], NAMES)
