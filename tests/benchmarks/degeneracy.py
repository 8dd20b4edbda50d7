"""At which degeneracy do the terms of CP lose accuracy in int8 and bfloat16?

python tests/benchmarks/degeneracy.py --data ../shared/data --json tests/benchmarks/results/degeneracy.json

ResNet-20 is cut to 40 % of its parameters by CP, from the weights alone and calibrated, with weaker and weaker penalties on terms that
cancel each other. Ranks are those of one plan for each. Accuracy is that on 5,000 training images which neither the cut nor the ranges of
activations have seen; test images are not used. Int8 is onnxruntime's, as in examples/quantize.py, with BatchNorms folded.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
from cifar import cifar10, load_resnet, to_input  # noqa: E402
from quantize import BUDGET, RANGES, SCHEME, accuracy, in_onnxruntime  # noqa: E402

from dsconv_surgery import apply_plan, compare, fold_batchnorm, make_plan  # noqa: E402
from dsconv_surgery.schemes import als, fitting  # noqa: E402

PENALTIES = {"weights alone": (3e-4, 3e-5, 3e-6, 3e-7, 3e-8, 0.0), "calibrated": (3e-4, 3e-5)}
HELD_OUT, CALIBRATION = 5000, 1024


def accuracies(model: nn.Module, images: Tensor, test: Tensor, labels: Tensor) -> dict[str, float]:
    single, int8 = in_onnxruntime(fold_batchnorm(model, images[:1]), images[:RANGES])
    half = copy.deepcopy(model).bfloat16()
    networks = {"float32": single, "int8": int8, "bfloat16": lambda batch: half(batch.bfloat16())}
    return {name: accuracy(network, test, labels) for name, network in networks.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with cifar10/ and weights/")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    dense = load_resnet(options.data / "weights" / "resnet20_cifar10.safetensors")
    pixels, numbers = cifar10(options.data / "cifar10", "train")
    images, test, labels = to_input(pixels[:CALIBRATION]), to_input(pixels[-HELD_OUT:]), torch.from_numpy(numbers[-HELD_OUT:])
    rows = [{"network": "dense", **accuracies(dense, images, test, labels)}]
    print(rows[0], flush=True)
    for name, penalties in PENALTIES.items():
        als.PENALTY = fitting.PENALTY = penalties[0]
        batches = images.split(64) if name == "calibrated" else None
        plan = make_plan(dense, images[:1], budget=BUDGET, schemes=SCHEME, calibration=batches, cache=False)
        for penalty in penalties:
            als.PENALTY = fitting.PENALTY = penalty
            cut = apply_plan(dense, plan, images[:1], calibration=batches)
            report = compare(dense, cut, images[:1], plan=plan)
            degeneracy = max(row.degeneracy for row in report.rows if row.degeneracy is not None)
            scores = accuracies(cut, images, test, labels)
            rows.append({"network": name, "penalty": penalty, "degeneracy": float(f"{degeneracy:.4g}"), **scores})
            print(rows[-1], flush=True)
            if options.json:
                options.json.write_text(json.dumps({"images": HELD_OUT, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
