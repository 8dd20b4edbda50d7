"""Measure plans under one budget for the whole network.

python tests/benchmarks/budget.py accuracy --data ../shared/data     ResNet-20 and -56, MACs and parameters, three draws of images
python tests/benchmarks/budget.py rivals --data ../shared/data       the same budgets by other rules, on the same tables
python tests/benchmarks/budget.py weightings --data ../shared/data   estimates of damage, on held-out training images
python tests/benchmarks/budget.py resnet18 --data ../shared/data     torchvision's resnet18 trained on CIFAR-10 at 64 px: MACs and latency
python tests/benchmarks/budget.py latency                            half the time at 224 px: a latency budget against a MACs budget
python tests/benchmarks/budget.py torchvision                        the recipes for torchvision's networks: cost and time
    ... --channels-last                                              `resnet18` and `torchvision` in this memory format, see `timed`
    ... --recover                                                    `accuracy` and `resnet18` with recovery on the same images
python tests/benchmarks/budget.py recipes                            copy rows of `accuracy` and `torchvision` beside each recipe

Nothing is trained. Calibration images are training images. Accuracies are on the whole test set (`weightings`: on held-out training
images). Each result is added to results/budget_*.json when it is ready. Results that are there already are not measured again.
README.md beside this file explains the numbers; picture.py draws those of `rivals`.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import conftest  # noqa: F401 - makes torchvision importable beside a CPU build of torch
from calibrated import Add, divergence, draw, network, outputs, recorder
from cifar import accuracy, cifar10, to_input

from dsconv_surgery import Budget, Calibration, Recipe, compress, fold_batchnorm
from dsconv_surgery.compression import cut_to_budget
from dsconv_surgery.planning.layer_latency import LayerTimer
from dsconv_surgery.planning.planner import Planner
from dsconv_surgery.planning.rules import equal_error, least_damage
from dsconv_surgery.planning.settings import PlanSettings
from dsconv_surgery.planning.tables import Choice, Table
from dsconv_surgery.support.cache import Cache
from dsconv_surgery.support.copies import channels_last_copy
from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.latency import Stopwatch, measure_latency
from dsconv_surgery.support.runtimes import find_runtime

RESULTS = Path(__file__).resolve().with_name("results")
GOALS = {20: {"macs": (0.5, 0.4, 0.3), "params": (0.4, 0.25)}, 56: {"macs": (0.5, 0.4, 0.3)}}
RIVAL_GOALS = {"macs": (0.5, 0.4, 0.3), "params": (0.5, 0.4, 0.25)}


def by_error(tables: Mapping[str, Table], allowed: Mapping[str, float]) -> Choice:
    """Least sum of relative errors: all layers weighted alike."""
    return least_damage(tables, allowed, lambda _table, errors: errors)


def by_half(tables: Mapping[str, Table], allowed: Mapping[str, float]) -> Choice:
    """Least sum of the geometric means of error and damage: sensitivity counts by half."""
    return least_damage(tables, allowed, lambda table, errors: [(d * e) ** 0.5 for d, e in zip(table.damage(errors), errors, strict=True)])


def by_one_weight(tables: Mapping[str, Table], allowed: Mapping[str, float]) -> Choice:
    """Each layer's error times one weight: its sensitivity at an error of 0.05."""
    return least_damage(tables, allowed, lambda table, errors: [20 * table.damage([0.05])[0] * error for error in errors])


RIVALS: dict[str, dict[str, Any]] = {
    "ours": {},
    "uniform fraction": {"rule": "uniform", "exclude": ("conv1", "linear")},
    "best single scheme": {"schemes": ("cp", "bottleneck")},
    "whitened channel SVD under a budget (BALF)": {"rule": by_error, "schemes": ("channel", "bottleneck")},
    "equal relative error (ALDS)": {"rule": equal_error},
}
WEIGHTINGS: dict[str, Any] = {
    "output sensitivity": "budget",
    "output sensitivity, halved": by_half,
    "one weight": by_one_weight,
    "none": by_error,
    "equal error": equal_error,
}


def compressed(model: nn.Module, x: Tensor, budget: Budget, batches: Any, **keywords: Any) -> tuple[nn.Module, dict[str, Any]]:
    start = time.perf_counter()
    small = compress(model, x[:1], budget=budget, calibration=batches, **keywords)
    return small.model, {
        "params_saved": round(small.report.params_saved, 4),
        "macs_saved": round(small.report.macs_saved, 4),
        "predicted_damage": round(sum(cut.damage or 0.0 for cut in small.plan.cuts), 5),
        "schemes": dict(Counter(cut.scheme for cut in small.plan.cuts)),
        "seconds": round(time.perf_counter() - start, 1),
    }


def run_accuracy(options: argparse.Namespace, add: Add, rivals: Sequence[str] = ("ours",)) -> None:
    train, (test, labels) = cifar10(options.data / "cifar10", "train")[0], cifar10(options.data / "cifar10", "test")
    x, y = to_input(test), torch.from_numpy(labels)
    recovered = {"recover": options.recover}
    for depth in options.depth:
        model = network(options.data, depth)
        target = outputs(model, x)
        for seed in options.seeds if len(rivals) == 1 else (0,):
            for measure, fractions in (GOALS[depth] if len(rivals) == 1 else RIVAL_GOALS).items():
                for fraction in fractions:
                    if options.goals and f"{measure}={fraction}" not in options.goals:
                        continue
                    for rival in rivals:
                        key = {"network": f"ResNet-{depth}", "measure": measure, "keep": fraction, "seed": seed, "rule": rival, **recovered}

                        def run(
                            seed: int = seed,
                            model: Any = model,
                            measure: str = measure,
                            fraction: float = fraction,
                            rival: str = rival,
                            target: Tensor = target,
                        ) -> dict[str, Any]:
                            batches = Calibration(draw(train, options.images, seed).split(128), seed=seed)
                            cut, measured = compressed(model, x, Budget(**{measure: fraction}), batches, **RIVALS[rival], **recovered)
                            output = outputs(cut, x)
                            before, now = (round(100 * float((logits.argmax(1) == y).float().mean()), 2) for logits in (target, output))
                            drop, divergence_ = round(before - now, 2), divergence(target, output)
                            return {
                                "images": options.images,
                                "dense": before,
                                "cut": now,
                                "drop": drop,
                                "divergence": divergence_,
                                **measured,
                            }

                        add(key, run)


def run_rivals(options: argparse.Namespace, add: Add) -> None:
    run_accuracy(options, add, options.rules or list(RIVALS))


def run_weightings(options: argparse.Namespace, add: Add) -> None:
    images, labels = cifar10(options.data / "cifar10", "train")
    x, y = to_input(images[45000:]), torch.from_numpy(labels[45000:])
    for depth in options.depth:
        model = network(options.data, depth)
        target = outputs(model, x)
        for measure, fraction in (("params", 0.25), ("macs", 0.3)):
            for weighting, rule in WEIGHTINGS.items():

                def run(
                    rule: Any = rule, model: Any = model, measure: str = measure, fraction: float = fraction, target: Tensor = target
                ) -> dict[str, Any]:
                    batches = draw(images, 512, 0).split(128)
                    cut, measured = compressed(model, x, Budget(**{measure: fraction}), batches, rule=rule)
                    return {"divergence": divergence(target, outputs(cut, x)), "held_out_accuracy": accuracy(cut, x, y), **measured}

                add({"network": f"ResNet-{depth}", "measure": measure, "keep": fraction, "weighting": weighting}, run)


def resnet18(data: Path) -> nn.Module:
    import torchvision

    model = torchvision.models.resnet18(num_classes=10)
    state = load_file(data / "weights" / "torchvision_resnet18_cifar10_64px.safetensors")
    model.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in state.items()})
    return model.eval()


def enlarged(x: Tensor) -> Tensor:
    return F.interpolate(x, size=64, mode="bilinear", align_corners=False)


def run_resnet18(options: argparse.Namespace, add: Add) -> None:
    train, (test, labels) = cifar10(options.data / "cifar10", "train")[0], cifar10(options.data / "cifar10", "test")
    y = torch.from_numpy(labels)

    def hits(model: nn.Module) -> float:
        with torch.inference_mode():
            classes = [model(enlarged(part)).argmax(1) for part in to_input(test).split(250)]
        return 100 * float((torch.cat(classes) == y).double().mean())

    recovered = {"recover": options.recover}
    for measure, fractions in (("macs", (0.5, 0.25, 0.15)), ("latency", (0.5, 0.35))):
        model = resnet18(options.data) if measure == "macs" else fold_batchnorm(resnet18(options.data), torch.zeros(1, 3, 64, 64))
        kind = form(options) if measure == "latency" else {}
        for fraction in fractions:
            if options.goals and f"{measure}={fraction}" not in options.goals:
                continue

            def run(model: Any = model, measure: str = measure, fraction: float = fraction, kind: Any = kind) -> dict[str, Any]:
                x = enlarged(draw(train, 512, 0))
                example = x[: 16 if measure == "latency" else 1]
                start = time.perf_counter()
                if kind and options.channels_last:
                    model, example, fraction = for_channels_last(model, example, fraction)
                try:
                    small = compress(model, example, budget=Budget(**{measure: fraction}), calibration=x.split(64), **recovered)
                except ValueError as error:
                    if "out of reach" not in str(error):
                        raise
                    return {"refused": str(error)}
                measured = {"seconds": round(time.perf_counter() - start, 1), "macs_saved": round(small.report.macs_saved, 4)}
                if small.plan.timing is not None:
                    measured |= timed(model, small.model, example, small.plan.timing)
                dense, now = hits(model), hits(small.model)
                schemes = dict(Counter(cut.scheme for cut in small.plan.cuts))
                return {"dense": round(dense, 2), "cut": round(now, 2), "drop": round(dense - now, 2), "schemes": schemes, **measured}

            add({"network": "resnet18, 64 px", "measure": measure, "keep": fraction, **kind, **recovered}, run)


def form(options: argparse.Namespace) -> dict[str, Any]:
    """The part of a row's key that names the memory format."""
    return {"memory_format": "channels_last" if options.channels_last else "contiguous"}


class InFormat(nn.Module):
    """A network in a memory format that converts its inputs first."""

    def __init__(self, model: nn.Module, memory_format: torch.memory_format) -> None:
        super().__init__()
        self.model, self.memory_format = copy.deepcopy(model).to(memory_format=memory_format), memory_format  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.contiguous(memory_format=self.memory_format))


def both_formats(model: nn.Module) -> list[nn.Module]:
    return [InFormat(model, memory_format) for memory_format in (torch.contiguous_format, torch.channels_last)]


def for_channels_last(model: nn.Module, example: Tensor, fraction: float) -> tuple[nn.Module, Tensor, float]:
    """Network and input in channels_last, and the fraction of its latency that equals a fraction of the latency in the faster format."""
    contiguous, last = measure_latency(both_formats(model), Inputs(example), rounds=31)
    model, inputs = channels_last_copy(model, Inputs(example))
    (example,) = inputs.args
    return model, example, fraction * min(contiguous, last) / last


def timed(dense: nn.Module, cut: nn.Module, example: Tensor, timing: Any) -> dict[str, Any]:
    """Latencies of both networks in one run, compared with the plan's prediction if there is one.

    For a network cut in channels_last, the dense network is timed in both formats and the faster one counts, because some networks are
    slower in channels_last.
    """
    if example.is_contiguous():
        before, after = measure_latency([dense, cut], Inputs(example), rounds=31)
        measured = {}
    else:
        contiguous, last, after = measure_latency(
            [*both_formats(dense), InFormat(cut, torch.channels_last)], Inputs(example.contiguous()), rounds=31
        )
        measured, before = {"dense_contiguous_ms": round(contiguous, 3), "dense_channels_last_ms": round(last, 3)}, min(contiguous, last)
    measured |= {"dense_ms": round(before, 3), "cut_ms": round(after, 3), "faster": round(before / after, 3)}
    if timing is None:
        return measured
    return measured | {
        "predicted_over_before": round(timing.after / timing.before, 4),
        "predicted_ms": round(timing.after, 3),
        "measured_over_predicted": round(after / timing.after, 3),
        "sum_of_layers_ms": round(timing.predicted, 3),
    }


def run_torchvision(options: argparse.Namespace, add: Add) -> None:
    """Each recipe for a torchvision network with random weights: cost and time, not accuracy."""
    import torchvision

    for name, path in Recipe.known().items():
        recipe = Recipe.load(path)
        network_name = recipe.model.removeprefix("torchvision:")
        if not recipe.model or (options.network and options.network != network_name):
            continue
        for batch in options.batches:

            def run(recipe: Recipe = recipe, network_name: str = network_name, batch: int = batch) -> dict[str, Any]:
                torch.manual_seed(0)
                model = fold_batchnorm(getattr(torchvision.models, network_name)(weights=None).eval(), torch.zeros(1, *recipe.input[1:]))
                example = torch.randn(batch, *recipe.input[1:])
                start = time.perf_counter()
                if options.channels_last:
                    fraction = getattr(recipe.budget, "latency", None)
                    model, example, scaled = for_channels_last(model, example, fraction or 1.0)
                    recipe = replace(recipe, budget=replace(recipe.budget, latency=scaled)) if fraction and recipe.budget else recipe
                try:
                    small = recipe.run(model, example)
                except ValueError as error:
                    if "out of reach" not in str(error):
                        raise
                    return {"refused": str(error)}
                seconds = round(time.perf_counter() - start, 1)
                measured = timed(model, small.model, example, small.plan.timing)
                slower = [cut.name for cut in small.plan.cuts if small.plan.timing and not faster(model, example, cut)]
                return {
                    **measured,
                    "chosen_though_slower": slower,
                    "seconds": seconds,
                    "params_saved": round(small.report.params_saved, 4),
                    "macs_saved": round(small.report.macs_saved, 4),
                    "predicted_damage": round(sum(cut.damage or 0.0 for cut in small.plan.cuts), 4),
                    "schemes": dict(Counter(cut.scheme for cut in small.plan.cuts)),
                }

            add({"recipe": name, "batch": batch, "threads": torch.get_num_threads(), **form(options)}, run)


def faster(model: nn.Module, example: Tensor, cut: Any) -> bool:
    """Whether a cut's chain is faster than its layer in a new measurement."""
    dense, chain = LayerTimer(model, Inputs(example), Cache(False), Stopwatch(), find_runtime("eager")).time(
        [{"dense": cut.spec}, cut.chain], cut.sizes
    )
    return chain < dense


def run_latency(options: argparse.Namespace, add: Add) -> None:
    """A latency budget against a MACs budget of the same predicted damage, from the weights alone."""
    import torchvision

    name = options.network or "resnet18"
    for batch in options.batches:

        def run(batch: int = batch) -> dict[str, Any]:
            torch.manual_seed(0)
            model = fold_batchnorm(getattr(torchvision.models, name)(weights=None).eval(), torch.zeros(1, 3, 224, 224))
            example = torch.randn(batch, 3, 224, 224)
            by_latency = compress(model, example, budget=Budget(latency=0.5))
            damage = sum(cut.damage or 0.0 for cut in by_latency.plan.cuts)
            planner = Planner(model, Inputs(example), PlanSettings(budget=Budget(macs=0.5)), None)
            low, high = planner.smallest_fraction("macs") + 1e-3, 1.0
            for _ in range(10):
                middle = (low + high) / 2
                plan, _ = planner.plan(Budget(macs=middle))
                over = sum(cut.damage or 0.0 for cut in plan.cuts) > damage
                low, high = (middle, high) if over else (low, middle)
            by_macs, by_macs_plan = cut_to_budget(planner, Budget(macs=high))
            dense, latency, macs = measure_latency([model, by_latency.model, by_macs], Inputs(example), rounds=31)
            return {
                "predicted_damage": round(damage, 4),
                "dense_ms": round(dense, 3),
                "by_clock_ms": round(latency, 3),
                "by_macs_ms": round(macs, 3),
                "by_clock_macs_saved": round(by_latency.report.macs_saved, 4),
                "by_macs_macs_saved": round(1 - by_macs_plan.total_after.macs / by_macs_plan.total.macs, 4),
                "by_macs_over_by_clock": round(macs / latency, 3),
            }

        add({"network": name, "batch": batch, "threads": torch.get_num_threads()}, run)


def run_recipes(_options: argparse.Namespace, _: Add) -> None:
    rows: dict[str, list[dict[str, Any]]] = {}
    settings: dict[str, Any] = {}
    for source in ("accuracy", "torchvision"):
        path = RESULTS / f"budget_{source}.json"
        measured = json.loads(path.read_text()) if path.exists() else {"rows": [], "settings": {}}
        for row in measured["rows"]:
            if row.get("recover"):
                continue
            network_name = row.get("network", "").lower().replace("-", "")
            name = row.get("recipe") or f"{network_name}-cifar10-{row['measure']}-{round(100 * row['keep'])}"
            rows.setdefault(name, []).append({key: value for key, value in row.items() if key not in ("recipe", "rule")})
            settings[name] = measured["settings"]
    for name, path in Recipe.known().items():
        if name in rows:
            path.with_suffix(".json").write_text(json.dumps({"settings": settings[name], "result": rows[name]}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs = {
        "accuracy": run_accuracy,
        "rivals": run_rivals,
        "weightings": run_weightings,
        "resnet18": run_resnet18,
        "latency": run_latency,
        "torchvision": run_torchvision,
        "recipes": run_recipes,
    }
    parser.add_argument("what", choices=list(runs))
    parser.add_argument("--data", type=Path, help="folder with cifar10/ and weights/")
    parser.add_argument("--depth", type=int, nargs="*", choices=(20, 56), default=[20, 56])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--goals", nargs="*", help="only these budgets, such as macs=0.5")
    parser.add_argument("--rules", nargs="*", choices=list(RIVALS), help="for rivals: only these")
    parser.add_argument("--recover", action="store_true", help="for accuracy and resnet18: rows after recovery on the calibration images")
    parser.add_argument("--network")
    parser.add_argument("--batches", type=int, nargs="*", default=[1])
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    path = options.json or RESULTS / f"budget_{options.what}.json"
    add = recorder(path, f"budget.py {options.what}")
    runs[options.what](options, add)


if __name__ == "__main__":
    main()
