"""Where the time of a first plan and of its cut goes, by phase, with and without calibration images.

python tests/benchmarks/planning_profile.py --data FOLDER [NETWORK ...]
python tests/benchmarks/planning_profile.py --table

A timer interrupts the process every few milliseconds of CPU time; the time since the last interruption is added to the phase of the
innermost function that belongs to one. The machine should be idle otherwise.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
from networks import NETWORKS, load_case  # noqa: E402

from dsconv_surgery import Budget, compress  # noqa: E402
from dsconv_surgery.support.formatting import markdown_table  # noqa: E402

RESULT = Path(__file__).resolve().with_name("results") / "planning_profile.json"
INTERVAL = 0.005  # seconds of CPU time between two samples
# The phase of a function, by its module and name; the innermost one on the stack counts.
PHASES = {
    ("network/discovery", "survey_model"): "survey",
    ("calibration/moments", "gather"): "moments",
    ("calibration/moments", "objective"): "moments",
    ("calibration/moments", "add"): "moments",
    ("planning/option_fits", "weight_errors"): "errors of weights",
    ("planning/option_errors", "_truncation_errors"): "errors of weights",
    ("planning/option_fits", "fit"): "fits of the last link",
    ("planning/option_fits", "start"): "approximations",
    ("planning/damage", "divergence"): "probes",
    ("planning/damage", "digest"): "digest",
    ("planning/layer_latency", "time"): "clock",
    ("planning/knapsack", "choose"): "knapsack",
    ("planning/option_errors", "measure"): "exact errors",
    ("calibration/output_metric", "output_metrics"): "cut: output metrics",
    ("calibration/side_by_side", "_advance"): "cut: runs",
    ("calibration/side_by_side", "calls"): "cut: runs",
    ("calibration/reconstruct", "_fit"): "cut: fits",
    ("calibration/reconstruct", "_fit_behind_relu"): "cut: fits behind the ReLU",
    ("calibration/reconstruct", "reconstruct"): "cut: rest",
    ("surgery", "build_cut_model"): "cut: rest",
    ("network/self_check", "check_computes_same"): "self-check",
    ("report", "compare"): "report",
}


class Profile:
    """Adds CPU seconds to phases while it is active."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def __enter__(self) -> Profile:
        self._last, self._start = time.process_time(), time.perf_counter()
        self._old = signal.signal(signal.SIGPROF, self._sample)
        signal.setitimer(signal.ITIMER_PROF, INTERVAL, INTERVAL)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, self._old)
        self.wall = time.perf_counter() - self._start

    def _sample(self, _signal: int, frame: FrameType | None) -> None:
        now = time.process_time()
        phase = "other"
        while frame is not None:
            name, code = frame.f_code.co_name, frame.f_code.co_filename
            module = code.rsplit("dsconv_surgery/", 1)[-1].removesuffix(".py")
            if (module, name) in PHASES:
                phase = PHASES[module, name]
                break
            frame = frame.f_back
        self.seconds[phase] += now - self._last
        self._last = now


def measure(name: str, data: Path, calibrated: bool) -> dict[str, Any]:
    case = load_case(name, data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder, Profile() as profile:
        compress(case.model, case.example, budget=Budget(macs=0.5), calibration=case.batches if calibrated else None, cache=folder)
    return {
        "network": name,
        "images": len(case.images) if calibrated else 0,
        "cpu_seconds": round(sum(profile.seconds.values()), 1),
        "wall_seconds": round(profile.wall, 1),
        "mib_above_start": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024,
        "threads": torch.get_num_threads(),
        "phases": {phase: round(seconds, 2) for phase, seconds in profile.seconds.most_common()},
    }


def table() -> str:
    rows = json.loads(RESULT.read_text())["rows"]
    phases = sorted({phase for row in rows for phase in row["phases"]}, key=lambda p: -sum(row["phases"].get(p, 0.0) for row in rows))
    head = ["network", "images", "seconds of CPU", "MiB", *phases]
    return markdown_table(
        head,
        [
            [row["network"], str(row["images"]), f"{row['cpu_seconds']:.0f}", str(row["mib_above_start"])]
            + [f"{row['phases'].get(phase, 0.0):.1f}" for phase in phases]
            for row in rows
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["resnet20", "squeezenet", "resnet18", "resnet50"], help=", ".join(NETWORKS))
    parser.add_argument("--data", type=Path, help="folder with cifar10/, imagenet/ and weights/")
    parser.add_argument("--images", choices=("with", "without", "both"), default="both")
    parser.add_argument("--table", action="store_true", help="print the results as a table")
    parser.add_argument("--json", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return
    rows = json.loads(arguments.json.read_text())["rows"] if arguments.json.exists() else []
    for name in arguments.networks:
        for calibrated in {"with": [True], "without": [False], "both": [False, True]}[arguments.images]:
            row = measure(name, arguments.data, calibrated)
            print(json.dumps(row), flush=True)
            rows = [r for r in rows if (r["network"], bool(r["images"])) != (name, calibrated)] + [row]
            arguments.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
