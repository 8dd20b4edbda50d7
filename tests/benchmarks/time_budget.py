"""Whether a network that was planned to half its time takes half the time, on an idle machine and beside a process that keeps a core busy.

python tests/benchmarks/time_budget.py [NETWORK ...] [--fraction 0.5]

The other process runs while the plan is made, and not while both networks are timed. Warnings of the planner, and budgets out of reach, are
recorded. Networks of torchvision have random weights, and plans are made from the weights alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import conftest  # noqa: E402, F401  # makes torchvision importable beside a CPU build of torch
import torch  # noqa: E402
import torchvision  # noqa: E402

from dsconv_surgery import Budget, apply_plan, make_plan  # noqa: E402
from dsconv_surgery.budget import BudgetError  # noqa: E402
from dsconv_surgery.support.inputs import Inputs  # noqa: E402
from dsconv_surgery.support.latency import measure_latency  # noqa: E402

RESULT = Path(__file__).resolve().with_name("results") / "time_budget.json"


@contextmanager
def other_load(active: bool) -> Any:
    """A process that keeps one core busy during the block."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if active else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def measure(name: str, fraction: float, busy: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).eval()
    x = torch.randn(1, 3, 224, 224)
    with warnings.catch_warnings(record=True) as caught, other_load(busy):
        warnings.simplefilter("always")
        start, cpu = time.perf_counter(), time.process_time()
        try:
            plan = make_plan(model, x, budget=Budget(latency=fraction), cache=False)
        except BudgetError as error:
            return {"network": name, "busy": busy, "refused": str(error), "warnings": [str(item.message) for item in caught]}
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    small = apply_plan(model, plan, x)
    dense, cut = measure_latency([model, small], Inputs(x), rounds=31)
    assert plan.timing is not None
    predicted = plan.timing.after / plan.timing.before  # measured on the whole cut network at the end of planning
    return {
        "network": name,
        "busy": busy,
        "budget": fraction,
        "dense_ms": round(dense, 2),
        "cut_ms": round(cut, 2),
        "faster": round(dense / cut, 3),
        "predicted_faster": round(1 / predicted, 3),
        "measured_over_predicted": round(cut / dense / predicted, 3),
        "of_the_macs": round(plan.total_after.macs / plan.total.macs, 3),
        "plan_seconds": round(seconds, 1),
        "plan_cpu_seconds": round(cpu, 1),
        "warnings": [str(item.message) for item in caught],
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["resnet18", "resnet50", "vgg16_bn"])
    parser.add_argument("--fraction", type=float, default=0.5)
    arguments = parser.parse_args()
    rows = json.loads(RESULT.read_text()) if RESULT.exists() else []
    for name in arguments.networks:
        for busy in (False, True):
            row = measure(name, arguments.fraction, busy)
            print(json.dumps(row), flush=True)
            rows = [r for r in rows if (r["network"], r["busy"]) != (name, busy)] + [row]
            RESULT.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
