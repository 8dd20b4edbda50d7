"""The table of results in recipes/README.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from recipe_table import RECIPES, results_table, with_table


def test_committed_table_is_what_the_json_files_give() -> None:
    readme = (RECIPES / "README.md").read_text()
    assert with_table(readme, results_table()) == readme, "run: python tests/benchmarks/recipe_table.py --write"


def test_rows_are_averaged_over_seeds_and_split_by_batch_and_memory_format(tmp_path: Path) -> None:
    results = [
        {"seed": 0, "params_saved": 0.5, "macs_saved": 0.25, "dense": 90.0, "cut": 88.0, "tuned": 89.0},
        {"seed": 1, "params_saved": 0.6, "macs_saved": 0.35, "dense": 90.0, "cut": 89.0, "tuned": 89.5},
    ]
    (tmp_path / "resnet20-cifar10-half.toml").write_text('description = "no model"')
    (tmp_path / "resnet20-cifar10-half.json").write_text(json.dumps({"result": results}))
    timed = [{"batch": b, "memory_format": "contiguous", "params_saved": 0.1, "macs_saved": 0.2, "faster": 1.5} for b in (1, 16)]
    (tmp_path / "resnet18-half.toml").write_text('model = "torchvision:resnet18"')
    (tmp_path / "resnet18-half.json").write_text(json.dumps({"result": timed}))
    assert results_table(tmp_path).splitlines()[2:] == [
        "| resnet18-half | resnet18 | batch 1, contiguous | 10.0 % | 20.0 % | 1.50x |  |  |  |",
        "| resnet18-half | resnet18 | batch 16, contiguous | 10.0 % | 20.0 % | 1.50x |  |  |  |",
        "| resnet20-cifar10-half | ResNet-20 | mean of 2 seeds | 55.0 % | 30.0 % |  | 90.00 % | 88.50 % | 89.25 % |",
    ]


def test_recipes_holds_only_recipes_their_results_and_the_readme() -> None:
    names = {path.stem for path in RECIPES.glob("*.toml")}
    assert {path.name for path in RECIPES.iterdir()} == {f"{name}.{kind}" for name in names for kind in ("toml", "json")} | {"README.md"}
