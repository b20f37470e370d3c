"""The quickstart notebook runs from its first cell to its last, at a small size."""

import ast
import json
import re
from pathlib import Path

import matplotlib
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
SMALL = "STEPS, BLOCKS, IMAGES = 8, 4, 64"


def cells(kind: str) -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def run(source: str, names: dict[str, object]) -> object:
    """Run a cell as notebooks do: the value of a last line that is an expression is its output."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(NOTEBOOK), "exec"), names)
    return last and eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names)


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    first, *others = cells("code")
    sized, replaced = re.subn(r"STEPS, BLOCKS, IMAGES = [\d, ]+", SMALL + "  ", first)
    assert replaced == 1
    names: dict[str, object] = {}
    shown = [run(source, names) for source in (sized, *others)]
    tables = [x for x in shown if hasattr(x, "_repr_html_")]
    assert len(tables) >= 3  # summary, verify, branches
    assert names["fast"] > 0
    assert sum(branch.dropped for branch in names["sd"].branches(names["model"])) > 0
    assert "all branches:" in capsys.readouterr().out


def test_the_notebook_is_kept_without_output():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell for cell in code if cell["outputs"] or cell["execution_count"]] == []


def test_the_links_of_the_notebook_lead_somewhere():
    links = [link for text in cells("markdown") for link in re.findall(r"\]\(([^)]+)\)", text)]
    assert links
    assert [link for link in links if not (NOTEBOOK.parent / link).is_file()] == []
