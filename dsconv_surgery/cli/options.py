"""Options that several commands share; those of plan settings are made from `PlanSettings`, so a new setting is written once."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from dsconv_surgery.budget import Budget
from dsconv_surgery.planning.settings import PlanSettings
from dsconv_surgery.support.records import json_schema
from dsconv_surgery.support.runtimes import RUNTIME_NAMES

FORMER_NAMES = {"schemes": "--scheme", "fractions": "--keep"}  # of options that are now named as in Python

Model = Annotated[str, typer.Argument(help="torchvision:NAME, timm:NAME or package.module:callable (called without arguments)")]
Input = Annotated[str, typer.Option("--input", help="shape of the example input, batch first")]
Weights = Annotated[str, typer.Option(help="none, DEFAULT (pretrained, downloaded) or a .safetensors or .pt state_dict")]
MeasureLatency = Annotated[bool, typer.Option("--measure-latency", help="time both networks")]
Runtime = Annotated[
    str | None,
    typer.Option("--runtime", help=f"where --measure-latency times them: {', '.join(RUNTIME_NAMES)} (the plan's, if not given)"),
]
CalibrationImages = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="unlabelled images to factorise for: a folder, a .pt, .safetensors or .npy tensor, or synthetic (./synthetic is a folder)",
    ),
]
Data = Annotated[Path | None, typer.Option("--data", help="images to compare outputs on: a folder, or a .pt, .safetensors or .npy tensor")]
Count = Annotated[int, typer.Option("--images", min=1, help="use at most this many images, spread over all of them")]
Mean = Annotated[str, typer.Option(help="channel means to normalise images of a folder with, for values in [0, 1]")]
Std = Annotated[str, typer.Option(help="channel standard deviations to normalise images of a folder with")]
ChannelsLast = Annotated[bool, typer.Option("--channels-last", help="convert model and input to torch.channels_last")]
UseCache = Annotated[bool, typer.Option("--cache/--no-cache", help="keep measurements of options on disk for the next plan")]
Progress = Annotated[
    bool | None,
    typer.Option("--progress/--no-progress", show_default=False, help="show bars of progress (in a terminal only, if not given)"),
]
Fractions = Annotated[
    list[str] | None,
    typer.Option("--fractions", FORMER_NAMES["fractions"], help="fractions to keep, as in 0.5,0.3 (0.7 to 0.2 if not given)"),
]
Measure = Annotated[str, typer.Option(help="the measure that --fractions are of: macs, params or latency")]
Recover = Annotated[
    bool, typer.Option("--recover", help="train the cut network on the calibration images, and keep the result if held-out images improve")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]

# Settings that may differ between layers: how the shell writes them.
BY_PATTERN = {
    "schemes": "or PATTERN=SCHEME,... for some layers, PATTERN= to keep them dense",
    "ranks": "as in layer1=cp,12 or layer1=tucker,8,8",
    "multiple": "or PATTERN=NUMBER for some layers",
}
TYPES = {"number": float, "integer": int, "string": str}
MEASURES = {"macs": "MACs (half of them if no budget is given)", "params": "parameters", "latency": "latency, measured here,"}


def takes_plan_options(budget: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that replaces a command's `settings` parameter by one option for every plan setting.

    The command gets a dict of the settings that were given. A budget is three options, --macs, --params and --latency, or none if
    `budget` is false.
    """
    fractions = {
        measure: Annotated[float | None, typer.Option(help=f"fraction of the {text} to keep, in (0, 1]")]
        for measure, text in MEASURES.items()
    }
    options = {**(fractions if budget else {}), **_plan_options()}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            settings = {name: value for name in options if (value := values.pop(name)) not in (None, [])}
            if settings.get("exclude") == [""]:  # the shell has no empty list
                settings["exclude"] = ()
            limits = {measure: settings.pop(measure) for measure in MEASURES if measure in settings}
            if limits:
                settings["budget"] = Budget(**limits)
            if "rank" in settings:
                settings["rank"] = _rank("--rank", settings["rank"])
            for name in BY_PATTERN.keys() & settings.keys():
                settings[name] = _by_pattern(name, settings[name])
            command(settings=settings, **values)

        named, hints = inspect.Parameter.KEYWORD_ONLY, get_type_hints(command, include_extras=True)
        parameters = [p.replace(kind=named, annotation=hints[p.name]) for p in inspect.signature(command).parameters.values()]
        index = list(hints).index("settings")
        added = [inspect.Parameter(name, named, default=None, annotation=option) for name, option in options.items()]
        parameters[index : index + 1] = added
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _plan_options() -> dict[str, Any]:
    """An option for every plan setting but the budget, with its type and help from the settings' JSON schema."""
    options: dict[str, Any] = {}
    for name, schema in json_schema(PlanSettings)["properties"].items():
        if name == "budget":
            continue
        alternatives = [choice for part in schema.get("anyOf", [schema]) for choice in part.get("anyOf", [part])]
        kinds = {choice["type"] for choice in alternatives if "type" in choice}
        repeated = name in BY_PATTERN or {"array", "string"} <= kinds
        value_type: Any = list[str] if repeated else str if "array" in kinds else TYPES[(kinds & TYPES.keys()).pop()]
        text = schema["description"].partition(", as in ")[0] + (f", {BY_PATTERN[name]}" if name in BY_PATTERN else "")
        text += "; may be repeated" * repeated + ", or have commas" * (name == "schemes") + ", or '' for none" * (name == "exclude")
        options[name] = Annotated[value_type | None, typer.Option(*option_names(name), help=text)]
    return options


def option_names(setting: str) -> tuple[str, ...]:
    """The option for a setting or an argument, named as in Python, and its former name if it has one."""
    name = f"--{setting.replace('_', '-')}"
    return (name, FORMER_NAMES[setting]) if setting in FORMER_NAMES else (name,)


def name_options(message: str) -> str:
    """An error message with the option in the place of the setting or argument that it begins with."""
    settings = (*MEASURES, *json_schema(PlanSettings)["properties"], "calibration", "data", "recover", "fractions", "measure")
    name, separator, rest = message.partition(":") if ":" in message.split("=")[0] else message.partition("=")
    if not separator or name not in settings:
        return message
    return f"{option_names(name)[0]}{separator if rest[:1].strip() or separator == ':' else ''}{rest}"


def numbers_in(option: str, texts: list[str]) -> tuple[float, ...]:
    """The numbers of an option that may be repeated, each with others after commas."""
    try:
        return tuple(float(part) for text in texts for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {','.join(texts)!r}: expected numbers with commas between, as in {option} 0.5,0.3.") from None


def _rank(option: str, text: str) -> int | tuple[int, ...]:
    """A rank, or a pair of them with a comma."""
    try:
        ranks = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text!r}: expected a whole number, or two with a comma for tucker, as in --rank 8,8.") from None
    return ranks[0] if len(ranks) == 1 else ranks


def _by_pattern(name: str, texts: list[str]) -> Any:
    """The value of a setting for all layers, or its values by pattern."""
    option, example = option_names(name)[0], BY_PATTERN[name]
    pairs = [text.partition("=") for text in texts]
    if not any(separator for _, separator, _ in pairs) and name != "ranks":
        listed = ",".join(texts)
        return listed.split(",") if name == "schemes" else _multiple(option, listed)
    if wrong := [text for text in texts if not text.partition("=")[0] or "=" not in text]:
        raise ValueError(f"{option} {wrong[0]!r}: expected a pattern of layer names before '=', {example}.")
    values: dict[str, Any] = {}
    for pattern, _, text in pairs:
        if pattern in values:
            raise ValueError(f"{option} {pattern}=...: given twice. Write all in one, {example}.")
        if name == "schemes":
            values[pattern] = tuple(part for part in text.split(",") if part)
        elif name == "ranks":
            scheme, _, rank = text.partition(",")
            values[pattern] = (scheme, _rank(f"{option} {pattern}=...", rank))
        else:
            values[pattern] = _multiple(option, text)
    return values


def _multiple(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{option} {text!r}: expected one whole number, {BY_PATTERN['multiple']}.") from None


def check_writable(folder: Path, option: str = "--out") -> None:
    """Refuse a folder that cannot be written to, before anything is computed."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        problem = "is not writable" if existing.is_dir() else "is a file"
        raise ValueError(f"{option} {folder}: {existing} {problem}, expected a folder to write to.")
