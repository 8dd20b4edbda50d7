"""Time of a MAC of depthwise links, relative to dense convolutions, on a CPU in eager mode; and how well it tells which chains are slow.

python tests/benchmarks/link_times.py --json tests/benchmarks/results/link_times.json

Each layer is a 3x3 convolution with as many inputs as outputs. The least CPU time of a few runs counts, on one thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from dsconv_surgery import schemes
from dsconv_surgery.network.discovery import Skip
from dsconv_surgery.network.geometry import ConvSpec, Cost, chain_cost
from dsconv_surgery.plan import Cut, Plan
from dsconv_surgery.planning.slow_chains import ONE_KERNEL, SEVERAL_KERNELS, expected_time
from dsconv_surgery.support.input_description import describe_inputs
from dsconv_surgery.support.inputs import Inputs

LAYERS = ((16, 32), (32, 16), (64, 8), (64, 56), (128, 28), (256, 14), (512, 7))  # channels, pixels of a side
BATCHES, FRACTIONS = (1, 8), (0.3, 0.5)
RUNS, SHORTEST = 7, 2e-3  # runs of each network, and seconds of a run


def milliseconds(layers: list[ConvSpec], x: torch.Tensor) -> float:
    network = nn.Sequential(*(schemes.make_layer(spec, x) for spec in layers)).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    best, number = float("inf"), 1
    with torch.inference_mode():
        network(x)
        for _ in range(RUNS):
            start = time.thread_time()
            for _ in range(number):
                network(x)
            best = min(best, (time.thread_time() - start) / number)
            number = max(1, round(SHORTEST / best))
    return 1e3 * best


def measure(channels: int, side: int, batch: int) -> dict[str, Any]:
    """The weights of depthwise MACs in one layer, and the measured and the expected times of chains."""
    x, size = torch.randn(batch, channels, side, side), (batch, side, side)
    dense = ConvSpec(channels, channels, (3, 3), padding=(1, 1))
    reference = milliseconds([dense], x)
    per_mac = reference / dense.macs(size)
    row: dict[str, Any] = {"channels": channels, "side": side, "batch": batch, "dense_ms": round(reference, 4), "chains": []}
    for name, kernels in (("one_kernel", 1), ("several_kernels", 2)):
        link = ConvSpec(channels, kernels * channels, (3, 3), padding=(1, 1), groups=channels)
        row[name] = round(milliseconds([link], x) / link.macs(size) / per_mac, 1)
    inputs = describe_inputs(Inputs(x))
    for scheme in ("cp", "depthwise", "channel", "spatial", "tucker"):
        for fraction in FRACTIONS:
            definition = schemes.get_scheme(scheme)
            ranks = [r for r in definition.ranks(dense.one_group()) if isinstance(r, int) or r[0] == r[1]]
            costs = [chain_cost(schemes.chain_of(definition, dense, rank), (size,)).macs / dense.macs(size) for rank in ranks]
            fitting = [rank for rank, cost in zip(ranks, costs, strict=True) if cost <= fraction]
            if not fitting:
                continue
            cut = Cut("layer", scheme, fitting[-1], dense, (size,))
            plan = Plan((cut,), tuple[Skip, ...](), inputs, "fixed", None, cut.cost_before, Cost(0, 0))
            ratio = milliseconds(list(cut.chain.values()), x) / reference
            times = {"time": round(ratio, 2), "expected": round(expected_time(plan), 2)}
            row["chains"].append({"scheme": scheme, "fraction": fraction, **times})
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for batch in BATCHES:
        for channels, side in LAYERS:
            rows.append(measure(channels, side, batch))
            print(rows[-1], flush=True)
    chains = [chain for row in rows for chain in row["chains"]]
    warned = [chain for chain in chains if chain["expected"] > 0.95]
    others = [chain for chain in chains if chain["expected"] <= 0.95]
    summary = {name: round(median(row[name] for row in rows), 1) for name in ("one_kernel", "several_kernels")}
    summary |= {"warned": len(warned), "warned_and_slower": sum(chain["time"] > 1 for chain in warned)}
    summary |= {"others": len(others), "others_and_slower": sum(chain["time"] > 1 for chain in others)}
    settings = {"weights": [ONE_KERNEL, SEVERAL_KERNELS], "torch": torch.__version__, "machine": platform.machine(), "threads": 1}
    print(summary)
    if options.json:
        options.json.write_text(json.dumps({"settings": settings, "summary": summary, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
