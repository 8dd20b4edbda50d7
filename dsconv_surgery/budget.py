"""Budget: the fractions of a network's MACs, parameters and latency that a cut network may keep."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dsconv_surgery.support.records import checked_record

Fraction = Annotated[float | None, Field(gt=0, le=1, description="the fraction to keep, in (0, 1]")]


@checked_record("Budget(macs=0.5)")
class Budget:
    """The fractions of the whole network that may be kept, each in (0, 1]; None sets no limit.

    Args:
        macs: of the multiply-accumulates of convolutions and linear layers.
        params: of all parameters.
        latency: of the measured time.

    Raises:
        ValueError: a fraction outside (0, 1], or no fraction at all.

    Example:
        >>> Budget(macs=0.5)
        Budget(macs=0.5, params=None, latency=None)
    """

    macs: Fraction = None
    params: Fraction = None
    latency: Fraction = None

    def __post_init__(self) -> None:
        if not self.limits():
            raise ValueError("budget: macs, params and latency are all None. Limit at least one, as in Budget(macs=0.5).")

    def limits(self) -> dict[str, float]:
        """The fractions that are set, by measure."""
        fractions = {"macs": self.macs, "params": self.params, "latency": self.latency}
        return {measure: fraction for measure, fraction in fractions.items() if fraction is not None}

    def __str__(self) -> str:
        return f"Budget({', '.join(f'{measure}={fraction:g}' for measure, fraction in self.limits().items())})"


class BudgetError(ValueError):
    """No choice of options keeps the budget."""
