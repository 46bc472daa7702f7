"""docs/tour.ipynb: its code cells run from the first to the last in one process, as Jupyter runs them."""

import ast
import json
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
CELLS = json.loads((ROOT / "docs/tour.ipynb").read_text("utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def run_cell(code: str, names: dict) -> object:
    """Run a cell; the value of its last line, which Jupyter would show."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last else None


def test_it_is_a_notebook_without_outputs():
    for cell in CELLS:
        assert cell["id"] and cell["cell_type"] in ("code", "markdown")
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
    assert len(CODE) >= 8


@pytest.mark.slow
def test_the_notebook_runs_from_a_folder_of_images_to_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    names: dict = {"__name__": "__main__"}
    shown = [run_cell(code, names) for code in CODE]
    assert len(list((tmp_path / "runs/tour/my_images").glob("*.png"))) == 60
    assert sum(len(names[split]) for split in ("train", "val")) == 60
    assert names["ids"].shape == (8, 16) and names["again"].shape == (8, 3, 32, 32)
    assert 0 < names["metrics"]["image_bits"] < 7
    grids = [value for value in shown if isinstance(value, Image.Image)]
    assert [grid.size for grid in grids] == [(338, 66), (270, 66), (270, 66), (518, 128)]
    repeated = names["pipeline"](names["samples"][0].caption, num_images=8, seed=0, cfg_scale=1.0)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(names["rows"][0], repeated, strict=True))
