"""Draw the accuracy of each rule over the MACs that it keeps, from results/budget_rivals.json, as results/rivals.png.

python tests/benchmarks/picture.py

The rule of BALF is far below the others: it is off the scale, and its numbers are written into the picture.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().with_name("results")
STYLES: dict[str, dict[str, Any]] = {  # a rule's name in the results: how its line looks
    "ours": {"label": "dsconv_surgery (ours)", "color": "#0b57d0", "linewidth": 4.5, "marker": "o", "markersize": 11, "zorder": 5},
    "best single scheme": {"label": "our planner, CP only", "color": "#7a9fd6", "linewidth": 2.2, "marker": "s", "markersize": 8},
    "uniform fraction": {"label": "uniform fraction", "color": "#e07b00", "linewidth": 2.2, "marker": "^", "markersize": 9},
    "equal relative error (ALDS)": {"label": "equal error (as ALDS)", "color": "#2e8b57", "linewidth": 2.2, "marker": "D", "markersize": 7},
}
OUTSIDE = "whitened channel SVD under a budget (BALF)"
LOWEST = {"ResNet-20": 89.4, "ResNet-56": 92.2}  # lower ends of the vertical axes, in % of accuracy


def points(rows: list[dict[str, Any]], network: str, rule: str) -> list[tuple[float, float]]:
    """MACs kept and accuracy, both in %, of each budget on MACs."""
    own = [row for row in rows if (row["network"], row["measure"], row["rule"]) == (network, "macs", rule)]
    return sorted((100 * (1 - row["macs_saved"]), row["cut"]) for row in own)


def draw_network(axes: Axes, rows: list[dict[str, Any]], network: str) -> None:
    dense = next(row["dense"] for row in rows if row["network"] == network)
    axes.axhline(dense, color="black", linestyle="--", linewidth=1.6)
    axes.text(28.6, dense + 0.012 * (dense - LOWEST[network]), f"dense network, {dense} %", fontsize=15, va="bottom")
    for rule, style in STYLES.items():
        axes.plot(*zip(*points(rows, network, rule), strict=True), **style)
    outside = ", ".join(f"{accuracy:.2f}" for _, accuracy in points(rows, network, OUTSIDE))
    axes.annotate(
        f"off the scale:\nwhitened SVD (as BALF)\n{outside} %",
        xy=(0.985, 0.02),
        xycoords="axes fraction",
        fontsize=14,
        ha="right",
        va="bottom",
        color="#8b1a1a",
    )
    axes.set_title(network, fontsize=19, fontweight="bold")
    axes.set_xlabel("MACs kept (%)", fontsize=17)
    axes.set_xticks([30, 40, 50])
    axes.set_xlim(28.3, 51.2)
    axes.set_ylim(LOWEST[network], dense + 0.1 * (dense - LOWEST[network]))
    axes.tick_params(labelsize=15)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    rows = json.loads((RESULTS / "budget_rivals.json").read_text())["rows"]
    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, network in zip(panels, LOWEST, strict=True):
        draw_network(axes, rows, network)
    panels[0].set_ylabel("CIFAR-10 accuracy (%)", fontsize=17)
    figure.suptitle("Accuracy after compression, without training", fontsize=20)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=16, frameon=False)
    figure.savefig(RESULTS / "rivals.png", dpi=145)


if __name__ == "__main__":
    main()
