"""Decide: which layers to cut, with which scheme, at which rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsconv_surgery.budget import Budget
from dsconv_surgery.network.geometry import Rank
from dsconv_surgery.planning.rules import RULES
from dsconv_surgery.planning.tables import Rule
from dsconv_surgery.schemes import get_scheme, scheme_names

TIMED_MULTIPLE = 8  # channels, where latency is limited: what lies between is no faster


class PlanSettings:
    """`make_plan`'s keywords, checked and brought into one form."""

    def __init__(
        self,
        budget: Budget | None = None,
        schemes: Sequence[str] | str | None = None,
        rule: str | Rule = "budget",
        energy: float | None = None,
        rank: Rank | None = None,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        multiple: int | None = None,
        cache: bool | str | Path = True,
    ) -> None:
        self.names = scheme_names() if schemes is None else as_tuple(schemes)
        if not self.names:
            raise ValueError("schemes: none given. Pass None for all, or names.")
        for name in self.names:
            get_scheme(name)
        check_settings(rule, budget, energy, rank)
        self.rule, self.energy, self.rank = rule, energy, tuple(rank) if isinstance(rank, list) else rank
        self.budget = None if not callable(rule) and RULES[rule].needs != "budget" else budget or Budget(macs=0.5)
        self.include, self.exclude = as_tuple(include), as_tuple(exclude)
        self.measures = tuple(self.budget.limits()) if self.budget else ("macs",)
        if multiple is not None and (isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1):
            raise ValueError(f"multiple={multiple!r}: expected a whole number of channels, 1 or more.")
        self.multiple = multiple or (TIMED_MULTIPLE if "latency" in self.measures else 1)
        self.cache = cache
        if rule == "evbmf" and "tucker" not in self.names:
            raise ValueError(f"rule 'evbmf' finds ranks for tucker, which is not among schemes ({', '.join(self.names)}). Add it.")

    @property
    def rule_text(self) -> str:
        if callable(self.rule):
            return f"callable {getattr(self.rule, '__name__', type(self.rule).__name__)}"
        return {"energy": f"energy={self.energy}", "fixed": f"fixed rank={self.rank}"}.get(self.rule, self.rule)


def as_tuple(names: str | Sequence[str]) -> tuple[str, ...]:
    """One name, or several."""
    return (names,) if isinstance(names, str) else tuple(names)


def check_settings(rule: str | Rule, budget: Budget | None, energy: float | None, rank: Rank | None) -> None:
    """Raise ValueError unless a rule is known and has the settings that go with it, and no others."""
    if not callable(rule) and rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}. Known: {', '.join(RULES)}, or a callable on option tables.")
    for key, value, owner in (("energy", energy, "energy"), ("rank", rank, "fixed")):
        if (value is not None) != (rule == owner):
            raise ValueError(f"{key}= goes with rule={owner!r}, and only with it (found rule={rule!r}, {key}={value!r}).")
    if energy is not None and (isinstance(energy, bool) or not isinstance(energy, int | float) or not 0 < energy < 1):
        raise ValueError(f"energy={energy!r} is not a share of the squared norm to keep, in (0, 1).")
    sides = rank if isinstance(rank, tuple | list) and len(rank) == 2 else (rank,)
    if rank is not None and any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides):
        raise ValueError(f"rank={rank!r} is not a rank: expected 1 or more, or a pair of them for tucker, as in rank=(8, 8).")
    if not callable(rule) and RULES[rule].needs != "budget" and budget is not None:
        raise ValueError(f"rule {rule!r} takes no budget. Use rule='budget', or leave out budget=.")
