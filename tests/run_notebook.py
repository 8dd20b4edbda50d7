"""Runs a notebook and writes it with its outputs, without what differs from run to run.

python tests/run_notebook.py examples/tour.ipynb [--out FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

SECONDS = 600  # the longest time for a cell


def execute(path: Path) -> Any:
    """The notebook with new outputs; an exception if a cell fails. It runs in its folder, as in Jupyter."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", record_timing=False, resources=resources).execute()
    notebook.metadata["language_info"] = {"name": "python"}  # without the version
    for cell in notebook.cells:
        cell.metadata = {}
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--out", type=Path, help="file to write; the notebook itself if not given")
    options = parser.parse_args()
    nbformat.write(execute(options.notebook), options.out or options.notebook)


if __name__ == "__main__":
    main()
