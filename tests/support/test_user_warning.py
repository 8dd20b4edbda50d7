"""Warnings point at the user's line, however deep in the library they arise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dsconv_surgery
from dsconv_surgery import Budget, compress, fold_batchnorm, make_plan
from dsconv_surgery.network import batchnorm_folding

X = torch.rand(1, 3, 12, 12)
SETTINGS: dict[str, Any] = {"budget": Budget(macs=0.9), "schemes": "channel"}


def untrained() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3)).eval()


@pytest.mark.parametrize("function", [compress, make_plan])
def test_a_warning_points_at_the_call(function: Any) -> None:
    """Of a decorated function, several frames above the place that warns."""

    def call() -> None:
        function(untrained(), X, **SETTINGS)

    with pytest.warns(UserWarning, match="look untrained") as caught:
        call()
    (warning,) = caught
    assert (warning.filename, warning.lineno) == (__file__, call.__code__.co_firstlineno + 1)


def test_decorators_of_torch_are_not_the_users_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batchnorm_folding, "outputs_equal", lambda *sides: sides[0].dtype == torch.float64)
    call = torch.no_grad()(fold_batchnorm)
    with pytest.warns(UserWarning, match="in float64 they are equal") as caught:
        call(untrained(), X)
    assert [warning.filename for warning in caught] == [__file__]


def test_all_warnings_are_given_in_one_place() -> None:
    package = Path(dsconv_surgery.__file__).parent
    assert [file.name for file in package.rglob("*.py") if "warnings.warn(" in file.read_text()] == ["user_warning.py"]
