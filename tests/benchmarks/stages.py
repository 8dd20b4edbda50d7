"""Compare one cut and one fine-tuning with other schedules of about as many steps.

python tests/benchmarks/stages.py --data ../shared/data

ResNet-20 at a quarter of its parameters, calibrated on 1,024 images, trained on 45,000 training images and judged on the other 5,000
(see finetune.py). Schedules: cut once; cut, tune, cut again, tune (`stages = 2` in a recipe); cut, fit each block's outputs to those of
the dense network, then tune. Results are in results/finetune_stages.json.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from calibrated import draw, recorder
from cifar import Batches, cifar10
from finetune import CASES, RESULTS, base_settings, cut, scores, training
from torch import Tensor, nn

from dsconv_surgery import FineTune, fine_tune
from dsconv_surgery.finetuning.batches import mix_images
from dsconv_surgery.finetuning.optimizers import OPTIMIZERS, learning_rate_factor

CASE = "resnet20-alds"


def blocks(model: nn.Module) -> list[nn.Module]:
    return [block for stage in ("layer1", "layer2", "layer3") for block in model.get_submodule(stage).children()]


def up_to(model: Any, number: int, x: Tensor) -> Tensor:
    """The output of a block."""
    return nn.Sequential(*blocks(model)[: number + 1])(F.relu(model.bn1(model.conv1(x))))


def block_by_block(dense: nn.Module, model: nn.Module, batches: Batches, steps: int, lr: float) -> None:
    """Minimise `|f - g|^2 / |f|^2` for a block's output f in the dense and g in the cut network, over the weights of that block only."""
    model.eval().requires_grad_(False)
    for number, block in enumerate(blocks(model)):
        block.requires_grad_()
        optimizer = OPTIMIZERS["soap"](list(block.parameters()), lr)
        training_batches = iter(batches)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * learning_rate_factor(step, steps, 0.05)
            (x, *_), _ = mix_images(next(training_batches), 1, 1.0)
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                with torch.no_grad():
                    target = up_to(dense, number, x).float()
                output = up_to(model, number, x).float()
            loss = (target - output).square().sum() / target.square().sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(block.parameters(), 1.0)
            optimizer.step()
        block.requires_grad_(False)
    model.requires_grad_()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/ and weights/")
    parser.add_argument(
        "--work", type=Path, default=Path.home() / ".cache" / "dsconv-surgery-benchmarks", help="folder of the cached cut networks"
    )
    parser.add_argument("--epochs", type=int, default=2, help="epochs of the first two ways, an even number")
    parser.add_argument("--only", nargs="*", help="only ways that contain one of these words")
    parser.add_argument("--settings", type=json.loads, default={}, help='other FineTune settings, as {"lr": 0.002}')
    parser.add_argument("--batch", type=int, default=128, help="images per step")
    parser.add_argument("--steps", type=int, default=150, help="steps for each block, at most an epoch")
    parser.add_argument("--json", type=Path, default=RESULTS / "finetune_stages.json")
    options = parser.parse_args()
    if options.epochs < 2 or options.epochs % 2 or "epochs" in options.settings:
        parser.error("--epochs: expected an even number, 2 or more, and none in --settings")
    options.work.mkdir(parents=True, exist_ok=True)
    x, y, validation, labels = training(options, held_out=True)
    dense, start, _ = cut(options, CASE, 0, held_out=True)
    settings = FineTune(**{"precision": "bfloat16", "channels_last": True, **options.settings})
    half = options.epochs // 2
    add = recorder(options.json, "stages.py")

    def once(model: nn.Module, epochs: int) -> nn.Module:
        fine_tune(model, Batches(x, y, options.batch), teacher=dense, settings=replace(settings, epochs=epochs))
        return model

    def twice() -> nn.Module:
        images = draw(cifar10(options.data / "cifar10", "train")[0], 1024, 0)
        recipe = replace(CASES[CASE][1], stages=2, fine_tune=replace(settings, epochs=half))
        return recipe.run(dense, images[:1], calibration=images.split(128), train=Batches(x, y, options.batch)).model

    def blocks_first(epochs: int) -> nn.Module:
        _, model, _ = cut(options, CASE, 0, held_out=True)
        block_by_block(dense, model, Batches(x, y, options.batch), options.steps, settings.lr)
        return once(model, epochs) if epochs else model

    ways = {
        "as cut": lambda: start,
        f"cut, {2 * half} epochs": lambda: once(cut(options, CASE, 0, held_out=True)[1], 2 * half),
        f"cut, {half} epoch{'s' * (half > 1)}, cut again, {half} epoch{'s' * (half > 1)}": twice,
        f"cut, {options.steps} steps for each block": lambda: blocks_first(0),
        f"cut, {options.steps} steps for each block, 1 epoch": lambda: blocks_first(1),
    }
    for way, run in ways.items():
        if options.only and not any(part in way for part in options.only):
            continue

        def row(run: Any = run) -> dict[str, Any]:
            torch.manual_seed(0)  # for the training of blocks; fine_tune has its own seed
            return scores(dense, run().eval().to(memory_format=torch.contiguous_format), validation, labels)

        add({"way": way, **base_settings(options)}, row)


if __name__ == "__main__":
    main()
