"""Fold the BatchNorms of 20 torchvision and timm networks, dense and cut, and compare outputs.

python tests/benchmarks/fold_batchnorm.py [NAMES]     rows of results/fold_batchnorm.json; without names, those that are missing

Weights are random. Statistics of BatchNorms are those of random images, then changed at random, so that outputs depend on the images and
no BatchNorm is close to an identity. An fx graph, which `fold_batchnorm` does not use, counts the BatchNorms that are left to fold.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import conftest  # noqa: E402, F401 - makes torchvision importable beside a CPU build of torch
from zoo import build_timm, build_torchvision  # noqa: E402

from dsconv_surgery import apply_plan, fold_batchnorm, make_plan  # noqa: E402

RESULT = Path(__file__).resolve().with_name("results") / "fold_batchnorm.json"
TORCHVISION = [
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "densenet121", "googlenet", "shufflenet_v2_x0_5",
    "regnet_y_400mf", "vgg11_bn",
]  # fmt: skip
TIMM = [
    "resnet14t", "seresnext26ts", "repvgg_a0", "ghostnet_050", "hrnet_w18_small", "cspdarknet53", "levit_384_s8", "tinynet_d", "dla34",
    "resnetv2_18",
]  # fmt: skip


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm | nn.Conv2d | nn.Linear) or super().is_leaf_module(m, module_qualified_name)


def foldable(model: nn.Module) -> int | None:
    """The number of BatchNorms directly after a convolution or linear layer without another user; None if fx cannot trace the network."""
    try:
        graph = _Tracer().trace(model)
    except Exception:
        return None
    modules = dict(model.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]

    def once(node: Any) -> bool:
        return isinstance(node, fx.Node) and sum(other.target == node.target for other in calls) == 1

    pairs = [(node.args[0], node) for node in calls if isinstance(modules[str(node.target)], _BatchNorm) and node.args]
    return sum(
        once(layer) and once(node) and layer in calls and isinstance(modules[layer.target], nn.Conv2d | nn.Linear) and len(layer.users) == 1
        for layer, node in pairs
    )


@torch.no_grad()
def randomise(model: nn.Module, x: Tensor) -> nn.Module:
    """The network in evaluation mode, with statistics of its activations, changed at random."""
    batchnorms = [module for module in model.eval().modules() if isinstance(module, _BatchNorm)]
    for module in batchnorms:
        module.train().momentum = 1.0
    model(x)
    for module in batchnorms:
        mean, var = module.get_buffer("running_mean"), module.get_buffer("running_var")
        mean += 0.3 * var.sqrt() * torch.randn_like(mean)
        var *= torch.empty_like(var).uniform_(0.5, 2.0)
        nn.init.uniform_(module.weight, 0.5, 1.5)
        nn.init.normal_(module.bias, 0.0, 0.2)
    return model.eval()


@torch.no_grad()
def measured(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Counts of BatchNorms and differences of outputs, relative to the largest output.

    In float32, the difference of the network itself from float64 is rounding; that of the folded network should be as large.
    """
    start = time.perf_counter()
    folded = fold_batchnorm(model, x)
    seconds = time.perf_counter() - start
    counts = [sum(isinstance(module, _BatchNorm) for module in network.modules()) for network in (model, folded)]
    exact = copy.deepcopy(model).double()
    expected, outputs = exact(x.double()), {"float32": model(x).double(), "folded": folded(x).double()}
    outputs["folded_float64"] = fold_batchnorm(exact, x.double())(x.double())

    def difference(a: Tensor, b: Tensor) -> float:
        return float(f"{float((a - b).abs().max() / expected.abs().max()):.2g}")

    return {
        "batchnorms": counts[0],
        "foldable": foldable(model),
        "after": counts[1],
        "left_to_fold": foldable(folded),
        "folded_minus_dense": difference(outputs["folded"], outputs["float32"]),
        "folded_minus_dense_float64": difference(outputs["folded_float64"], expected),
        "rounding_of_dense": difference(outputs["float32"], expected),
        "rounding_of_folded": difference(outputs["folded"], expected),
        "seconds": round(seconds, 2),
    }


def row(library: str, name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    build, (example, *_) = (build_torchvision if library == "torchvision" else build_timm)(name)
    # Smooth images: features of white noise hardly vary, and BatchNorms would amplify rounding errors.
    x = F.interpolate(torch.randn(4, 3, 4, 4), size=example.shape[2:], mode="bilinear") + 0.2 * torch.randn(4, *example.shape[1:])
    model = randomise(build(), x)
    plan = make_plan(model, x[:1], rule="fixed", rank=8, schemes=["channel", "bottleneck"], exclude=(), cache=False)
    cut = apply_plan(model, plan, x[:1])
    return {
        "network": f"{library}:{name}", "pixels": x.shape[-1], "cuts": len(plan.cuts), "dense": measured(model, x), "cut": measured(cut, x),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="networks; all if not given")
    names = parser.parse_args().names
    rows = json.loads(RESULT.read_text()) if RESULT.exists() else []
    for library, networks in (("torchvision", TORCHVISION), ("timm", TIMM)):
        for name in networks:
            if names and name not in names:
                continue
            if not names and any(other["network"] == f"{library}:{name}" for other in rows):
                continue
            result = row(library, name)
            rows = [*(other for other in rows if other["network"] != result["network"]), result]
            RESULT.write_text(json.dumps(rows, indent=1) + "\n")
            print(result, flush=True)


if __name__ == "__main__":
    main()
