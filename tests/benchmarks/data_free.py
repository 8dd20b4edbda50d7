"""Measure the accuracy of CIFAR ResNets cut without data and without training, dense and cut in one run.

python tests/benchmarks/data_free.py --data ../shared/data --split test --schemes cp depthwise
    --json tests/benchmarks/results/data_free.json
python tests/benchmarks/data_free.py --data ../shared/data --split train --images 2500 --common 0 0.05 0.1 0.2

Every convolution but the first keeps the same fraction of its parameters. The second command chose COMMON on training images: CP
assumes that all input channels have this share of the second moment in common.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from cifar import ASSETS, accuracy, cifar10, load_resnet, to_input

from dsconv_surgery import Budget, compress
from dsconv_surgery.schemes import als


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/ and weights/")
    parser.add_argument("--split", choices=("train", "test"), required=True)
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--keep", type=float, nargs="*", default=[0.4], help="fractions of the parameters")
    parser.add_argument("--schemes", nargs="*", default=["cp"])
    parser.add_argument("--common", type=float, nargs="*", default=[als.COMMON])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    images, labels = cifar10(options.data / "cifar10", options.split)
    x, y = to_input(images[: options.images]), torch.from_numpy(labels[: options.images])
    networks = {
        "ResNet-20": load_resnet(options.data / "weights" / "resnet20_cifar10.safetensors"),
        "ResNet-56": load_resnet(options.data / "weights" / "resnet56_cifar10.safetensors", depth=56),
        "ResNet-20, shipped": load_resnet(ASSETS / "resnet20_cifar10.safetensors"),
    }
    rows: list[dict[str, object]] = []
    for network, model in networks.items():
        dense = accuracy(model, x, y)
        print(f"{network}: dense {dense:.2f} %", flush=True)
        for scheme in options.schemes:
            for keep in options.keep:
                for common in options.common if scheme.startswith("cp") else [0.0]:
                    als.COMMON = common
                    start = time.perf_counter()
                    small = compress(model, x[:1], budget=Budget(params=keep), schemes=scheme, rule="uniform", exclude="conv1")
                    row = {
                        "network": network,
                        "scheme": scheme,
                        "common": common,
                        "params_saved": round(small.report.params_saved, 4),
                        "macs_saved": round(small.report.macs_saved, 4),
                        "dense": dense,
                        "cut": accuracy(small.model, x, y),
                        "seconds": round(time.perf_counter() - start, 1),
                    }
                    rows.append(row)
                    print(row, flush=True)
    if options.json:
        settings = {"split": options.split, "images": len(x), "torch": torch.__version__, "threads": torch.get_num_threads()}
        options.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
