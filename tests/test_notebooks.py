import json
import shutil
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_kept_without_outputs(name):
    cells = json.loads((FOLDER / name).read_text())["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if "outputs" in cell)
    assert any(cell["cell_type"] == "code" for cell in cells)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_run_from_top_to_bottom(name, tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(FOLDER / name, as_version=4)
    copy = shutil.copytree(FOLDER, tmp_path / "notebooks")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "golden").symlink_to(FOLDER.parent / "tests" / "golden")
    nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(copy)}}
    ).execute()
    assert not any(o.output_type == "error" for cell in notebook.cells for o in cell.get("outputs", ()))
