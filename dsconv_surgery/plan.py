"""What is to be done to a network, as plain data that can be read, edited, committed and replayed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from dsconv_surgery.budget import Budget
from dsconv_surgery.network.discovery import Skip
from dsconv_surgery.network.geometry import ConvSpec, Cost, Rank, Size, chain_cost
from dsconv_surgery.schemes import chain_of, check_rank, get_scheme
from dsconv_surgery.support.formatting import did_you_mean, text_table
from dsconv_surgery.support.latency import Latency
from dsconv_surgery.support.records import JsonRecord

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Cut:
    """One layer's replacement, with the geometry that it was decided for, so that a changed layer is noticed."""

    name: str
    scheme: str
    rank: Rank
    spec: ConvSpec
    sizes: tuple[Size, ...]
    error: float | None = None  # squared and relative, of the weights, or of outputs on calibration images; None: known once cut
    damage: float | None = None  # what the rule took it to do to the network's outputs, in nats for classifiers

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        check_rank(self.name, get_scheme(self.scheme), self.spec, self.rank)

    @property
    def chain(self) -> dict[str, ConvSpec]:
        return chain_of(get_scheme(self.scheme), self.spec, self.rank)

    @property
    def cost_before(self) -> Cost:
        return chain_cost({"dense": self.spec}, self.sizes)

    @property
    def cost_after(self) -> Cost:
        return chain_cost(self.chain, self.sizes)


@dataclass(frozen=True)
class Plan(JsonRecord):
    """What is to be done to a network: cuts, layers left as they are with the reason, and how it was decided."""

    cuts: tuple[Cut, ...]
    skips: tuple[Skip, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    rule: str
    budget: Budget | None
    total: Cost  # of the dense network
    calibrated: bool = False  # errors are of outputs on calibration images, and cutting needs some, too
    timing: Latency | None = None  # where latency was limited
    format_version: int = FORMAT_VERSION

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    @property
    def total_after(self) -> Cost:
        spent = self.total
        for cut in self.cuts:
            spent = spent - cut.cost_before + cut.cost_after
        return spent

    def replace(self, name: str, *, scheme: str | None = None, rank: Rank | None = None) -> Plan:
        """A plan in which one cut has another scheme, another rank or both.

        Raises:
            ValueError: no such cut, unknown scheme, or a rank that the scheme does not have there.

        Example:
            >>> plan.replace("layer1.0.conv1", scheme="depthwise", rank=2)
        """
        if name not in [cut.name for cut in self.cuts]:
            raise ValueError(f"{name}: no cut of this name.{did_you_mean(name, [cut.name for cut in self.cuts])} {_why_left(self, name)}")
        cuts = tuple(
            replace(cut, scheme=scheme or cut.scheme, rank=cut.rank if rank is None else rank, error=None, damage=None)
            if cut.name == name
            else cut
            for cut in self.cuts
        )
        return replace(self, cuts=cuts, rule=_edited(self.rule), timing=None)

    def without(self, pattern: str) -> Plan:
        """A plan that leaves alone the layers whose name matches a shell-style pattern, such as "layer1.*".

        Raises:
            ValueError: no cut matches.
        """
        out = {cut.name for cut in self.cuts if fnmatchcase(cut.name, pattern)}
        if not out:
            raise ValueError(f"no cut matches {pattern!r}.{did_you_mean(pattern, [cut.name for cut in self.cuts])}")
        skips = tuple(Skip(name, f"taken out by hand ({pattern!r}).") for name in sorted(out))
        return replace(
            self, cuts=tuple(c for c in self.cuts if c.name not in out), skips=self.skips + skips, rule=_edited(self.rule), timing=None
        )

    def __str__(self) -> str:
        rows = [
            (
                cut.name,
                str(cut.spec),
                cut.scheme,
                str(cut.rank),
                f"{cut.cost_before.params:,}",
                f"{cut.cost_after.params:,}",
                f"{cut.cost_before.macs:,}",
                f"{cut.cost_after.macs:,}",
                "-" if cut.error is None else f"{cut.error:.4f}",
            )
            for cut in self.cuts
        ]
        after = self.total_after
        rows.append(
            ("whole network", "", "", "", f"{self.total.params:,}", f"{after.params:,}", f"{self.total.macs:,}", f"{after.macs:,}", "")
        )
        columns = ("layer", "geometry", "scheme", "rank", "params", "-> params", "MACs", "-> MACs", "error")
        left = "".join(f"\nleft dense: {skip.name} - {skip.reason}" for skip in self.skips)
        how = ", calibrated" if self.calibrated else ""
        t = self.timing
        timed = "" if t is None else f"\nlatency {t.before:.2f} -> {t.after:.2f} ms predicted ({t.conditions})"
        return text_table(f"rule {self.rule}, {self.budget or 'no budget'}{how}", columns, rows) + timed + left


def _why_left(plan: Plan, name: str) -> str:
    return next((f"It was skipped: {skip.reason}" for skip in plan.skips if skip.name == name), "See plan.cuts.")


def _edited(rule: str) -> str:
    return rule if rule.endswith(", edited") else f"{rule}, edited"
