"""Run the notebook of the docs and store its outputs: `python dev/make_tour.py`.

It needs no network, and a few minutes of one core.
"""

import argparse
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

TOUR = Path(__file__).parents[1] / "docs" / "tour.ipynb"
MAX_BYTES = 200_000  # of the file, its images included
MAX_SECONDS = 900  # of a cell


def run(notebook: nbformat.NotebookNode, folder: str | Path) -> nbformat.NotebookNode:
    """Run all cells in a folder, and return the notebook with their outputs."""
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=MAX_SECONDS, resources=resources, record_timing=False)
    client.execute()
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":  # logs and progress bars say nothing here
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    return notebook


def main(arguments: list[str] | None = None) -> None:
    """Run the notebook in a temporary folder, and write it."""
    parser = argparse.ArgumentParser(description="Run docs/tour.ipynb and store its outputs.")
    parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        notebook = run(nbformat.read(TOUR, as_version=4), folder)
    content = nbformat.writes(notebook) + "\n"
    if len(content) > MAX_BYTES:
        raise SystemExit(f"{len(content)} bytes: draw smaller images, the limit is {MAX_BYTES}")
    TOUR.write_text(content, encoding="utf-8")
    print(f"{TOUR}: {len(content)} bytes")


if __name__ == "__main__":
    main()
