"""The command line: thin, every command is a call or two of the public names."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from dsconv_surgery.budget import Budget
from dsconv_surgery.checkpoint import load, read_plan, save
from dsconv_surgery.graph import Skip, survey
from dsconv_surgery.pipeline import compress
from dsconv_surgery.report import compare
from dsconv_surgery.text import nearest, text_table

IMAGENET_MEAN, IMAGENET_STD = "0.485,0.456,0.406", "0.229,0.224,0.225"
PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
BATCH = 64

app = typer.Typer(help="Make a trained convolutional network smaller and faster.", no_args_is_help=True, pretty_exceptions_enable=False)

Model = Annotated[str, typer.Argument(help="torchvision:NAME, timm:NAME or package.module:callable (called without arguments)")]
Input = Annotated[str, typer.Option("--input", help="shape of the example input, batch first")]
Weights = Annotated[str, typer.Option(help="none, DEFAULT (pretrained, downloaded) or a .safetensors or .pt state_dict")]
Latency = Annotated[bool, typer.Option("--latency", help="time both networks")]
Calibrate = Annotated[Path | None, typer.Option(help="unlabelled images to factorise for: a folder, or a .pt, .safetensors or .npy tensor")]
Count = Annotated[int, typer.Option(min=1, help="use at most so many images, spread over all there are")]
Mean = Annotated[str, typer.Option(help="by which a folder's images, scaled to [0, 1], are normalised")]
Std = Annotated[str, typer.Option(help="the same")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.command()
def inspect(model: Model, input: Input = "1,3,224,224", weights: Weights = "none") -> None:  # noqa: A002
    """List every convolution and linear layer: what it costs, or why it cannot be cut."""
    seen = survey(_model(model, weights), _example(input))
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
    scheme: Annotated[list[str] | None, typer.Option(help="allow only this scheme; may be repeated")] = None,
    rule: Annotated[str, typer.Option(help="uniform, energy or fixed")] = "uniform",
    energy: Annotated[float | None, typer.Option(help="for rule energy: share of the weights' squared norm to keep")] = None,
    rank: Annotated[int | None, typer.Option(help="for rule fixed")] = None,
    include: Annotated[list[str] | None, typer.Option(help="cut only layers that match; may be repeated")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="leave layers that match; may be repeated")] = None,
    calibration: Calibrate = None,
    images: Count = 512,
    mean: Mean = IMAGENET_MEAN,
    std: Std = IMAGENET_STD,
    latency: Latency = False,
    json: Json = False,
) -> None:
    """Cut a network and save it with its plan; prints what that saved."""
    dense, example = _model(model, weights), _example(input)
    batches = None if calibration is None else _batches(calibration, example, images, mean, std)
    budget = Budget(macs=macs, params=params) if macs is not None or params is not None else None
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
    json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="print Markdown")] = False,
) -> None:
    """Compare a saved network with the dense one; errors are against the weights given."""
    dense = _model(model, weights)
    example = _example(input)
    batches = None if data is None else _batches(data, example, images, mean, std)
    found = compare(dense, load(dense, folder), example, plan=read_plan(folder), latency=latency, data=batches)
    _print(found.to_json() if json else found.to_markdown() if markdown else str(found))


def main() -> None:
    """Run the command line; a user's mistake is one line, not a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {' '.join(str(error).split())}", markup=False, highlight=False)
        sys.exit(1)


def _print(text: str) -> None:
    typer.echo(text.rstrip())


def _example(shape: str) -> torch.Tensor:
    try:
        sizes = [int(part) for part in shape.split(",")]
        return torch.zeros(sizes)
    except (ValueError, RuntimeError):
        raise ValueError(f"--input {shape!r}: expected sizes separated by commas, batch first, such as 1,3,224,224.") from None


def _batches(path: Path, example: torch.Tensor, count: int, mean: str, std: str) -> list[torch.Tensor]:
    """Images as the model takes them, from a folder of pictures (resized, cropped, normalised) or a tensor (taken as it is)."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES)
        if not files:
            raise ValueError(f"{path}: no pictures in this folder ({', '.join(PICTURES)}).")
        chosen = [files[at * len(files) // count] for at in range(count)] if count < len(files) else files
        scale = [torch.tensor(_numbers(text, example.shape[1])).view(-1, 1, 1) for text in (mean, std)]
        pictures = torch.stack([(_picture(file, example) - scale[0]) / scale[1] for file in chosen])
        return list(pictures.split(BATCH))
    if not path.exists():
        raise FileNotFoundError(f"{path}: not there. Expected a folder of pictures or a .pt, .safetensors or .npy file with one tensor.")
    try:
        if path.suffix == ".npy":
            tensor = torch.from_numpy(np.load(path, allow_pickle=False))
        elif path.suffix == ".safetensors":
            (tensor,) = load_file(path).values()
        else:
            tensor = torch.load(path, weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file makes its reader stumble over
        raise ValueError(f"{path}: expected a .pt, .safetensors or .npy file with one tensor: {error}") from error
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        raise ValueError(f"{path}: found {getattr(tensor, 'dtype', type(tensor).__name__)}, expected a tensor of normalised images.")
    rows = torch.linspace(0, len(tensor) - 1, count).long() if count < len(tensor) else torch.arange(len(tensor))
    return list(tensor[rows].float().split(BATCH))


def _numbers(text: str, channels: int) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, channels):
        raise ValueError(f"{text!r}: expected {channels} numbers separated by commas, one for each channel.")
    return numbers


def _picture(file: Path, example: torch.Tensor) -> torch.Tensor:
    """A picture resized so as to cover the input, cropped about the middle, in [0, 1]."""
    image: Any = _import("PIL.Image", "pillow")
    channels, height, width = example.shape[1:]
    with image.open(file) as opened:
        picture = opened.convert("L" if channels == 1 else "RGB")
    scale = max(height / picture.height, width / picture.width)
    picture = picture.resize(
        (max(width, round(scale * picture.width)), max(height, round(scale * picture.height))), image.Resampling.BILINEAR
    )
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    pixels = np.array(picture.crop((left, top, left + width, top + height)), dtype=np.float32) / 255
    return torch.from_numpy(pixels.reshape(height, width, channels)).permute(2, 0, 1)


def _model(name: str, weights: str) -> nn.Module:
    """The model in evaluation mode."""
    source, _, rest = name.partition(":")
    if not rest:
        raise ValueError(f"model {name!r}: expected torchvision:NAME, timm:NAME or package.module:callable.")
    pretrained = weights == "DEFAULT"
    if source == "torchvision":
        model = _import("torchvision.models", "torchvision").get_model(rest, weights="DEFAULT" if pretrained else None)
    elif source == "timm":
        try:
            model = _import("timm", "timm").create_model(rest, pretrained=pretrained)
        except RuntimeError as error:  # timm's word for a name that it does not know
            raise ValueError(f"model {name!r}: {error}. See timm.list_models().") from error
    else:
        if pretrained:
            raise ValueError("--weights DEFAULT is for torchvision and timm; let your callable load its own, or give a file.")
        sys.path.insert(0, "")
        home = _import(source, source)
        if not callable(getattr(home, rest, None)):
            raise ValueError(f"model {name!r}: {source} has no callable {rest!r}.{nearest(rest, vars(home))}")
        model = getattr(home, rest)()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model {name!r}: expected an nn.Module, found {type(model).__name__}.")
    if weights not in ("none", "DEFAULT"):
        path = Path(weights)
        if not path.exists():
            raise FileNotFoundError(f"--weights {weights}: expected none, DEFAULT or a file; there is none of this name.")
        try:
            state: dict[str, Any] = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
            model.load_state_dict(state)
        except Exception as error:  # torch.load raises whatever a damaged file makes it stumble over
            raise ValueError(f"--weights {weights}: not a state_dict of {name}: {error}") from error
    return model.eval()


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{module} cannot be imported ({error}). Install {package}, or check the name.") from error
