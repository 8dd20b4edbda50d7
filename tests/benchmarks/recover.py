"""Recovery on the calibration images: outputs on other images, and accuracy, with and without `compress(recover=True)`.

python tests/benchmarks/recover.py NETWORK MEASURE=FRACTION --data FOLDER [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from networks import NETWORKS, load_case

from dsconv_surgery import Budget, compare, compress

HERE = Path(__file__).resolve().parent
OTHERS = 2000  # images to judge by


def measure(name: str, folder: Path, budget: Budget) -> Iterator[dict[str, Any]]:
    case = load_case(name, folder)
    others = case.other_images(OTHERS).split(50)
    for recover in (False, True):
        small = compress(case.model, case.example, budget=budget, calibration=case.batches, recover=recover)
        fidelity = compare(case.model, small.model, case.example, data=others).fidelity
        assert fidelity is not None
        assert fidelity.divergence is not None
        assert fidelity.agreement is not None
        recovery = small.report.recovery
        epochs = [epoch for history in small.tuned for epoch in history.epochs]
        yield {
            "network": name,
            "budget": str(budget),
            "recover": recover,
            "images": len(case.images),
            "others": fidelity.images,
            "divergence": round(fidelity.divergence, 4),
            "agreement": round(100 * fidelity.agreement, 2),
            "held_out": recovery and [round(recovery.before, 4), round(recovery.after, 4)],
            "epoch": recovery and recovery.epoch,
            "held_out_by_epoch": [round(-(epoch.score or 0), 4) for epoch in epochs],
            "training_seconds": epochs[-1].seconds if epochs else None,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=list(NETWORKS))
    parser.add_argument("budget", help="such as params=0.25")
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/, imagenet/ and weights/")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "recover.json")
    arguments = parser.parse_args()
    keep, _, fraction = arguments.budget.partition("=")
    for row in measure(arguments.network, arguments.data, Budget(**{keep: float(fraction)})):
        print(json.dumps(row), flush=True)
        earlier = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
        key = [row[name] for name in ("network", "budget", "recover")]
        others = [other for other in earlier if [other[name] for name in ("network", "budget", "recover")] != key]
        arguments.json.write_text(json.dumps([*others, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
