"""PlanSettings: how a plan is made, written once for `make_plan`, `compress`, `pareto`, `Recipe` and the command line."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, ValidationInfo
from pydantic.json_schema import SkipJsonSchema

from dsconv_surgery.budget import Budget
from dsconv_surgery.network.geometry import Rank
from dsconv_surgery.planning.rules import RULES
from dsconv_surgery.support.formatting import did_you_mean
from dsconv_surgery.support.patterns import first_match
from dsconv_surgery.support.records import checked_record, quoted
from dsconv_surgery.support.runtimes import RUNTIME_NAMES, check_runtime

F = TypeVar("F", bound=Callable[..., Any])

LATENCY_MULTIPLE = 8  # channels; under a latency budget, ranks in between are no faster
WIDE_MULTIPLE = 16  # channels; onnxruntime fills blocks of 16 with zeros where vectors have 512 bits


def _budget(value: Any, info: ValidationInfo) -> Any:
    if value is None or isinstance(value, Budget) or info.mode == "json":
        return value
    raise ValueError(f"budget={quoted(value)}: expected a Budget. Write budget=Budget(macs=0.5), or params= or latency=.")


def as_tuple(value: Any) -> Any:
    """One name, or several in a list, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _layers(value: Any) -> Any:
    """Patterns of layer names; classes become their names, as in "nn.Linear"."""
    from dsconv_surgery.network.layers import class_path  # here, as it imports torch

    value = as_tuple((value,) if isinstance(value, type) else value)
    return tuple(class_path(item) if isinstance(item, type) else item for item in value) if isinstance(value, tuple) else value


def _schemes(value: Any) -> Any:
    """Names of schemes as they are; or names by pattern as tuples, empty for None."""
    if isinstance(value, Mapping):
        return {pattern: () if names is None else as_tuple(names) for pattern, names in value.items()}
    return value


def _tuples(value: Any) -> Any:
    """Lists in nests as tuples."""
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


Names = Annotated[tuple[str, ...], BeforeValidator(as_tuple, json_schema_input_type=str | list[str])]
Layers = Annotated[tuple[str, ...], BeforeValidator(_layers, json_schema_input_type=str | list[str])]
SchemesByPattern = Annotated[dict[str, tuple[str, ...]], Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
OneRank = Positive | tuple[Positive, Positive]


@checked_record("compress(model, x, budget=Budget(macs=0.5), schemes=['cp', 'bottleneck'])")
class PlanSettings:
    """How to choose, for every layer, whether to cut it, with which scheme and at which rank.

    Args:
        budget: fractions of the whole network to keep; Budget(macs=0.5) if not given. Latency is measured on the device of the example
            inputs with torch's current thread count.
        schemes: names of the schemes to choose from; None for all. Or names by pattern, as in {"layer4": "cp", "fc": None, "*": ["cp",
            "tucker"]}: the first pattern that matches a layer counts, None keeps its layers dense, and others may have all schemes.
        ranks: a scheme and a rank by pattern, as in {"layer1.0.conv1": ("cp", 12)}. These layers are cut so, whatever it saves; the rule
            chooses for the others, within what is left of the budget.
        rule: "budget" (least damage to the network's outputs within the budget), "uniform" (one cost fraction for all layers),
            "equal_error" (one error for all layers), "energy" (the cheapest option of each layer that keeps `energy`), "fixed" (`rank`
            everywhere), "evbmf" (Tucker at the ranks of variational Bayes), or a function of option tables (see `dsconv_surgery.planning`).
        energy: with rule "energy", the share of each layer's squared weight norm to keep, in (0, 1).
        rank: with rule "fixed", the rank of every layer; a pair for tucker.
        include: patterns of layer names or types; only matching layers are cut. A pattern is a layer's or module's name, which also means
            everything below it ("layer1"), a name with a shell's wildcards ("layer*.conv1"), or a type (nn.Linear, in files "nn.Linear").
            In other settings, patterns are names, with or without wildcards.
        exclude: patterns as for `include`; matching layers stay dense. By default none; without calibration images the first convolution
            and the last layer, because errors of their weights do not tell how much a cut would harm. They are cut with `exclude=()`,
            if `include` has their full names, if `ranks` names them, if they are more than a quarter of the cost, and if no other layer can
            be cut.
        multiple: offer only ranks at which links have a multiple of so many channels; 8 under a latency budget (16 in onnxruntime on
            CPUs with AVX-512), otherwise 1. Or numbers by pattern, as in {"layer4": 16}; the first pattern that matches a layer counts.
        runtime: what executes the network whose latency the budget limits: "eager", "compile" (torch.compile, which takes half a second
            for each option that is timed), "onnxruntime" (on the CPU; needs the extra `onnx`), or a function `(module, inputs) ->
            milliseconds` that measures `module(*inputs.args, **inputs.kwargs)` where it will run. The network's and single chains' times
            are asked for; those of a function are not cached on disk.

    Raises:
        ValueError: an unknown setting, a value of the wrong type or range, or settings that contradict each other.

    Example:
        >>> PlanSettings(budget=Budget(params=0.4), schemes=["cp"], exclude="conv1")
    """

    budget: Annotated[Budget | None, BeforeValidator(_budget)] = None
    schemes: Annotated[
        Annotated[Names, Field(min_length=1)] | SchemesByPattern | None,
        BeforeValidator(_schemes, json_schema_input_type=str | list[str] | SchemesByPattern | None),
        Field(description="a scheme to choose from (all if not given)"),
    ] = None
    rule: Annotated[
        str | SkipJsonSchema[Callable[..., Any]], Field(description=f"one of {', '.join(RULES)}, or in Python a function of option tables")
    ] = "budget"
    energy: Annotated[
        float | None, Field(gt=0, lt=1, description="a share of the squared weight norm to keep in (0, 1), for rule energy")
    ] = None
    rank: Annotated[
        OneRank | None,
        BeforeValidator(as_tuple),
        Field(description="a rank of 1 or more for rule fixed, or a pair of ranks for tucker"),
    ] = None
    ranks: Annotated[
        Annotated[dict[str, tuple[str, OneRank]], Field(min_length=1)] | None,
        BeforeValidator(_tuples),
        Field(description="a scheme and a rank by pattern, as in ranks={'layer1': ('cp', 12)}"),
    ] = None
    include: Annotated[Layers, Field(description="pattern of layer names, or a type such as nn.Conv2d; only matching layers are cut")] = (
        "*",
    )
    exclude: Annotated[
        Layers | None,
        Field(
            description="pattern of layer names, or a type such as nn.Linear; matching layers stay dense (without images by default the "
            "first and last)"
        ),
    ] = None
    multiple: Annotated[
        Positive | Annotated[dict[str, Positive], Field(min_length=1)] | None,
        Field(description="a number of channels, 1 or more, that links must have a multiple of"),
    ] = None
    runtime: Annotated[
        str | SkipJsonSchema[Callable[..., Any]],
        Field(
            description=f"one of {', '.join(RUNTIME_NAMES)}, where latency is measured, or in Python a function (module, inputs) -> "
            "milliseconds"
        ),
    ] = "eager"

    def __post_init__(self) -> None:
        from dsconv_surgery.schemes import get_scheme  # here, as it imports torch

        for name in (*self.scheme_names, *(name for name, _ in (self.ranks or {}).values())):
            get_scheme(name)
        if isinstance(self.rule, str) and self.rule not in RULES:
            choices = f"Known: {', '.join(RULES)}, or a function of option tables."
            raise ValueError(f"unknown rule {quoted(self.rule)}.{did_you_mean(self.rule, RULES)} {choices}")
        for owner, rule in RULES.items():
            if rule.needs not in (None, "budget") and ((value := getattr(self, rule.needs)) is not None) != (self.rule == owner):
                actual = f"found rule={self.rule!r}, {rule.needs}={value!r}"
                raise ValueError(f"{rule.needs}= goes with rule={owner!r} and only with it; {actual}.")
        if self.budget is not None and not self._takes_budget:
            raise ValueError(f"rule {self.rule!r} takes no budget. Use rule='budget', or leave out budget=.")
        check_runtime(self.runtime)
        if self.runtime != "eager" and "latency" not in self.measures:
            actual = f"found runtime={self.runtime!r}, {self.effective_budget or 'a rule that takes no budget'}"
            raise ValueError(f"runtime= goes with a budget on latency, as in budget=Budget(latency=0.5); {actual}.")
        scheme = RULES[self.rule].scheme if isinstance(self.rule, str) else None
        if scheme is not None and scheme not in self.scheme_names:
            raise ValueError(
                f"rule {self.rule!r} chooses ranks for {scheme}, but schemes are {', '.join(self.scheme_names)}. Add {scheme!r}."
            )

    @property
    def _takes_budget(self) -> bool:
        return callable(self.rule) or RULES[self.rule].needs == "budget"

    @property
    def scheme_names(self) -> tuple[str, ...]:
        """The schemes to choose from."""
        from dsconv_surgery.schemes import scheme_names

        if isinstance(self.schemes, tuple):
            return self.schemes
        by_pattern = self.schemes or {}
        others = () if "*" in by_pattern else scheme_names()
        return tuple(dict.fromkeys(name for names in (*by_pattern.values(), others) for name in names))

    def schemes_for(self, names: Sequence[str]) -> tuple[str, ...]:
        """The schemes to choose from for a layer with these names; none for a layer that is to stay dense."""
        return first_match(self.schemes, names, self.scheme_names) if isinstance(self.schemes, dict) else self.scheme_names

    def multiple_for(self, names: Sequence[str]) -> int:
        """The number that links of a layer with these names must have a multiple of channels of."""
        default = self._latency_multiple if "latency" in self.measures else 1
        return first_match(self.multiple, names, default) if isinstance(self.multiple, dict) else self.multiple or default

    @property
    def _latency_multiple(self) -> int:
        """The default of `multiple` under a latency budget."""
        from torch.backends import cpu

        return WIDE_MULTIPLE if self.runtime == "onnxruntime" and cpu.get_cpu_capability() == "AVX512" else LATENCY_MULTIPLE

    def preset_option(self, names: Sequence[str]) -> tuple[str, Rank] | None:
        """The scheme and rank that `ranks` has for a layer with these names, or None."""
        return first_match(self.ranks or {}, names, None)

    @property
    def effective_budget(self) -> Budget | None:
        """The budget, half of the MACs if none is set; None for rules that take no budget."""
        return self.budget or Budget(macs=0.5) if self._takes_budget else None

    @property
    def measures(self) -> tuple[str, ...]:
        """The measures that the budget limits; MACs where there is no budget."""
        return tuple(self.effective_budget.limits()) if self.effective_budget else ("macs",)

    @property
    def rule_text(self) -> str:
        """The rule and its setting, as a plan records them."""
        if callable(self.rule):
            return f"callable {getattr(self.rule, '__name__', type(self.rule).__name__)}"
        setting = RULES[self.rule].needs
        if setting in (None, "budget"):
            return self.rule
        text = f"{setting}={getattr(self, setting)}"
        return text if setting == self.rule else f"{self.rule} {text}"


def plan_keywords() -> dict[str, Any]:
    """The name and the default of every plan setting."""
    return {field.name: field.default for field in dataclasses.fields(PlanSettings)}


def takes_plan_settings(function: F) -> F:
    """A decorator for functions with `**settings`: shows the plan settings in the signature, and refuses misspelt keywords with a hint."""
    signature = inspect.signature(function)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    settings = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default) for name, default in plan_keywords().items()]
    names = [parameter.name for parameter in (*own, *settings) if parameter.kind is inspect.Parameter.KEYWORD_ONLY]

    @functools.wraps(function)
    def checked(*args: Any, **keywords: Any) -> Any:
        for name in keywords.keys() - set(names) - {"model"}:
            hint = f"Known: {', '.join(names)}, as in {function.__name__}(model, x, budget=Budget(macs=0.5), schemes=['cp', 'bottleneck'])."
            raise ValueError(f"{name}=: there is no such setting.{did_you_mean(name, names)} {hint}")
        return function(*args, **keywords)

    checked.__signature__ = signature.replace(parameters=[*own, *settings])  # type: ignore[attr-defined]
    return checked  # type: ignore[return-value]
