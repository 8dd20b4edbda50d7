"""Time to plan and cut, and how far the outputs move on images that were not used; also of another checkout, for comparison.

python tests/benchmarks/planning.py NETWORK MEASURE=FRACTION ... --data FOLDER [--without-images] [--package FOLDER] [--json FILE]

All budgets of a call share a cache: the first is the first plan, the others are next budgets. `--package` names a checkout of another
commit, such as one made by `git worktree add ../before 0efe4b3`. Nothing is trained; divergences are from the dense network's outputs.
"next_plan_cpu_seconds" is of a plan alone, with all measurements in the cache.
With `--without-images`, plans are made from the weights alone, with the default settings; "error_sum" is the sum of their errors.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
JUDGED = {"resnet20": 2000, "resnet56": 2000, "resnet18-64px": 2000}  # images to judge by, 500 for others


def measure(name: str, budgets: list[str], data: Path, calibrated: bool) -> list[dict[str, Any]]:
    import torch
    from networks import load_case

    import dsconv_surgery

    case = load_case(name, data)
    other = case.other_images(JUDGED.get(name, 500))

    def outputs(model: Any) -> Any:
        with torch.inference_mode():
            return torch.cat([model.eval()(x) for x in other.split(50)]).log_softmax(1)

    target, before, rows = outputs(case.model), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    with tempfile.TemporaryDirectory() as folder:
        for text in budgets:
            key, fraction = text.split("=")
            budget = dsconv_surgery.Budget(**{key: float(fraction)})
            cpu, wall = time.process_time(), time.perf_counter()
            batches = case.batches if calibrated else None
            small = dsconv_surgery.compress(case.model, case.example, budget=budget, calibration=batches, cache=folder)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            start = time.process_time()
            dsconv_surgery.make_plan(case.model, case.example, budget=budget, calibration=batches, cache=folder)
            next_plan = time.process_time() - start
            result = outputs(small.model)
            rows.append(
                {
                    "network": name,
                    "images": len(case.images) if calibrated else 0,
                    "budget": text,
                    "error_sum": round(sum(cut.error for cut in small.plan.cuts), 4),
                    "divergence": round(float((target.exp() * (target - result)).sum(1).mean()), 5),
                    "agreement": round(float((target.argmax(1) == result.argmax(1)).double().mean()), 4),
                    "cpu_seconds": round(cpu, 1),
                    "wall_seconds": round(wall, 1),
                    "next_plan_cpu_seconds": round(next_plan, 1),
                    "mib_above_start": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024,
                    "schemes": dict(Counter(cut.scheme for cut in small.plan.cuts)),
                    "threads": torch.get_num_threads(),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("budgets", nargs="+", metavar="MEASURE=FRACTION")
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/, imagenet/ and weights/")
    parser.add_argument("--without-images", action="store_true", help="plan from the weights alone")
    parser.add_argument("--package", type=Path, default=HERE.parents[1], help="the checkout to measure; this one if not given")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "planning.json")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.inside:  # in a new process, so that the right checkout is imported
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(arguments.package.resolve()), str(HERE)])}
        raise SystemExit(subprocess.run([sys.executable, "-P", __file__, *sys.argv[1:], "--inside"], env=environment).returncode)
    import dsconv_surgery

    package = Path(dsconv_surgery.__file__).resolve().parents[1]
    assert package == arguments.package.resolve(), f"imported {package}"
    commit = subprocess.run(["git", "-C", str(package), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    rows = [{"commit": commit} | row for row in measure(arguments.network, arguments.budgets, arguments.data, not arguments.without_images)]
    earlier = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
    keys = {(row["commit"], row["network"], row["images"], row["budget"]) for row in rows}
    others = [row for row in earlier if (row["commit"], row["network"], row["images"], row["budget"]) not in keys]
    arguments.json.write_text(json.dumps(others + rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
