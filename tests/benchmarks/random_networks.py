"""Check random networks: full rank, reduced rank, calibration, save and load, fold back; failures are shrunk and listed by kind.

python tests/benchmarks/random_networks.py --networks 1000
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("DSCONV_SURGERY_CACHE", tempfile.mkdtemp())

import torch  # noqa: E402
from random_network_checks import Failure, check, is_calibrated, shrink  # noqa: E402
from random_networks import Description, describe  # noqa: E402

RESULT = Path(__file__).resolve().with_name("results") / "random_networks.json"


def failures_of(description: Description) -> list[Failure]:
    try:
        return check(description)
    except Exception as error:  # the generator's or the check's own
        return [Failure("generator", f"{type(error).__name__}: {error}")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--shrink", action="store_true", help="print the smallest network of each kind of failure")
    parser.add_argument("--json", type=Path, default=RESULT)
    arguments = parser.parse_args()
    start, kinds, examples, blocks, failed, seconds = time.time(), Counter(), {}, Counter(), 0, []
    for seed in range(arguments.first, arguments.first + arguments.networks):
        description, begin = describe(seed), time.process_time()
        failures = failures_of(description)
        seconds.append(time.process_time() - begin)
        if seconds[-1] > 10:
            print(f"seed {seed}: {seconds[-1]:.0f} s of CPU time", flush=True)
        blocks.update({kind for kind, _ in description.blocks})
        failed += bool(failures)
        for failure in failures:
            kinds[failure.kind] += 1
            if failure.kind not in examples:
                examples[failure.kind] = (description, failure)
                print(f"seed {seed}: {failure.check}: {failure.message[:300]}", flush=True)
    if arguments.shrink:
        for kind, (description, failure) in examples.items():
            small = shrink(description, kind)
            print(f"\n## {kind} ({kinds[kind]})\n{small}\n{failure.message}\n{failure.trace[-1500:]}", flush=True)
    result: dict[str, Any] = {
        "networks": arguments.networks,
        "first_seed": arguments.first,
        "calibrated": sum(is_calibrated(describe(arguments.first + k)) for k in range(arguments.networks)),
        "failed": failed,
        "failures": dict(kinds.most_common()),
        "blocks": dict(blocks.most_common()),
        "seconds": round(time.time() - start, 1),
        "cpu_seconds_median": round(sorted(seconds)[len(seconds) // 2], 2),
        "cpu_seconds_slowest": round(max(seconds), 1),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("networks", "calibrated", "failed", "seconds", "cpu_seconds_slowest")}))


if __name__ == "__main__":
    main()
