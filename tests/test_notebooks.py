"""Every notebook runs, with few epochs in its cell tagged "parameters"; those in the repository have been run."""

import re
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
EPOCHS = {"07_cl_lsg": 2}  # one to reuse, and one to grow
SLOW = {"03_deployment", "09_own_method", "10_comparing"}


def images_of(notebook):
    return [o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]


def marked(path):
    """Some take a minute: they compile and export, or run many times, which tests of their own do in little."""
    return pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else [])


@pytest.mark.parametrize("path", [marked(path) for path in NOTEBOOKS])
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # small tensors
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    few = f"EPOCHS = {EPOCHS.get(path.stem, 1)}"
    parameters.source, found = re.subn(r"^EPOCHS = \d+", few, parameters.source, flags=re.MULTILINE)
    assert found == 1
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert len(images_of(notebook)) >= 3
    if path.stem == "04_esacl" and find_spec("ipywidgets") is None:
        bars = [o for c in notebook.cells for o in c.get("outputs", []) if "Task 5/5, epoch 1/1" in str(o)]
        assert len(bars) == 1


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in NOTEBOOKS])
def test_a_notebook_shows_its_figures_and_no_folder_of_its_author(path):
    notebook, text = nbformat.read(path, as_version=4), path.read_text()
    assert len(images_of(notebook)) >= 3 and len(text) < 400_000
    assert notebook.metadata.kernelspec.name == "python3"
    outputs = str([c.get("outputs") for c in notebook.cells])
    assert not re.search(r"site-packages|/(home|root|tmp|work|Users)/", outputs)
