"""Print the table of results in recipes/README.md from the JSON file beside each recipe.

python tests/benchmarks/recipe_table.py            print the table
python tests/benchmarks/recipe_table.py --write    put it into recipes/README.md

A recipe has one row for each batch size and memory format. Numbers of several seeds are averaged.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path
from statistics import fmean
from typing import Any

from dsconv_surgery.support.formatting import markdown_table

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->\n"
COLUMNS = ("recipe", "network", "measured on", "parameters saved", "MACs saved", "faster", "accuracy: dense", "cut", "tuned")


def network_name(recipe: Path) -> str:
    """`torchvision:resnet18` -> `resnet18`; a CIFAR recipe names no model, its file name does: `resnet20-cifar10-...` -> `ResNet-20`."""
    model = tomllib.loads(recipe.read_text()).get("model", "")
    return model.split(":")[-1] or recipe.stem.split("-")[0].replace("resnet", "ResNet-")


def table_row(recipe: Path, results: list[dict[str, Any]]) -> list[str]:
    """The cells of one row, averaged over the results of all seeds."""

    def mean(key: str, digits: int, unit: str, scale: float = 1.0) -> str:
        return f"{scale * fmean(result[key] for result in results):.{digits}f}{unit}" if key in results[0] else ""

    if "batch" in results[0]:
        setting = f"batch {results[0]['batch']}, {results[0]['memory_format']}"
    else:
        setting = f"mean of {len(results)} seeds" if len(results) > 1 else "1 seed"
    savings = (mean(key, 1, " %", scale=100) for key in ("params_saved", "macs_saved"))
    accuracies = (mean(key, 2, " %") for key in ("dense", "cut", "tuned"))
    return [recipe.stem, network_name(recipe), setting, *savings, mean("faster", 2, "x"), *accuracies]


def results_table(recipes: Path = RECIPES) -> str:
    """The table in Markdown."""
    rows = []
    for recipe in sorted(recipes.glob("*.toml")):
        groups: dict[Any, list[dict[str, Any]]] = {}
        for result in json.loads(recipe.with_suffix(".json").read_text())["result"]:
            groups.setdefault((result.get("batch"), result.get("memory_format")), []).append(result)
        rows += [table_row(recipe, group) for group in groups.values()]
    return markdown_table(COLUMNS, rows)


def with_table(text: str, table: str) -> str:
    """A README whose part between the two markers is the table."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table + END + rest.split(END)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into recipes/README.md")
    table, readme = results_table(), RECIPES / "README.md"
    if parser.parse_args().write:
        readme.write_text(with_table(readme.read_text(), table))
    else:
        print(table, end="")


if __name__ == "__main__":
    main()
