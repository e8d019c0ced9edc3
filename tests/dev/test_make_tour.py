"""docs/tour.ipynb: its stored outputs, and a run of all cells."""

import base64
import re

import make_tour
import nbformat
import pytest

NOTEBOOK = nbformat.read(make_tour.TOUR, as_version=4)


def outputs(notebook, kind):
    """Return the data of one kind of all outputs."""
    found = (
        output.get("data", {}).get(kind)
        for cell in notebook.cells
        for output in cell.get("outputs", ())
    )
    return [data for data in found if data]


def printed(notebook):
    texts = (o["text"] for c in notebook.cells for o in c.get("outputs", ()) if "text" in o)
    return "".join(texts)


def test_stored_outputs():
    """Of every cell, without errors, and small."""
    code = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert "error" not in {output.output_type for cell in code for output in cell.outputs}
    images = outputs(NOTEBOOK, "image/jpeg")
    assert len(images) >= 4
    assert all(base64.b64decode(image)[:2] == b"\xff\xd8" for image in images)
    assert make_tour.TOUR.stat().st_size < make_tour.MAX_BYTES


@pytest.mark.slow
def test_all_cells_run(tmp_path):
    """They print what is stored: names and counts, not the last digits of numbers."""
    notebook = make_tour.run(nbformat.read(make_tour.TOUR, as_version=4), tmp_path)
    assert len(outputs(notebook, "image/jpeg")) == len(outputs(NOTEBOOK, "image/jpeg"))
    words = [re.sub(r"[\d.-]+", "0", printed(n)).split() for n in (notebook, NOTEBOOK)]
    assert words[0] == words[1]
    oracle = float(re.search(r"oracle {'AP': ([\d.]+)", printed(notebook))[1])
    assert oracle > 80
