"""CPU time to import the package, compared with torch, in one run.

python tests/benchmarks/import_time.py --runs 2 --json tests/benchmarks/results/import_time.json

Each statement runs in new processes; the least CPU time (user and system) counts. "all public names" imports every module that they need.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

STATEMENTS = {
    "torch": "import torch",
    "dsconv_surgery": "import dsconv_surgery",
    "torch and dsconv_surgery": "import torch, dsconv_surgery",
    "torch and all public names": "import torch\nfrom dsconv_surgery import *",
    "dsconv-surgery --help": "import sys\nsys.argv = ['dsconv-surgery', '--help']\nfrom dsconv_surgery.cli.commands import main\nmain()",
}


def cpu_seconds(statement: str, runs: int) -> float:
    """The least CPU time of a few processes that run a statement."""
    seconds: list[float] = []
    for _ in range(runs):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", statement], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="processes per statement")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    seconds = {name: cpu_seconds(statement, options.runs) for name, statement in STATEMENTS.items()}
    rows = [{"statement": name, "cpu_seconds": round(t, 3), "over_torch": round(t / seconds["torch"], 3)} for name, t in seconds.items()]
    for row in rows:
        print(row)
    if options.json:
        options.json.write_text(json.dumps({"settings": {"runs": options.runs}, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
