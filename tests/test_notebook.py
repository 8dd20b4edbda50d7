"""The notebook in examples: it runs, its cells have the outputs that are committed, and its totals are the same."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "tour.ipynb"
TABLES = ("layers", "plan", "difference", "report", "sweep", "tune")
PICTURES = ("report-picture", "sweep-picture", "tune-picture")
LARGEST = 400_000  # bytes of the file


def code_cells(path: Path) -> dict[str, Any]:
    return {cell["id"]: cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"}


def kinds(cell: Any) -> list[str]:
    """The outputs of a cell: the name of a stream, or the types of what is displayed."""
    return [output.get("name") or ", ".join(sorted(output["data"])) for output in cell["outputs"]]


def text(cell: Any) -> str:
    """What a cell printed, and the HTML that it shows."""
    return "".join("".join(output.get("text", output.get("data", {}).get("text/html", ""))) for output in cell["outputs"])


def totals(cell: Any) -> list[list[str]]:
    """The numbers in rows of the whole network, and the lines with parameters or MACs before and after."""
    rows = re.findall(r"<tr>(?:(?!</tr>).)*>whole network<.*?</tr>", text(cell))
    lines = re.findall(r"(?:parameters|MACs) [\d,]+ -&gt; [\d,]+ \(\S+ %\)", text(cell))
    return [*(re.findall(r">([\d,]+)<", row) for row in rows), lines]


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The cells after a run."""
    out = tmp_path_factory.mktemp("notebook") / "tour.ipynb"
    command = (sys.executable, "tests/run_notebook.py", str(NOTEBOOK), "--out", str(out))
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert process.returncode == 0, f"{process.stdout}\n{process.stderr}"
    return code_cells(out)


def test_outputs_are_committed() -> None:
    """All cells ran in order, without an error or a warning; tables are HTML, and pictures are images of a moderate size."""
    cells = code_cells(NOTEBOOK)
    assert [cell["execution_count"] for cell in cells.values()] == list(range(1, len(cells) + 1))
    assert all(cell["outputs"] for cell in cells.values())
    expected = {"stdout", "text/plain", "text/html, text/plain", "image/png, text/plain"}
    assert {kind for cell in cells.values() for kind in kinds(cell)} == expected
    assert [name for name in TABLES if "<table>" not in text(cells[name])] == []
    for name in PICTURES:
        assert base64.b64decode(cells[name]["outputs"][0]["data"]["image/png"]).startswith(b"\x89PNG")
    assert NOTEBOOK.stat().st_size < LARGEST


def test_nothing_that_differs_from_run_to_run_is_committed() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    assert not re.search(r"/tmp/|/home/|/root/|0x[0-9a-f]{6}", NOTEBOOK.read_text())


def test_text_cells_explain_each_section() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert cells[0]["cell_type"] == "markdown"
    titles = [line for cell in cells for line in cell["source"] if cell["cell_type"] == "markdown" and line.startswith("## ")]
    assert [title.strip("# \n") for title in titles] == ["Look", "Decide", "Cut", "Choose a budget", "Fine-tune", "Deploy"]


def test_a_run_gives_the_outputs_that_are_committed(executed: dict[str, Any]) -> None:
    """The same kinds of outputs, and the same totals of parameters and MACs to the digit."""
    committed = code_cells(NOTEBOOK)
    assert {name: kinds(cell) for name, cell in executed.items()} == {name: kinds(cell) for name, cell in committed.items()}
    assert sum(len(totals(committed[name])[0]) for name in ("layers", "plan", "difference", "report")) > 10
    assert {name: totals(cell) for name, cell in executed.items()} == {name: totals(cell) for name, cell in committed.items()}


def test_a_run_keeps_the_accuracy(executed: dict[str, Any]) -> None:
    """Half of the MACs cost less than five points, and what is exported computes the same."""
    scores = [float(number) for number in re.findall(r"([\d.]+) %", text(executed["compress"]))]
    assert len(scores) == 3
    assert scores[0] > 90
    assert scores[0] - scores[2] < 5
    for name in ("deploy", "onnx"):
        assert float(re.findall(r"outputs ([\d.e+-]+)", text(executed[name]))[0]) < 1e-3
