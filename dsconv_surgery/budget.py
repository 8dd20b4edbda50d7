"""What a network may keep, and the option tables that rules choose from. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Budget:
    """What the whole network may keep, as fractions in (0, 1] of its MACs, parameters and measured latency; None sets no limit.

    Example:
        >>> Budget(macs=0.5)
        Budget(macs=0.5, params=None, latency=None)
    """

    macs: float | None = None
    params: float | None = None
    latency: float | None = None

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for measure, fraction in self.limits().items():
            if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
                raise ValueError(f"budget: {measure}={fraction!r} is not a fraction to keep, in (0, 1]; half is {measure}=0.5.")
        if not self.limits():
            raise ValueError("budget: none of macs, params and latency is limited. Give one, as in Budget(macs=0.5).")

    def limits(self) -> dict[str, float]:
        every = (("macs", self.macs), ("params", self.params), ("latency", self.latency))
        return {name: value for name, value in every if value is not None}

    def __str__(self) -> str:
        return f"Budget({', '.join(f'{measure}={fraction:g}' for measure, fraction in self.limits().items())})"


class BudgetError(ValueError):
    """No choice of options keeps a budget."""
