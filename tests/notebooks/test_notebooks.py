"""Every notebook runs from its first cell to its last, shows figures and tables, and uses nothing private."""

import ast
import os

import nbformat
import pytest
from helpers import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHOWN = {"train_and_compare": 1, "quantize_a_real_model": 1, "inside_ternary_training": 3, "scaling_laws": 3,
         "plan_a_pod": 3}  # figures at least


def test_there_is_one_for_every_journey():
    assert {path.stem for path in NOTEBOOKS} == set(SHOWN)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch):
    if path.stem == "quantize_a_real_model" and "SPECTRA_OFFLINE" in os.environ:
        pytest.skip("SPECTRA_OFFLINE is set, and this downloads 93 MB once")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.setenv("XLA_FLAGS", "")  # as its reader runs it
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None) if cell.cell_type != "code" else cell.update(outputs=[], execution_count=None)
    # A cell that raises ends it here; the time is for a machine that runs other tests beside it.
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    assert kinds.count("image/png") >= SHOWN[path.stem] and "text/html" in kinds


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed(path):
    """It was run, in order; no path of a machine is in it; nothing but public names of the project is used."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    text = path.read_text()
    assert not [name for name in ("root", "tmp", "home", "work") if f"/{name}/" in text] and "file:" not in text
    assert path.stat().st_size < 1_000_000
    for cell in code:
        for node in ast.walk(ast.parse(cell.source)):
            private = isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
            assert not private, f"{node.attr} is private"


def test_the_package_needs_no_notebook():
    for path in (ROOT / "spectra_jax").rglob("*.py"):
        text = path.read_text()
        assert "notebooks" not in text and "nbclient" not in text, path
