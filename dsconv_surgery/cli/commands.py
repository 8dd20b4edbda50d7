"""The commands of `dsconv-surgery`; each is a call or two of the public functions. Torch is imported when a command runs."""

from __future__ import annotations

import json as json_module
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import dsconv_surgery
from dsconv_surgery.cli import options
from dsconv_surgery.cli.descriptions import planning_epilog
from dsconv_surgery.support.formatting import text_table

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dsconv_surgery.compression import Compressed

IMAGENET_MEAN, IMAGENET_STD = "0.485,0.456,0.406", "0.229,0.224,0.225"
DEFAULT_INPUT = "1,3,224,224"

app = typer.Typer(
    help="Make a trained convolutional network smaller and faster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help loads faster and is easier to read
)


@app.command()
def inspect(model: options.Model, input: options.Input = DEFAULT_INPUT, weights: options.Weights = "none") -> None:  # noqa: A002
    """List every convolution and linear layer: its cost, or the reason why it cannot be cut."""
    from dsconv_surgery.cli.inputs import example_input, named_model

    _print(str(dsconv_surgery.find_convs(named_model(model, weights), example_input(input))))


@app.command(epilog=planning_epilog())
@options.takes_plan_options()
def compress(
    model: options.Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for the cut network")],
    settings: dict[str, Any],
    input: options.Input = DEFAULT_INPUT,  # noqa: A002
    weights: options.Weights = "none",
    calibration: options.CalibrationImages = None,
    images: options.Count = 512,
    mean: options.Mean = IMAGENET_MEAN,
    std: options.Std = IMAGENET_STD,
    recover: options.Recover = False,
    measure_latency: options.MeasureLatency = False,
    channels_last: options.ChannelsLast = False,
    cache: options.UseCache = True,
    progress: options.Progress = None,
    json: options.Json = False,
) -> None:
    """Cut a network, save it with its plan, and print what that saves."""
    from dsconv_surgery.cli.announcement import announce, describe_images

    options.check_writable(out)
    dense, example = _load_model(model, weights, input, channels_last)
    batches = _load_calibration(calibration, example, images, mean, std)
    runtime, budget = settings.get("runtime"), settings.get("budget")
    if measure_latency and (budget is None or budget.latency is None):  # the runtime is for the report alone
        settings.pop("runtime", None)
    plan_settings = dsconv_surgery.PlanSettings(**settings)
    announce(model, weights, dense, example, plan_settings, describe_images(calibration, batches, mean, std), measure_latency)
    small = dsconv_surgery.compress(dense, example, calibration=batches, recover=recover, cache=cache, progress=progress, **settings)
    _save_and_print(small, out, dense, example, measure_latency, json, None if calibration == "synthetic" else batches, runtime)


@app.command()
def report(
    model: options.Model,
    folder: Annotated[Path, typer.Argument(help="a folder that compress or run wrote")],
    input: options.Input = DEFAULT_INPUT,  # noqa: A002
    weights: options.Weights = "none",
    data: options.Data = None,
    images: options.Count = 512,
    mean: options.Mean = IMAGENET_MEAN,
    std: options.Std = IMAGENET_STD,
    measure_latency: options.MeasureLatency = False,
    runtime: options.Runtime = None,
    channels_last: options.ChannelsLast = False,
    json: options.Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="print Markdown")] = False,
) -> None:
    """Compare a saved network with the dense one; errors are relative to the weights that --weights names."""
    from dsconv_surgery.checkpoint import read_plan
    from dsconv_surgery.cli.announcement import announce

    dense, example = _load_model(model, weights, input, channels_last)
    batches = _load_images(data, example, images, mean, std)
    announce(model, weights, dense, example, timed=measure_latency)
    cut, plan = dsconv_surgery.load(dense, folder), read_plan(folder)
    result = dsconv_surgery.compare(dense, cut, example, plan=plan, latency=measure_latency, runtime=runtime, data=batches)
    _print(result.to_json() if json else result.to_markdown() if markdown else str(result))


@app.command(epilog=planning_epilog())
@options.takes_plan_options(budget=False)
def sweep(
    model: options.Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for sweep.json, sweep.md and, with matplotlib, sweep.png")],
    settings: dict[str, Any],
    fractions: options.Fractions = None,
    measure: options.Measure = "macs",
    input: options.Input = DEFAULT_INPUT,  # noqa: A002
    weights: options.Weights = "none",
    calibration: options.CalibrationImages = None,
    data: options.Data = None,
    images: options.Count = 512,
    mean: options.Mean = IMAGENET_MEAN,
    std: options.Std = IMAGENET_STD,
    measure_latency: options.MeasureLatency = False,
    channels_last: options.ChannelsLast = False,
    cache: options.UseCache = True,
    progress: options.Progress = None,
) -> None:
    """Cut a network to several budgets and print what each costs and how close its outputs are."""
    from dsconv_surgery.cli.announcement import announce, describe_images
    from dsconv_surgery.sweep import FRACTIONS, sweep_settings

    options.check_writable(out)
    values = options.numbers_in("--fractions", fractions) if fractions else FRACTIONS
    dense, example = _load_model(model, weights, input, channels_last)
    compared, batches = _load_images(data, example, images, mean, std), _load_calibration(calibration, example, images, mean, std)
    plan_settings = sweep_settings(settings, values, measure, measure_latency)[0]
    announce(model, weights, dense, example, plan_settings, describe_images(calibration, batches, mean, std), measure_latency)
    settings |= {"fractions": values, "measure": measure, "latency": measure_latency, "cache": cache, "progress": progress}
    result = dsconv_surgery.pareto(dense, example, data=compared, calibration=batches, **settings)
    out.mkdir(parents=True, exist_ok=True)
    (out / "sweep.json").write_text(result.to_json())
    (out / "sweep.md").write_text(result.to_markdown())
    _print(str(result))
    try:
        result.plot(out / "sweep.png")
    except ValueError as error:
        typer.echo(str(error), err=True)
    typer.echo(f"saved to {out}", err=True)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="a TOML file, or a recipe's name (see the command recipes)")],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for the cut network")],
    model: Annotated[str | None, typer.Option(help="a model to use instead of the recipe's, named as for compress")] = None,
    weights: options.Weights = "none",
    calibration: options.CalibrationImages = None,
    train: Annotated[Path | None, typer.Option(help="images to fine-tune on, if the recipe asks for it; as for --calibration")] = None,
    mean: options.Mean = IMAGENET_MEAN,
    std: options.Std = IMAGENET_STD,
    measure_latency: options.MeasureLatency = False,
    cache: options.UseCache = True,
    progress: options.Progress = None,
    json: options.Json = False,
) -> None:
    """Compress a network as a recipe says, fine-tune it towards the dense network if it says so, and save it."""
    from dsconv_surgery.cli.announcement import announce, describe_images
    from dsconv_surgery.cli.inputs import shuffled

    options.check_writable(out)
    loaded = dsconv_surgery.Recipe.load(recipe)
    if loaded.max_drop is not None:
        raise ValueError(f"recipe {recipe!r} has max_drop, which needs a score. Run it in Python: Recipe.load(...).run(..., evaluate=...).")
    if not (model or loaded.model):
        raise ValueError(f"recipe {recipe!r} names no model. Name one with --model.")
    dense, example = _load_model(model or loaded.model, weights, ",".join(map(str, loaded.input)), loaded.channels_last)
    batches = _load_calibration(calibration, example, loaded.calibration.images if loaded.calibration else 1, mean, std)
    tuning = _load_images(train, example, sys.maxsize, mean, std)
    announce(model or loaded.model, weights, dense, example, loaded, describe_images(calibration, batches, mean, std), measure_latency)
    loader = None if tuning is None else shuffled(tuning)
    small = loaded.run(dense, example, calibration=batches, train=loader, cache=cache, progress=progress)
    for history in small.tuned:
        typer.echo(str(history), err=True)
    _save_and_print(small, out, dense, example, measure_latency, json)


@app.command()
def export(
    model: options.Model,
    folder: Annotated[Path, typer.Argument(help="a folder that compress or run wrote")],
    onnx: Annotated[Path, typer.Option("--onnx", help="the file to write")],
    input: Annotated[str | None, typer.Option("--input", help="shape of the example input (the plan's, if not given)")] = None,  # noqa: A002
) -> None:
    """Write a saved network as ONNX for any batch size, with BatchNorms folded, after a check of its outputs in onnxruntime."""
    from dsconv_surgery.cli.export import write_onnx

    options.check_writable(onnx.parent, "--onnx")
    _print(write_onnx(model, folder, onnx, input))


@app.command()
def recipes(schema: Annotated[bool, typer.Option("--schema", help="print the JSON schema of a recipe's file")] = False) -> None:
    """List the recipes that come with the library."""
    recipe_type = dsconv_surgery.Recipe
    if schema:
        _print(json_module.dumps(recipe_type.schema(), indent=1))
        return
    loaded = {name: recipe_type.load(path) for name, path in recipe_type.known().items()}
    rows = [(name, recipe.model or "-", recipe.description) for name, recipe in loaded.items()]
    _print(text_table("", ("recipe", "model", "what it does"), rows))


def main() -> None:
    """Run the command line; a user's mistake is one line, not a traceback."""
    try:
        with _native_output_to_stderr(), warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            app()
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        message = options.name_options(" ".join(str(error).split()))
        typer.echo(f"error: {message.replace('on the example inputs', 'on the example inputs of --input', 1)}", err=True)
        sys.exit(1)


def _show_warning(message: Warning | str, category: type[Warning], *_place: Any) -> None:
    """A warning in one line, without the place in the code."""
    typer.echo(f"warning: {message}", err=True)


@contextmanager
def _native_output_to_stderr() -> Iterator[None]:
    """Send what native libraries print (rarely, scipy's solver does) to standard error: standard output holds the result alone."""
    if sys.stdout is not sys.__stdout__:  # replaced by the caller
        yield
        return
    with os.fdopen(os.dup(1), "w") as stdout:
        os.dup2(2, 1)
        sys.stdout = stdout
        try:
            yield
        finally:
            stdout.flush()
            os.dup2(stdout.fileno(), 1)
            sys.stdout = sys.__stdout__


def _load_images(path: Path | None, example: Tensor, count: int, mean: str, std: str) -> list[Tensor] | None:
    from dsconv_surgery.cli.inputs import image_batches

    return None if path is None else image_batches(path, example, count, mean, std)


def _load_calibration(name: str | None, example: Tensor, count: int, mean: str, std: str) -> Any:
    """Batches of images from a folder or a file; or the settings of synthetic images, normalised like pictures of a folder."""
    from dsconv_surgery.cli.inputs import numbers

    if name != "synthetic":
        return _load_images(None if name is None else Path(name), example, count, mean, std)
    texts = ("--mean", mean), ("--std", std)
    scale = [numbers(option, text, example.shape[1]) if example.ndim == 4 else None for option, text in texts]
    return dsconv_surgery.Calibration.synthetic(count, mean=scale[0], std=scale[1])


def _load_model(model: str, weights: str, shape: str, channels_last: bool) -> tuple[nn.Module, Tensor]:
    from dsconv_surgery.cli.inputs import example_input, named_model
    from dsconv_surgery.support.copies import channels_last_copy
    from dsconv_surgery.support.inputs import Inputs

    dense, example = named_model(model, weights), example_input(shape)
    if channels_last:
        dense, inputs = channels_last_copy(dense, Inputs(example))
        (example,) = inputs.args
    return dense, example


def _save_and_print(
    small: Compressed,
    out: Path,
    dense: nn.Module,
    example: Tensor,
    latency: bool,
    json: bool,
    data: list[Tensor] | None = None,
    runtime: str | None = None,
) -> None:
    dsconv_surgery.save(small, out)
    result = small.report
    if latency or data:
        runtime = runtime if latency else None
        result = dsconv_surgery.compare(dense, small.model, example, plan=small.plan, latency=latency, runtime=runtime, data=data)
        result = replace(result, recovery=small.report.recovery)
    _print(result.to_json() if json else str(result))
    typer.echo(f"saved to {out}", err=True)


def _print(text: str) -> None:
    typer.echo(text.rstrip())
