"""Plans made for onnxruntime and for eager mode, both timed in onnxruntime, in turn with the dense network.

python tests/benchmarks/runtime.py [NETWORK ...] [--threads 1 2]

Schemes have closed forms and there are no images, so that a plan takes seconds beside its timings. A budget that is out of reach is
raised by a tenth of the dense time until it is not. As eager mode needs far more cuts for the same fraction of its time, a third plan is
made: for eager mode, with the smallest budget (in steps of 0.05) that has no larger sum of errors than the plan for onnxruntime.
Rows of results/runtime.json with the same network and threads are replaced.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import networks  # noqa: F401  # makes torchvision and the examples importable
import torch
from cifar import demo_resnet20
from torch import Tensor, nn

from dsconv_surgery import Budget, Plan, apply_plan, make_plan
from dsconv_surgery.budget import BudgetError
from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.latency import measure_latency, timing_conditions
from dsconv_surgery.support.runtimes import find_runtime

RESULT = Path(__file__).parent / "results" / "runtime.json"
KEEP = {"resnet20": 0.7, "mobilenet_v2": 0.7, "resnet18": 0.5, "resnet50": 0.5}  # of the dense time
SCHEMES = ["depthwise", "pointwise_depthwise", "spatial", "channel", "bottleneck"]
RUNTIMES = ("onnxruntime", "eager")
SAME_ERROR = "eager of no more error"
ROUNDS = 31


def load(name: str) -> tuple[nn.Module, Tensor]:
    if name == "resnet20":
        return demo_resnet20(), torch.randn(1, 3, 32, 32)
    import torchvision

    return torchvision.models.get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224)


def plan_within_reach(model: nn.Module, x: Tensor, runtime: str, keep: float, cache: str) -> tuple[Plan | None, list[str]]:
    """A plan for the smallest budget of keep, keep + 0.1, ... that is not out of reach, and the errors before it."""
    errors: list[str] = []
    while keep < 1:
        try:
            budget = Budget(latency=round(keep, 2))
            return make_plan(model, x, budget=budget, runtime=runtime, schemes=SCHEMES, exclude=(), cache=cache), errors
        except BudgetError as error:
            errors.append(str(error))
            keep += 0.1
    return None, errors


def error_sum(plan: Plan) -> float:
    return sum(cut.error for cut in plan.cuts)


def plan_of_no_more_error(model: nn.Module, x: Tensor, plan: Plan | None, keep: float, cache: str) -> Plan | None:
    """The plan for eager mode with the smallest budget, from keep on in steps of 0.05, whose errors add up to no more than a plan's."""
    while plan is not None and (keep := round(keep + 0.05, 2)) < 1:
        with suppress(BudgetError):
            other = make_plan(model, x, budget=Budget(latency=keep), runtime="eager", schemes=SCHEMES, exclude=(), cache=cache)
            if error_sum(other) <= error_sum(plan):
                return other
    return None


def measured(name: str, threads: int, cache: str) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, x = load(name)
    row: dict[str, Any] = {"network": name, "input": list(x.shape), "torch": torch.__version__}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        plans: list[Plan | None] = []
        for runtime in RUNTIMES:
            start = time.perf_counter()
            plan, errors = plan_within_reach(model, x, runtime, KEEP[name], cache)
            row[f"plan for {runtime}"] = described(plan, errors, time.perf_counter() - start)
            plans.append(plan)
        start = time.perf_counter()
        plans.append(plan_of_no_more_error(model, x, plans[0], KEEP[name], cache))
        row[f"plan for {SAME_ERROR}"] = described(plans[-1], [], time.perf_counter() - start)
        cuts = [model if plan is None else apply_plan(model, plan) for plan in plans]
        for runtime in RUNTIMES:
            executed_by = find_runtime(runtime)
            times = measure_latency([model, *cuts], Inputs(x), rounds=ROUNDS, runtime=executed_by)
            labels = ("dense", *(f"plan for {name}" for name in (*RUNTIMES, SAME_ERROR)))
            row[f"milliseconds in {runtime}"] = {label: round(ms, 3) for label, ms in zip(labels, times, strict=True)}
            row[f"conditions of {runtime}"] = str(timing_conditions(Inputs(x), executed_by))
    row["warnings"] = sorted({str(warning.message) for warning in caught if "latency" in str(warning.message)})
    return {**row, "threads": threads}


def described(plan: Plan | None, errors: list[str], seconds: float) -> dict[str, Any]:
    result: dict[str, Any] = {"errors": errors, "seconds": round(seconds, 1)}
    if plan is None or plan.timing is None or plan.budget is None:
        return result
    schemes = Counter(cut.scheme for cut in plan.cuts)
    macs = round(plan.total_after.macs / plan.total.macs, 3)
    predicted = {"dense ms": round(plan.timing.before, 3), "cut ms": round(plan.timing.after, 3)}
    result |= {"budget": str(plan.budget), "schemes": dict(schemes), "MACs kept": macs, "predicted": predicted}
    return result | {"error sum": round(error_sum(plan), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(KEEP), metavar="NETWORK", help=f"{', '.join(KEEP)}; all if not given")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--json", type=Path, default=RESULT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        for name in arguments.networks:
            for threads in arguments.threads:
                row = measured(name, threads, cache)
                rows = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
                others = [other for other in rows if (other["network"], other["threads"]) != (name, threads)]
                arguments.json.write_text(json.dumps([*others, row], indent=1) + "\n")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
