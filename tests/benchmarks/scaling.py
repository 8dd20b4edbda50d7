"""How the time to plan and cut grows with layers, width, images and pixels.

python tests/benchmarks/scaling.py           measure, and draw
python tests/benchmarks/scaling.py --draw    draw again from results/scaling.json

A plain stack of convolutions with BatchNorm and ReLU is cut to half its MACs. From a network of 8 layers with 64 channels and 128
images of 32 x 32 pixels, each quantity is halved and doubled, the others staying the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from dsconv_surgery import Budget, apply_plan, make_plan

RESULT = Path(__file__).resolve().with_name("results") / "scaling.json"
BASE = {"layers": 8, "width": 64, "images": 128, "pixels": 32}  # pixels: the side of an image
FACTORS = (0.5, 1, 2)


def network(layers: int, width: int) -> nn.Sequential:
    torch.manual_seed(0)
    stack: list[nn.Module] = []
    for index in range(layers):
        stack += [nn.Conv2d(width if index else 3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*stack, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def smooth_images(count: int, side: int) -> Tensor:
    coarse = torch.randn(count, 3, max(2, side // 8), max(2, side // 8), generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, size=side, mode="bilinear", align_corners=False)


def measure(layers: int, width: int, images: int, pixels: int) -> dict[str, float]:
    """CPU seconds to plan and to cut."""
    model, x = network(layers, width), smooth_images(images, pixels)
    with torch.no_grad():
        model.train()(x[:64])  # statistics of the BatchNorms
    model.eval()
    batches = list(x.split(32))
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        plan = make_plan(model, x[:1], budget=Budget(macs=0.5), calibration=batches, cache=folder)
        planned = time.process_time()
        apply_plan(model, plan, x[:1], calibration=batches)
        return {"plan": round(planned - start, 2), "cut": round(time.process_time() - planned, 2)}


def draw(rows: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for name, marker in zip(BASE, "osD^", strict=True):
        own = sorted((row["factor"], row["plan"] + row["cut"]) for row in rows if row["changed"] in (name, None))
        axes.plot(*zip(*own, strict=True), marker=marker, label=f"{name} (1x is {BASE[name]}{'²' if name == 'pixels' else ''})")
    base = next(row["plan"] + row["cut"] for row in rows if row["changed"] is None)
    axes.plot(FACTORS, [base * factor for factor in FACTORS], color="gray", linestyle="--", label="proportional")
    axes.set(xscale="log", yscale="log", xlabel="multiple of the base network", ylabel="CPU seconds, plan and cut")
    axes.set_xticks(FACTORS, [f"{factor:g}x" for factor in FACTORS], minor=False)
    axes.minorticks_off()
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500) if t >= 0.7 * min(r["plan"] + r["cut"] for r in rows)]
    axes.set_yticks(ticks, [str(t) for t in ticks])
    axes.set_ylim(top=1.3 * max(row["plan"] + row["cut"] for row in rows))
    axes.set_title("Time to plan and cut to half the MACs, calibrated")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(RESULT.with_suffix(".png"), dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="only draw the results again")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(RESULT.read_text())["rows"] if arguments.draw else []
    if not rows:
        measure(2, 8, 16, 16)  # what only the first plan of a process costs
        for changed in (None, *BASE):
            for factor in FACTORS if changed else (1.0,):
                if changed and factor == 1:
                    continue
                sizes = BASE | ({changed: int(factor * BASE[changed])} if changed else {})
                rows.append({"changed": changed, "factor": factor, **sizes, **measure(**sizes)})
                print(json.dumps(rows[-1]), flush=True)
        RESULT.write_text(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}, indent=1) + "\n")
    draw(rows)


if __name__ == "__main__":
    main()
