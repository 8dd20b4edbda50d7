"""Measure fine-tuning after surgery.

python tests/benchmarks/finetune.py accuracy --data ../shared/data   ResNet-20 and -56 cut and tuned, whole test set, last weights
python tests/benchmarks/finetune.py ablation --data ../shared/data   one setting after the other, judged on held-out training images
python tests/benchmarks/finetune.py starts --data ../shared/data     calibrated factors against random and data-free ones, and scratch
python tests/benchmarks/finetune.py plot                             draw `starts` as results/finetune_starts.png
python tests/benchmarks/finetune.py recipes                          copy rows of `accuracy` beside each recipe
python tests/benchmarks/finetune.py cost                             time of a step against a plain training loop
python tests/benchmarks/finetune.py kills                            kill -9 at random moments, then resume

Cut networks are calibrated on 1,024 unlabelled training images and saved in --work. Each result is added to results/finetune_*.json when
it is ready. Results that are there already are not measured again. Settings are chosen on the last 5,000 training images, never on test
images: `ablation` and `starts` use `resnet20-45000.safetensors`, a ResNet-20 trained without them (examples/train_cifar.py --hold-out 5000
--epochs 40). The networks in --data have memorised their training images (99.8 %), and so have networks cut from them.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from calibrated import Add, divergence, draw, network, outputs, recorder
from cifar import Batches, CifarResNet, accuracy, cifar10, demo_images, demo_resnet20, load_resnet, to_input

from dsconv_surgery import Budget, FineTune, Recipe, apply_plan, compare, compress, fine_tune, load, save
from dsconv_surgery.checkpoint import read_plan

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
RESULTS = Path(__file__).resolve().with_name("results")
JUDGE = Path(__file__).with_name("resnet20-45000.safetensors")
RECIPE_OF = {
    "resnet20-alds": "resnet20-cifar10-params-25-tuned",
    "resnet20-half": "resnet20-cifar10-half-tuned",
    "resnet20-depthwise": "resnet20-cifar10-depthwise-tuned",
    "resnet56-2.5x": "resnet56-cifar10-macs-40-tuned",
    "resnet56-4.1x": "resnet56-cifar10-macs-24-tuned",
}
CASES = {case: (int(case[6:8]), Recipe.load(name)) for case, name in RECIPE_OF.items()}  # depth and recipe


def tuning(case: str, **changes: Any) -> FineTune:
    """The recipe's settings, with changes."""
    settings = CASES[case][1].fine_tune
    assert settings is not None
    return replace(settings, **changes)


def cut(options: argparse.Namespace, case: str, seed: int, held_out: bool) -> tuple[nn.Module, nn.Module, Any]:
    """The dense network, the cut network and its plan; cut networks are cached."""
    depth, recipe = CASES[case]
    if held_out and depth != 20:
        raise SystemExit(f"{case}: expected a case of ResNet-20, the only network trained without the held-out images")
    dense = load_resnet(JUDGE, depth) if held_out else network(options.data, depth)
    folder = options.work / "-".join([case, str(seed), *([JUDGE.stem] if held_out else [])])
    if not (folder / "plan.json").exists():
        images = draw(cifar10(options.data / "cifar10", "train")[0], 1024, seed)
        small = replace(recipe, fine_tune=None, seed=seed).run(dense, images[:1], calibration=images.split(128), progress=True)
        save(small, folder)
    return dense.to(options.device), load(dense, folder).to(options.device), read_plan(folder)


def training(options: argparse.Namespace, held_out: bool) -> tuple[Tensor, ...]:
    """Training images and labels, then images and labels for the score: 5,000 held-out training images, or the test images."""
    return tuple(values.to(options.device) for values in _training(options, held_out))


def _training(options: argparse.Namespace, held_out: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, labels = cifar10(options.data / "cifar10", "train")
    x, y = to_input(images), torch.from_numpy(labels)
    if held_out:
        return x[:45000], y[:45000], x[45000:], y[45000:]
    test, test_labels = cifar10(options.data / "cifar10", "test")
    return x, y, to_input(test), torch.from_numpy(test_labels)


def run_accuracy(options: argparse.Namespace, add: Add) -> None:
    data = training(options, held_out=False)
    for case in options.cases or CASES:
        for seed in options.seeds:

            def run(case: str = case, seed: int = seed) -> dict[str, Any]:
                x, y, test, labels = data
                recipe, settings = CASES[case][1], tuning(case, seed=seed, **options.settings)
                start = time.perf_counter()
                if options.stages > 1:
                    dense = network(options.data, CASES[case][0])
                    images = draw(cifar10(options.data / "cifar10", "train")[0], 1024, seed)
                    small = replace(recipe, seed=seed, stages=options.stages, fine_tune=settings).run(
                        dense, images[:1], calibration=images.split(128), train=Batches(x, y, options.batch), progress=True
                    )
                    model, report, histories, cut_accuracy = small.model, small.report, small.tuned, dict[str, Any]()
                else:
                    dense, model, plan = cut(options, case, seed, held_out=False)
                    report, cut_accuracy = compare(dense, model, x[:1], plan=plan), {"cut": accuracy(model, test, labels)}
                    checkpoint, batches, start = options.work / f"{case}-{seed}.pt", Batches(x, y, options.batch), time.perf_counter()
                    histories = (fine_tune(model, batches, teacher=dense, settings=settings, checkpoint=checkpoint, progress=True),)
                seconds = round(time.perf_counter() - start, 1)
                before, after = accuracy(dense, test, labels), accuracy(model, test, labels)
                return {
                    "params_saved": round(report.params_saved, 4),
                    "macs_saved": round(report.macs_saved, 4),
                    "dense": before,
                    **cut_accuracy,
                    "tuned": after,
                    "drop": round(before - after, 2),
                    "epochs": settings.epochs * options.stages,
                    "losses": [round(epoch.loss, 4) for history in histories for epoch in history.epochs],
                    "settings": histories[-1].settings,
                    "seconds": seconds,
                }

            changed = {**options.settings, **({"stages": options.stages} if options.stages > 1 else {}), **batches_of(options)}
            add({"case": case, "seed": seed, "changed": changed or None}, run)


# Each row changes one setting; scores are of 5,000 held-out training images.
SGD = partial(torch.optim.SGD, momentum=0.9, nesterov=True)
ABLATION: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no teacher (labels alone)": {"distill": 0.0, "teacher": False},
    "teacher alone": {"distill": 1.0},
    "half labels, half teacher": {"distill": 0.5},
    "a fifth labels": {"distill": 0.8},
    "temperature 1": {"temperature": 1.0},
    "temperature 4": {"temperature": 4.0},
    "images not mixed": {"mix": 0.0},
    "half of the batches mixed": {"mix": 0.5},
    "AdamW": {"optimizer": "adamw"},
    "AdamW, lr 1e-3": {"optimizer": "adamw", "lr": 1e-3},
    "lr 1e-4": {"lr": 1e-4},
    "lr 1e-3": {"lr": 1e-3},
    "lr 3e-3": {"lr": 3e-3},
    "SGD, momentum 0.9, lr 0.01": {"optimizer": SGD, "lr": 0.01},
    "SGD, momentum 0.9, lr 0.05": {"optimizer": SGD, "lr": 0.05},
    "unbalanced factors": {"unbalanced": True},
    "BatchNorm trained": {"batchnorm": "trained"},
    "no clipping": {"clip": None},
    "clip 0.3": {"clip": 0.3},
    "no warm-up": {"warmup": 0.0},
    "warm-up 20 %": {"warmup": 0.2},
    "AdamW, decay of factors 1e-2": {"optimizer": partial(torch.optim.AdamW, weight_decay=1e-2)},
    "float32": {"precision": "float32"},
    "bfloat16": {"precision": "bfloat16"},
    "stronger views": {"views": "strong"},
    "momentum of BatchNorms 0.01": {"momentum": 0.01},
    "average of the weights as second teacher": {"average": True},
}


class StrongBatches(Batches):
    """Batches whose images are also changed in contrast, saturation and brightness, and lose a square of 8 x 8 pixels."""

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for x, *labels in super().__iter__():
            contrast, saturation = (0.6 + 0.8 * torch.rand(len(x), 1, 1, 1, device=x.device) for _ in range(2))
            x = x.mean((1, 2, 3), keepdim=True) + contrast * (x - x.mean((1, 2, 3), keepdim=True))
            x = x.mean(1, keepdim=True) + saturation * (x - x.mean(1, keepdim=True))
            x = x + 0.6 * torch.rand(len(x), 1, 1, 1, device=x.device) - 0.3
            top, left = torch.randint(0, 25, (2, len(x), 1), device=x.device)
            pixels = torch.arange(32, device=x.device)
            rows, columns = ((pixels >= start) & (pixels < start + 8) for start in (top, left))
            yield (x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0), *labels)


class TwoTeachers(nn.Module):
    """The mean of the outputs of the dense network and of a moving average of the trained network."""

    def __init__(self, dense: nn.Module, model: nn.Module) -> None:
        super().__init__()
        decay = torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
        self.dense, self.average = dense, torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=decay, use_buffers=True)

    def forward(self, x: Tensor) -> Tensor:
        return (self.dense(x) + self.average(x)) / 2


def run_ablation(options: argparse.Namespace, add: Add) -> None:
    x, y, test, labels = training(options, held_out=True)
    for case in options.cases or ["resnet20-alds"]:
        for seed, (name, change) in product(options.seeds, ABLATION.items()):
            if options.only and not any(part in name for part in options.only):
                continue

            def run(case: str = case, change: dict[str, Any] = change, seed: int = seed) -> dict[str, Any]:
                dense, model, plan = cut(options, case, 0, held_out=True)
                change = {"seed": seed, **options.settings, **change}
                teacher = dense if change.pop("teacher", True) else None
                optimizer = change.pop("optimizer") if callable(change.get("optimizer")) else None
                if change.pop("unbalanced", False):
                    unbalance(model, plan)
                views = StrongBatches if change.pop("views", None) else Batches
                momentum = change.pop("momentum", None)
                for module in model.modules():
                    if momentum is not None and isinstance(module, nn.BatchNorm2d):
                        module.momentum = momentum
                average = TwoTeachers(dense, model) if change.pop("average", False) else None
                settings = FineTune(**{"epochs": 3, **change})
                before = accuracy(model, test, labels)
                batches, start = views(x, y, options.batch), time.perf_counter()
                history = fine_tune(
                    model,
                    batches,
                    teacher=average or teacher,
                    settings=settings,
                    optimizer=optimizer,
                    callback=average and (lambda *_: average.average.update_parameters(model)),
                    progress=True,
                )
                seconds = round(time.perf_counter() - start, 1)
                return {
                    "dense": accuracy(dense, test, labels),
                    "cut": before,
                    **scores(dense, model, test, labels),
                    "epochs": settings.epochs,
                    "train_loss": round(history.epochs[-1].loss, 4),
                    "seconds": seconds,
                }

            add({"case": case, "change": name, "seed": seed, **base_settings(options)}, run)


def base_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The part of a row's key with the settings that the row changes."""
    return {"base": {**options.settings, **batches_of(options)} or None}


def batches_of(options: argparse.Namespace) -> dict[str, int]:
    return {"batch": options.batch} if options.batch != 128 else {}


def scores(dense: nn.Module, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    targets, predictions = outputs(dense, images), outputs(model, images)
    return {
        "tuned": accuracy(model, images, labels),
        "held_out_loss": round(float(F.nll_loss(predictions, labels)), 4),
        "divergence": divergence(targets, predictions),
    }


def unbalance(model: nn.Module, plan: Any) -> None:
    """Multiply the first link of every chain by ten and divide the last one by ten; the kernels stay the same."""
    for cut in plan.cuts:
        links: list[Any] = list(model.get_submodule(cut.name).children())
        with torch.no_grad():
            links[0].weight.mul_(10)
            links[-1].weight.div_(10)


STARTS = ("calibrated factors", "data-free factors", "random factors", "dense network from scratch")


def run_starts(options: argparse.Namespace, add: Add) -> None:
    """The same network, loop and epochs from different weights; the settings depend on the error of these weights."""
    x, y, validation, validation_labels = training(options, held_out=True)
    _, _, test, labels = training(options, held_out=False)
    for start in STARTS:

        def run(start: str = start) -> dict[str, Any]:
            case = "resnet20-alds"
            dense, model, plan = cut(options, case, 0, held_out=True)
            settings = tuning(case, **options.settings)
            if start != "calibrated factors":  # a large error: the settings of the depthwise recipe are the best here
                recipe = tuning("resnet20-depthwise")
                changes = {name: getattr(recipe, name) for name in ("lr", "distill", "temperature", "mix", "batchnorm")}
                settings = tuning(case, **{**changes, **options.settings})
            if start == "data-free factors":
                model = apply_plan(dense, replace(plan, calibrated=False))
            elif start != "calibrated factors":
                torch.manual_seed(0)
                fresh = CifarResNet(20)
                model = fresh if start.startswith("dense") else apply_plan(fresh, replace(plan, calibrated=False), init="empty")
                for module in model.modules():
                    if isinstance(module, nn.Conv2d | nn.Linear):
                        module.reset_parameters()
            before = accuracy(model, validation, validation_labels)
            history = fine_tune(
                model,
                Batches(x, y),
                teacher=dense,
                settings=settings,
                validate=lambda m: accuracy(m, validation, validation_labels),
                progress=True,
            )
            by_epoch = [before, *(epoch.score for epoch in history.epochs)]
            return {"held_out_by_epoch": by_epoch, "test": accuracy(model, test, labels), "settings": history.settings}

        add({"start": start}, run)


def run_plot(_options: argparse.Namespace, _: Add) -> None:
    from matplotlib.figure import Figure

    rows = json.loads((RESULTS / "finetune_starts.json").read_text())["rows"]
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        axes.plot(row["held_out_by_epoch"], marker="o", label=row["start"])
    axes.set(xlabel="epochs", ylabel="accuracy on held-out training images, %", title="ResNet-20, parameters -75 %, MACs -71 %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(RESULTS / "finetune_starts.png", dpi=110)


def run_recipes(_options: argparse.Namespace, _: Add) -> None:
    results = json.loads((RESULTS / "finetune_accuracy.json").read_text())
    for case, name in RECIPE_OF.items():
        rows = [row for row in results["rows"] if row["case"] == case and not row.get("changed")]
        if rows:
            result = {"settings": results["settings"], "result": rows}
            (RECIPES / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def run_cost(_options: argparse.Namespace, add: Add) -> None:
    """Time per step, without a teacher: a plain loop with AdamW, fine_tune with AdamW and fine_tune with SOAP, one after the other."""

    def run() -> dict[str, Any]:
        images, labels = demo_images("train")
        small = compress(demo_resnet20(), images[:1], budget=Budget(params=0.4), rule="uniform", schemes="cp", exclude=("conv1", "linear"))
        batches = [(a, b) for a, b in zip(images.split(128)[:30], labels.split(128)[:30], strict=True)]

        def plain(model: nn.Module) -> None:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
            model.train()
            for inputs, target in batches:
                loss = F.cross_entropy(model(inputs), target)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()

        def adamw(model: nn.Module) -> None:
            fine_tune(model, batches, settings=FineTune(epochs=1, optimizer="adamw", batchnorm="trained"))

        def soap(model: nn.Module) -> None:
            fine_tune(model, batches, settings=FineTune(epochs=1, optimizer="soap", batchnorm="trained"))

        times: dict[Any, list[float]] = {plain: [], adamw: [], soap: []}
        for _ in range(7):
            for loop, samples in times.items():
                model = copy.deepcopy(small.model)
                start = time.perf_counter()
                loop(model)
                samples.append((time.perf_counter() - start) / len(batches))
        plain_ms, adamw_ms, soap_ms = (1e3 * median(samples) for samples in times.values())
        return {
            "plain_ms": round(plain_ms, 2),
            "fine_tune_ms": round(adamw_ms, 2),
            "ratio": round(adamw_ms / plain_ms, 3),
            "with_soap_ms": round(soap_ms, 2),
            "ratio_with_soap": round(soap_ms / plain_ms, 3),
        }

    add({"network": "ResNet-20, CP, parameters -60 %, batch 128", "threads": torch.get_num_threads()}, run)


KILLED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from cifar import Batches, demo_images, demo_resnet20
from dsconv_surgery import FineTune, fine_tune, load
from safetensors.torch import save_file
dense = demo_resnet20()
model = load(dense, sys.argv[2])
images, labels = demo_images("train")
settings = FineTune(epochs=2, save_every=3)
fine_tune(model, Batches(images[:1280], labels[:1280], 64), teacher=dense, settings=settings, checkpoint=sys.argv[3])
save_file(model.state_dict(), sys.argv[4])
"""


def run_kills(options: argparse.Namespace, add: Add) -> None:
    """Kill a run at a random moment and resume it, `--kills` times; compare the weights with an uninterrupted run."""

    def run() -> dict[str, Any]:
        examples = str(Path(__file__).resolve().parents[2] / "examples")
        draws, identical, killed = random.Random(0), 0, 0
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            images, _ = demo_images("train")
            small = compress(demo_resnet20(), images[:1], budget=Budget(params=0.3), rule="uniform", schemes="cp", exclude="conv1")
            save(small, folder / "cut")

            def command(number: int) -> list[str]:
                return [
                    sys.executable,
                    "-c",
                    KILLED,
                    examples,
                    str(folder / "cut"),
                    str(folder / f"{number}.pt"),
                    str(folder / f"{number}.end"),
                ]

            start = time.perf_counter()
            subprocess.run(command(-1), check=True)
            seconds = time.perf_counter() - start
            for number in range(options.kills):
                for attempt in range(2):
                    process = subprocess.Popen(command(number))
                    try:
                        process.wait(draws.uniform(0.3, 0.85) * seconds if attempt == 0 else None)
                    except subprocess.TimeoutExpired:
                        process.send_signal(signal.SIGKILL)
                        process.wait()
                        killed += 1
                identical += (folder / f"{number}.end").read_bytes() == (folder / "-1.end").read_bytes()
        return {"killed": killed, "runs": options.kills, "identical": identical}

    add({"what": "kill -9"}, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs = {
        "accuracy": run_accuracy,
        "ablation": run_ablation,
        "starts": run_starts,
        "plot": run_plot,
        "recipes": run_recipes,
        "cost": run_cost,
        "kills": run_kills,
    }
    parser.add_argument("what", choices=list(runs))
    parser.add_argument("--data", type=Path, help="folder with cifar10/ and weights/")
    parser.add_argument(
        "--work", type=Path, default=Path.home() / ".cache" / "dsconv-surgery-benchmarks", help="folder of the cached cut networks"
    )
    parser.add_argument("--cases", nargs="*", choices=list(CASES))
    parser.add_argument("--only", nargs="*", help="only rows of the ablation that contain one of these words")
    parser.add_argument("--settings", type=json.loads, default={}, help='other FineTune settings, as {"lr": 0.002}')
    parser.add_argument("--stages", type=int, default=1, help="for accuracy: number of cuts that reach the budget, each with all epochs")
    parser.add_argument("--batch", type=int, default=128, help="for accuracy and ablation: images per step")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--device", default="cpu", help="where networks are trained; cuts are made on the CPU")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    runs[options.what](options, recorder(options.json or RESULTS / f"finetune_{options.what}.json", f"finetune.py {options.what}"))


if __name__ == "__main__":
    main()
