"""The tutorial notebook, executed from top to bottom in a folder of its own."""

import os

import pytest

from helpers import ROOT

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install nbclient ipykernel")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install nbclient ipykernel")
pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install nbclient ipykernel")
pytest.importorskip("mmdet", reason="mmdet is not installed: pip install 'dinat_backbones[openmmlab]'")

NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def text_of(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs if output.output_type == "stream")


def test_the_notebook_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and [cell.outputs for cell in code] == [[]] * len(code)
    assert {cell.execution_count for cell in code} == {None}


def test_five_images_become_a_detector(tmp_path, monkeypatch):
    """The model finds both objects of the image that it is shown."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=900, resources=dict(metadata=dict(path=str(tmp_path))))
    client.execute()
    data, _, training, prediction = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert text_of(data) == "5 images, 10 objects\n"
    figures = [line for line in text_of(training).splitlines() if line.startswith("mask AP50")]
    assert float(figures[0].rpartition(" ")[2]) >= 0.8  # 1.00 on the machine it was written on
    found = [line.split()[:2] for line in text_of(prediction).splitlines() if line.startswith(("disc", "square"))]
    assert sorted(name for name, _ in found) == ["disc", "square"]
    assert min(float(score) for _, score in found) > 0.5
    assert (tmp_path / "tutorial" / "predictions.png").stat().st_size > 5000
