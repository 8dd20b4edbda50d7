"""What the check after a cut costs: its CPU time as a share of a calibrated `compress` of ResNet-20.

python tests/benchmarks/self_check.py [--images 256] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from cifar import demo_images, demo_resnet20  # noqa: E402

from dsconv_surgery import Budget, compress, surgery  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, images = demo_resnet20(), demo_images("train")[0][: options.images]
    seconds: list[float] = []
    check = surgery.check_computes_same

    def timed(*args: Any) -> None:
        start = time.process_time()
        check(*args)
        seconds.append(time.process_time() - start)

    rows = []
    for schemes in ("cp", None):
        seconds.clear()
        start = time.process_time()
        with mock.patch.object(surgery, "check_computes_same", timed):
            compress(model, images[:1], budget=Budget(macs=0.5), schemes=schemes, calibration=images.split(64), cache=False)
        total = time.process_time() - start
        rows.append(
            {
                "schemes": schemes or "all",
                "images": len(images),
                "compress_s": total,
                "check_s": sum(seconds),
                "share": sum(seconds) / total,
            }
        )
        print(rows[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
