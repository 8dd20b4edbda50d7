"""Networks compressed without real images: weights alone, synthetic images, photographs of another kind, and real images beside them.

python tests/benchmarks/synthetic.py NETWORK ... --data FOLDER [--only ROW ...] [--json FILE]

The generator was built by BatchNorm statistics and held-out training images. Accuracies are on the whole CIFAR-10 test set, for
SqueezeNet on the 750 test images; divergence and agreement are against the dense network on the same images.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from networks import Case, imagenet, load_case
from torch import Tensor

from dsconv_surgery import Budget, Calibration, Inputs, batchnorm_distance, compress
from dsconv_surgery.calibration.images import drawn

HERE = Path(__file__).resolve().parent
UNIFORM = {"budget": Budget(params=0.27), "schemes": ["cp"], "rule": "uniform", "exclude": "conv1"}
ROWS: dict[str, dict[str, Any]] = {
    "resnet20": UNIFORM,
    "resnet56": UNIFORM,
    "resnet18-64px": {"budget": Budget(macs=0.15)},
    "squeezenet": {"budget": Budget(macs=0.7)},
}
NORMALISATION = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
REAL = 250  # real images of each kind


def other_photographs(name: str, folder: Path) -> Tensor:
    """Photographs of another data set, at the network's size."""
    from cifar import cifar10, to_input

    if name == "squeezenet":
        small = to_input(cifar10(folder / "cifar10", "train")[0][:REAL])
        return F.interpolate(small, size=(224, 224), mode="bilinear", align_corners=False)
    large, size = imagenet(folder, "calibration", REAL), 64 if name == "resnet18-64px" else 32
    return F.interpolate(large, size=(size, size), mode="bilinear", align_corners=False, antialias=True)


def test_set(name: str, case: Case, folder: Path) -> tuple[Tensor, Tensor]:
    """All test images and their labels."""
    from cifar import cifar10, to_input

    if name == "squeezenet":
        folders = sorted(path.name for part in ("calibration", "test") for path in (folder / "imagenet" / part).iterdir())
        files = sorted((folder / "imagenet" / "test").glob("*/*.jpg"))
        return case.other_images(len(files)), torch.tensor([folders.index(file.parent.name) for file in files])
    pixels, labels = cifar10(folder / "cifar10", "test")
    size = case.example.shape[-1]
    x = to_input(pixels)
    return x if size == 32 else F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False), torch.from_numpy(labels)


@torch.inference_mode()
def outputs(model: Any, images: Tensor) -> Tensor:
    return torch.cat([model.eval()(x) for x in images.split(50)]).log_softmax(1)


def measure(name: str, folder: Path, seeds: int, only: list[str]) -> Iterator[dict[str, Any]]:
    case = load_case(name, folder)
    images, labels = test_set(name, case, folder)
    target = outputs(case.model, images)
    dense = round(100 * float((target.argmax(1) == labels).double().mean()), 2)
    stated = NORMALISATION if name == "squeezenet" else {}  # it has no BatchNorm
    sources: dict[str, Any] = {"no images": None}
    sources |= {f"synthetic, seed {seed}": Calibration.synthetic(seed=seed, **stated) for seed in range(seeds)}
    sources["other photographs"] = other_photographs(name, folder).split(32)
    sources["real images"] = case.images[:REAL].split(32)
    for source, calibration in sources.items():
        if only and source.split(",")[0] not in only:
            continue
        start = time.perf_counter()
        if isinstance(calibration, Calibration):
            calibration = drawn(case.model, calibration, Inputs(case.example))
        with tempfile.TemporaryDirectory() as cache:
            small = compress(case.model, case.example, calibration=calibration, cache=cache, **ROWS[name])
        seconds, result = time.perf_counter() - start, outputs(small.model, images)
        distance = None if calibration is None else batchnorm_distance(case.model, case.example, data=calibration)
        yield {
            "network": name,
            "images": source,
            "budget": str(ROWS[name]["budget"]),
            "rule": small.plan.rule,
            "dense": dense,
            "cut": round(100 * float((result.argmax(1) == labels).double().mean()), 2),
            "divergence": round(float((target.exp() * (target - result)).sum(1).mean()), 4),
            "agreement": round(100 * float((target.argmax(1) == result.argmax(1)).double().mean()), 2),
            "batchnorm_distance": distance and round(distance, 4),
            "seconds": round(seconds, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", choices=list(ROWS), metavar="NETWORK")
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/, imagenet/ and weights/")
    parser.add_argument("--seeds", type=int, default=1, help="draws of synthetic images")
    parser.add_argument(
        "--only", nargs="*", default=[], help='rows to measure, of "no images", synthetic, "other photographs", "real images"'
    )
    parser.add_argument("--json", type=Path, default=HERE / "results" / "synthetic.json")
    arguments = parser.parse_args()
    for name in arguments.networks:
        for row in measure(name, arguments.data, arguments.seeds, arguments.only):
            print(json.dumps(row), flush=True)
            earlier = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
            others = [other for other in earlier if (other["network"], other["images"]) != (name, row["images"])]
            arguments.json.write_text(json.dumps([*others, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
