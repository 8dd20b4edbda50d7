"""The measured numbers of the three READMEs stand in result files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from check_numbers import check, messages, noticed
from number_rules import BENCHMARKS, DOCUMENTS, MAIN, RECIPES
from result_values import ROOT


@pytest.mark.parametrize("document", DOCUMENTS)
def test_numbers_are_in_result_files(document: str) -> None:
    left, numbers = check(document, (ROOT / document).read_text())
    assert not left, "\n".join(messages(document, left))
    assert len(numbers) > 20


@pytest.mark.parametrize(
    ("document", "right", "wrong"),
    [
        (MAIN, "| 91.73 % | 91.49 % | 0.24 |", "| 91.73 % | 91.50 % | 0.24 |"),
        (MAIN, "| 91.73 % | 91.49 % | 0.24 |", "| 91.73 % | 91.49 % | 0.54 |"),  # the loss for another budget
        (RECIPES, "| 13.8 % | 50.0 % | 0.98x |", "| 13.8 % | 50.0 % | 0.89x |"),
        (BENCHMARKS, "| 91.52 % | 91.82 % |", "| 91.82 % | 91.52 % |"),  # a value of the row, but not of the column
        (BENCHMARKS, "raises CP from 89.64 %", "raises CP from 89.46 %"),
    ],
)
def test_a_wrong_number_is_noticed(document: str, right: str, wrong: str) -> None:
    text = (ROOT / document).read_text()
    assert right in text
    assert check(document, text.replace(right, wrong))[0]


def test_nine_of_ten_changed_digits_are_noticed() -> None:
    assert len(noticed(BENCHMARKS, 10, seed=1)) <= 1


def test_a_stale_rule_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not say"):
        check(BENCHMARKS, (ROOT / BENCHMARKS).read_text().replace("SOAP costs", "SOAP takes"))
