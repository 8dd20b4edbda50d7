"""Measure calibrated factorisation, without training, on CIFAR and torchvision networks.

python tests/benchmarks/calibrated.py accuracy --data ../shared/data     ResNet-20 and -56, three draws of 1,024 images, whole test set
python tests/benchmarks/calibrated.py ablation --data ../shared/data     the parts of calibration, added one after the other
python tests/benchmarks/calibrated.py images --data ../shared/data       16 to 2,048 images
python tests/benchmarks/calibrated.py layers --data ../shared/data       every scheme and layer, on other images than those of calibration
python tests/benchmarks/calibrated.py cost --network resnet18            time and peak memory at 224 px (or vgg16, resnet20)

Calibration images are training images. Every convolution but the first is cut, each to the same fraction of its cost. Each result is
added to results/calibrated_*.json when it is ready. Results that are there already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import conftest  # noqa: F401 - makes torchvision importable beside a CPU build of torch
from cifar import accuracy, cifar10, load_resnet, to_input

from dsconv_surgery import Budget, Calibration, Plan, apply_plan, compress, make_plan, surgery
from dsconv_surgery.calibration import reconstruct
from dsconv_surgery.calibration.images import Images
from dsconv_surgery.calibration.moments import Moments, positions_of
from dsconv_surgery.calibration.reconstruct import _LayerFit
from dsconv_surgery.calibration.side_by_side import SideBySide
from dsconv_surgery.network.geometry import ConvSpec, chain_cost
from dsconv_surgery.schemes import chain_of, factorize, fit, get_scheme, kernel_of, kernel_tensor, refusal, scheme_names
from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.progress import Progress

HERE = Path(__file__).parent
Add = Callable[[dict[str, Any], Callable[[], dict[str, Any]]], None]
SHAPES = Inputs(torch.empty(1, 3, 32, 32))
CASES: list[tuple[int, str, dict[str, Any]]] = [
    *((20, "cp", {"budget": Budget(params=fraction), "rule": "uniform"}) for fraction in (0.4, 0.27, 0.14)),
    *((20, "depthwise", {"rule": "fixed", "rank": m}) for m in (3, 2, 1)),
    *((56, "cp", {"budget": Budget(params=fraction), "rule": "uniform"}) for fraction in (0.4, 0.27, 0.14)),
]
PLAIN_FIT = _LayerFit._fit
WITHOUT = {  # the parts of calibration in the order of the ablation, each with a patch that leaves it out
    "+ sweeps": patch.object(_LayerFit, "_fit", lambda fit, objective, ridge, start, _: PLAIN_FIT(fit, objective, ridge, start, 0)),
    "+ sequential": patch.object(SideBySide, "install", lambda *_: None),  # both networks stay dense
    "+ bias": patch.object(_LayerFit, "centred", False),
    "+ ridge by held-out images": patch.object(_LayerFit, "_choose_ridge", lambda _fit, start, _held: (0.1, start)),
    "+ shortcut": patch.object(_LayerFit, "_target", lambda _, call: call.target),
    "+ ReLU": patch.object(_LayerFit, "_fit_behind_relu", lambda _fit, _pair, _ridge, factors: factors),
    "+ output metric": patch.object(reconstruct, "output_metrics", lambda *_: {}),
}
ABLATION = ("data-free", "last factor refitted", *WITHOUT)


def ablated_cut(model: nn.Module, plan: Plan, images: Images, step: str) -> nn.Module:
    """A cut network with the parts of calibration up to a step of the ablation."""
    if step == "data-free":
        return apply_plan(model, plan)
    with ExitStack() as patches:
        for part in WITHOUT:
            if ABLATION.index(part) > ABLATION.index(step):
                patches.enter_context(WITHOUT[part])
        return surgery.cut_calibrated(model, plan, images, {}, Progress(False), None)[0]


def network(data: Path, depth: int) -> nn.Module:
    return load_resnet(data / "weights" / f"resnet{depth}_cifar10.safetensors", depth)


@torch.inference_mode()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """Logarithms of the probabilities that a network gives."""
    return torch.cat([model(part) for part in x.split(500)]).log_softmax(1)


def divergence(target: Tensor, output: Tensor) -> float:
    """The mean Kullback-Leibler divergence of log-probabilities, in nats: it differs where accuracies differ by noise only."""
    return round(float((target.exp() * (target - output)).sum(1).mean()), 4)


def draw(images: np.ndarray, count: int, seed: int) -> Tensor:
    """Some of the first 45,000 training images; design choices were made on the last 5,000."""
    return to_input(images[np.random.default_rng(seed).permutation(45000)[:count]])


def recorder(path: Path, command: str) -> Add:
    """A function that measures what a key describes and adds the result to a file, unless the file has it already."""
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []

    def add(key: dict[str, Any], run: Callable[[], dict[str, Any]]) -> None:
        if any(all(row.get(k) == v for k, v in key.items()) for row in rows):
            return
        rows.append({**key, **run()})
        print(rows[-1], flush=True)
        settings = {"torch": torch.__version__, "threads": torch.get_num_threads(), "command": command}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")

    return add


def describe(settings: dict[str, Any]) -> str:
    return f"params {settings['budget'].params}" if "budget" in settings else f"m={settings['rank']}"


def run_accuracy(options: argparse.Namespace, add: Callable[..., None]) -> None:
    train, (test, labels) = cifar10(options.data / "cifar10", "train")[0], cifar10(options.data / "cifar10", "test")
    x, y = to_input(test), torch.from_numpy(labels)
    for depth, scheme, settings in CASES:
        if options.depth and depth != options.depth:
            continue
        model = network(options.data, depth)
        for seed in options.seeds:
            key = {"network": f"ResNet-{depth}", "scheme": scheme, "setting": describe(settings), "images": 1024, "seed": seed}

            def run(
                seed: int = seed, settings: dict[str, Any] = settings, model: nn.Module = model, scheme: str = scheme
            ) -> dict[str, Any]:
                batches = draw(train, 1024, seed).split(128)
                start = time.perf_counter()
                exclude = ("conv1", "linear")
                small = compress(model, x[:1], schemes=scheme, exclude=exclude, calibration=Calibration(batches, seed=seed), **settings)
                seconds = time.perf_counter() - start
                dense, cut = accuracy(model, x, y), accuracy(small.model, x, y)
                return {
                    "params_saved": round(small.report.params_saved, 4),
                    "macs_saved": round(small.report.macs_saved, 4),
                    "dense": dense,
                    "cut": cut,
                    "drop": round(dense - cut, 2),
                    "worst_degeneracy": max((row.degeneracy or 0.0) for row in small.report.rows),
                    "seconds": round(seconds, 1),
                }

            add(key, run)


def run_ablation(options: argparse.Namespace, add: Callable[..., None]) -> None:
    train, (test, labels) = cifar10(options.data / "cifar10", "train")[0], cifar10(options.data / "cifar10", "test")
    x, y = to_input(test), torch.from_numpy(labels)
    for depth in (options.depth,) if options.depth else (20, 56):
        model = network(options.data, depth)
        count = 512 if depth == 20 else 256
        batches = draw(train, count, 0).split(128)
        target = outputs(model, x)
        for scheme, settings in (("cp", {"budget": Budget(params=0.27), "rule": "uniform"}), ("depthwise", {"rule": "fixed", "rank": 2})):
            if scheme not in options.schemes:
                continue
            plan = make_plan(model, x[:1], schemes=scheme, exclude=("conv1", "linear"), **settings)
            for step in ABLATION:
                key = {"network": f"ResNet-{depth}", "scheme": scheme, "setting": describe(settings), "images": count, "step": step}
                images = Images(batches, SHAPES)

                def run(
                    step: str = step, plan: Any = plan, model: Any = model, images: Any = images, target: Any = target
                ) -> dict[str, Any]:
                    output = outputs(ablated_cut(model, plan, images, step), x)
                    correct = [100 * float((side.argmax(1) == y).double().mean()) for side in (target, output)]
                    return {"dense": round(correct[0], 2), "cut": round(correct[1], 2), "divergence": divergence(target, output)}

                add(key, run)


def run_images(options: argparse.Namespace, add: Callable[..., None]) -> None:
    train, (test, labels) = cifar10(options.data / "cifar10", "train")[0], cifar10(options.data / "cifar10", "test")
    x, y = to_input(test), torch.from_numpy(labels)
    model = network(options.data, 20)
    for scheme, settings in (("cp", {"budget": Budget(params=0.27), "rule": "uniform"}), ("depthwise", {"rule": "fixed", "rank": 2})):
        plan = make_plan(model, x[:1], schemes=scheme, exclude=("conv1", "linear"), **settings)
        key = {"network": "ResNet-20", "scheme": scheme, "setting": describe(settings)}
        add(
            {**key, "images": 0, "seed": 0},
            lambda plan=plan: {"dense": accuracy(model, x, y), "cut": accuracy(apply_plan(model, plan), x, y)},
        )
        for count in (16, 32, 64, 128, 256, 512, 1024, 2048):
            for seed in options.seeds:

                def run(count: int = count, seed: int = seed, plan: Any = plan) -> dict[str, Any]:
                    start = time.perf_counter()
                    batches = draw(train, count, seed).split(128)
                    cut = apply_plan(model, plan, calibration=Calibration(batches, seed=seed) if count else None)
                    seconds = round(time.perf_counter() - start, 1)
                    return {"dense": accuracy(model, x, y), "cut": accuracy(cut, x, y), "seconds": seconds}

                add({**key, "images": count, "seed": seed}, run)


def run_layers(options: argparse.Namespace, add: Callable[..., None]) -> None:
    """The output error of each layer alone, on the dense network's inputs, for 1,024 images that the factors were not fitted to."""
    train = cifar10(options.data / "cifar10", "train")[0]
    model = network(options.data, 20)
    fitted, fresh = draw(train, 1024, 0), to_input(train[45000:46024])
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d) and name != "conv1"}
    inputs: dict[str, Tensor] = {}
    moments: list[dict[str, Moments]] = [{}, {}]
    for side, images in zip(moments, (fitted, fresh), strict=True):
        hooks = [
            layer.register_forward_pre_hook(lambda _module, args, name=name: inputs.__setitem__(name, args[0]))
            for name, layer in layers.items()
        ]
        with torch.no_grad():
            for first in range(0, len(images), 128):
                model(images[first : first + 128])
                for name, layer in layers.items():
                    spec = ConvSpec.of(layer)
                    if name not in side:
                        positions = positions_of(spec, [(len(images), *inputs[name].shape[-2:])])
                        side[name] = Moments(spec, kernel_tensor(spec, layer.weight), positions, 2**17, 0, hold=False)
                    side[name].add(inputs[name], None, first)
        for hook in hooks:
            hook.remove()
    for scheme_name in scheme_names():
        scheme = get_scheme(scheme_name)
        for name, layer in layers.items():
            spec = ConvSpec.of(layer)
            if refusal(scheme, spec):
                continue

            def run(name: str = name, layer: Any = layer, spec: ConvSpec = spec, scheme: Any = scheme) -> dict[str, Any]:
                offered = list(scheme.ranks(spec))
                size = ((1, 8, 8),)
                affordable = [r for r in offered if chain_cost(chain_of(scheme, spec, r), size).params <= 0.4 * spec.params]
                rank = affordable[-1] if isinstance(offered[0], int) else (round(spec.in_channels * 0.5), round(spec.out_channels * 0.5))
                fit_objective = moments[0][name].objective("all", exact=True)
                fresh_objective = moments[1][name].objective("all", exact=True)
                free = next(factorize(scheme, spec, layer.weight, [rank]))
                start = time.perf_counter()
                aware = fit(scheme, spec, layer.weight, rank, fit_objective.ridged(0.01 * fit_objective.scale), start=free)
                errors = [fresh_objective.value(kernel_of(scheme, spec, f)[None]) for f in (free, aware)]
                seconds = round(time.perf_counter() - start, 2)
                return {"rank": rank, "data_free": errors[0], "calibrated": errors[1], "ratio": errors[1] / errors[0], "seconds": seconds}

            add({"scheme": scheme_name, "layer": name}, run)


def run_cost(options: argparse.Namespace, add: Callable[..., None]) -> None:
    if options.network == "resnet20":
        model: nn.Module = load_resnet(HERE.parents[1] / "examples" / "assets" / "resnet20_cifar10.safetensors")
        batches, count = [torch.randn(128, 3, 32, 32) for _ in range(8)], 1024
    else:
        import torchvision

        torch.manual_seed(0)
        model = getattr(torchvision.models, options.network)(weights=None).eval()
        batches, count = [torch.randn(32, 3, 224, 224) for _ in range(4)], 128

    def run() -> dict[str, Any]:
        start = time.perf_counter()
        small = compress(
            model,
            batches[0][:1],
            budget=Budget(macs=0.5),
            rule="uniform",
            schemes=options.schemes,
            exclude=options.exclude,
            calibration=batches,
            progress=True,
        )
        return {
            "seconds": round(time.perf_counter() - start, 1),
            "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            "macs_saved": round(small.report.macs_saved, 4),
            "worst_degeneracy": max((row.degeneracy or 0.0) for row in small.report.rows),
        }

    add({"network": options.network, "images": count, "schemes": options.schemes, "threads": torch.get_num_threads()}, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs = {"accuracy": run_accuracy, "ablation": run_ablation, "images": run_images, "layers": run_layers, "cost": run_cost}
    parser.add_argument("what", choices=list(runs))
    parser.add_argument("--data", type=Path, help="folder with cifar10/ and weights/")
    parser.add_argument("--depth", type=int, choices=(20, 56))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--schemes", nargs="*", default=["cp", "bottleneck"])
    parser.add_argument("--exclude", nargs="*", default=["conv1", "fc"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    path = options.json or HERE / "results" / f"calibrated_{options.what}.json"
    add = recorder(path, f"calibrated.py {options.what}")
    runs[options.what](options, add)


if __name__ == "__main__":
    main()
