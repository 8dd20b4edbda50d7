"""The command line: thin, every command is a call or two of the public names."""

from __future__ import annotations

import json as plain_json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from torch import Tensor, nn

from dsconv_surgery.budget import Budget
from dsconv_surgery.checkpoint import load, read_plan, save
from dsconv_surgery.cli.inputs import example_input, image_batches, named_model, shuffled
from dsconv_surgery.compression import compress
from dsconv_surgery.network.discovery import Skip, survey_model
from dsconv_surgery.planning.rules import RULES
from dsconv_surgery.recipe import Recipe
from dsconv_surgery.report import compare
from dsconv_surgery.support.copies import channels_last_copy
from dsconv_surgery.support.formatting import text_table
from dsconv_surgery.sweep import FRACTIONS, pareto

IMAGENET_MEAN, IMAGENET_STD = "0.485,0.456,0.406", "0.229,0.224,0.225"

app = typer.Typer(help="Make a trained convolutional network smaller and faster.", no_args_is_help=True, pretty_exceptions_enable=False)

Model = Annotated[str, typer.Argument(help="torchvision:NAME, timm:NAME or package.module:callable (called without arguments)")]
Input = Annotated[str, typer.Option("--input", help="shape of the example input, batch first")]
Weights = Annotated[str, typer.Option(help="none, DEFAULT (pretrained, downloaded) or a .safetensors or .pt state_dict")]
Latency = Annotated[bool, typer.Option("--latency", help="time both networks")]
Calibrate = Annotated[Path | None, typer.Option(help="unlabelled images to factorise for: a folder, or a .pt, .safetensors or .npy tensor")]
Count = Annotated[int, typer.Option(min=1, help="use at most so many images, spread over all there are")]
Mean = Annotated[str, typer.Option(help="by which a folder's images, scaled to [0, 1], are normalised")]
Std = Annotated[str, typer.Option(help="the same")]
ChannelsLast = Annotated[bool, typer.Option("--channels-last", help="model and input in this memory format, for latency")]
Schemes = Annotated[list[str] | None, typer.Option("--scheme", help="allow only this scheme; may be repeated")]
Include = Annotated[list[str] | None, typer.Option(help="cut only layers that match; may be repeated")]
Exclude = Annotated[list[str] | None, typer.Option(help="leave layers that match; may be repeated")]
Cached = Annotated[bool, typer.Option("--cache/--no-cache", help="keep what is found out about options for the next time")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.command()
def inspect(model: Model, input: Input = "1,3,224,224", weights: Weights = "none") -> None:  # noqa: A002
    """List every convolution and linear layer: what it costs, or why it cannot be cut."""
    seen = survey_model(named_model(model, weights), example_input(input))
    rows = [
        (
            layer.name,
            layer.reason if isinstance(layer, Skip) else str(layer.spec),
            f"{seen.costs[layer.name].params:,}",
            f"{seen.costs[layer.name].macs:,}",
        )
        for layer in seen.layers
    ]
    _print(
        text_table(
            "",
            ("layer", "geometry, or why it stays", "params", "MACs"),
            [*rows, ("whole network", "", f"{seen.total.params:,}", f"{seen.total.macs:,}")],
        )
    )
    if seen.remainder_macs:
        _print(f"outside of layers (functional products): {seen.remainder_macs:,} MACs")


@app.command("compress")
def compress_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for the cut network")],
    input: Input = "1,3,224,224",  # noqa: A002
    weights: Weights = "none",
    macs: Annotated[float | None, typer.Option(help="fraction of the MACs to keep")] = None,
    params: Annotated[float | None, typer.Option(help="fraction of the parameters to keep")] = None,
    time: Annotated[float | None, typer.Option(help="fraction of the latency, measured here, to keep")] = None,
    scheme: Schemes = None,
    rule: Annotated[str, typer.Option(help=", ".join(RULES))] = "budget",
    energy: Annotated[float | None, typer.Option(help="for rule energy: share of the weights' squared norm to keep")] = None,
    rank: Annotated[int | None, typer.Option(help="for rule fixed")] = None,
    include: Include = None,
    exclude: Exclude = None,
    calibration: Calibrate = None,
    images: Count = 512,
    mean: Mean = IMAGENET_MEAN,
    std: Std = IMAGENET_STD,
    latency: Latency = False,
    channels_last: ChannelsLast = False,
    cache: Cached = True,
    json: Json = False,
) -> None:
    """Cut a network and save it with its plan; prints what that saved."""
    _check_folder(out)
    dense, example = _given(model, weights, input, channels_last)
    batches = None if calibration is None else image_batches(calibration, example, images, mean, std)
    budget = None if macs is params is time is None else Budget(macs, params, time)
    small = compress(
        dense,
        example,
        budget=budget,
        schemes=scheme or None,
        rule=rule,
        energy=energy,
        rank=rank,
        include=include or "*",
        exclude=exclude or (),
        calibration=batches,
        cache=cache,
        progress=True,
    )
    save(small, out)
    report = small.report
    if latency or batches:
        report = compare(dense, small.model, example, plan=small.plan, latency=latency, data=batches)
    _print(report.to_json() if json else str(report))
    typer.echo(f"saved to {out}", err=True)


@app.command()
def report(
    model: Model,
    folder: Annotated[Path, typer.Argument(help="written by compress")],
    input: Input = "1,3,224,224",  # noqa: A002
    weights: Weights = "none",
    data: Annotated[Path | None, typer.Option(help="images to compare outputs on: a folder, or a .pt, .safetensors or .npy tensor")] = None,
    images: Count = 512,
    mean: Mean = IMAGENET_MEAN,
    std: Std = IMAGENET_STD,
    latency: Latency = False,
    channels_last: ChannelsLast = False,
    json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="print Markdown")] = False,
) -> None:
    """Compare a saved network with the dense one; errors are against the weights given."""
    dense, example = _given(model, weights, input, channels_last)
    batches = None if data is None else image_batches(data, example, images, mean, std)
    found = compare(dense, load(dense, folder), example, plan=read_plan(folder), latency=latency, data=batches)
    _print(found.to_json() if json else found.to_markdown() if markdown else str(found))


@app.command()
def sweep(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for sweep.json, sweep.md and, with matplotlib, sweep.png")],
    keep: Annotated[list[float] | None, typer.Option(help="a fraction to keep; may be repeated")] = None,
    measure: Annotated[str, typer.Option(help="of what: macs, params or latency")] = "macs",
    input: Input = "1,3,224,224",  # noqa: A002
    weights: Weights = "none",
    scheme: Schemes = None,
    include: Include = None,
    exclude: Exclude = None,
    calibration: Calibrate = None,
    data: Annotated[Path | None, typer.Option(help="images to compare outputs on, if not those for calibration")] = None,
    images: Count = 512,
    mean: Mean = IMAGENET_MEAN,
    std: Std = IMAGENET_STD,
    latency: Latency = False,
    channels_last: ChannelsLast = False,
    cache: Cached = True,
) -> None:
    """Cut a network to one budget after the other; prints what each costs and keeps."""
    _check_folder(out)
    dense, example = _given(model, weights, input, channels_last)
    found = pareto(
        dense,
        example,
        fractions=keep or FRACTIONS,
        measure=measure,
        data=None if data is None else image_batches(data, example, images, mean, std),
        latency=latency,
        schemes=scheme or None,
        include=include or "*",
        exclude=exclude or (),
        calibration=None if calibration is None else image_batches(calibration, example, images, mean, std),
        cache=cache,
        progress=True,
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "sweep.json").write_text(found.to_json())
    (out / "sweep.md").write_text(found.to_markdown())
    _print(str(found))
    try:
        found.plot(out / "sweep.png")
    except ValueError as error:
        typer.echo(str(error), err=True)
    typer.echo(f"saved to {out}", err=True)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="a TOML file, or a recipe's name (see recipes)")],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for the cut network")],
    model: Annotated[str | None, typer.Option(help="instead of the recipe's; as for compress")] = None,
    weights: Weights = "none",
    calibration: Calibrate = None,
    train: Annotated[Path | None, typer.Option(help="images to fine-tune on, where the recipe says so: as for --calibration")] = None,
    mean: Mean = IMAGENET_MEAN,
    std: Std = IMAGENET_STD,
    latency: Latency = False,
    cache: Cached = True,
    json: Json = False,
) -> None:
    """Compress, and fine-tune towards the dense network, as a recipe says, and save."""
    _check_folder(out)
    known = Recipe.load(recipe)
    if not (model or known.model):
        raise ValueError(f"recipe {recipe!r} names no model. Give one with --model.")
    dense, example = _given(model or known.model, weights, ",".join(map(str, known.input)), known.channels_last)
    count = known.calibration.images if known.calibration else 1
    batches = None if calibration is None else image_batches(calibration, example, count, mean, std)
    tuning = None if train is None else shuffled(image_batches(train, example, sys.maxsize, mean, std))
    small = known.run(dense, example, calibration=batches, train=tuning, cache=cache, progress=True)
    save(small, out)
    for history in small.tuned:
        typer.echo(str(history), err=True)
    found = compare(dense, small.model, example, plan=small.plan, latency=True) if latency else small.report
    _print(found.to_json() if json else str(found))
    typer.echo(f"saved to {out}", err=True)


@app.command()
def recipes(schema: Annotated[bool, typer.Option("--schema", help="print the JSON schema of a recipe's file")] = False) -> None:
    """List the recipes that come with the library."""
    if schema:
        _print(plain_json.dumps(Recipe.schema(), indent=1))
        return
    rows = [(name, Recipe.load(path).model or "-", Recipe.load(path).description) for name, path in Recipe.known().items()]
    _print(text_table("", ("recipe", "model", "what it does"), rows))


def main() -> None:
    """Run the command line; a user's mistake is one line, not a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {' '.join(str(error).split())}", markup=False, highlight=False)
        sys.exit(1)


def _check_folder(out: Path) -> None:
    """Refuse, before anything is computed, what could not be written to afterwards."""
    home = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not home.is_dir() or not os.access(home, os.W_OK):
        raise ValueError(f"--out {out}: {home} is {'not writable' if home.is_dir() else 'a file'}, expected a folder to write to.")


def _given(model: str, weights: str, shape: str, channels_last: bool) -> tuple[nn.Module, Tensor]:
    dense, example = named_model(model, weights), example_input(shape)
    if channels_last:
        dense, (example,) = channels_last_copy(dense, (example,))
    return dense, example


def _print(text: str) -> None:
    typer.echo(text.rstrip())
