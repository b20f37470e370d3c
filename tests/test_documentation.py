"""Every block of code in the documentation runs, and prints what it says."""

import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

import stochastic_depth as sd

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
READER = Sybil(parsers=[PythonCodeBlockParser(doctest_optionflags=FLAGS), SkipParser()])


def run_page(page: Path) -> int:
    """Run the Python blocks of a page, one after the other; their number."""
    document = READER.parse(page)
    examples = list(document.examples())
    for example in examples:
        example.evaluate()
    return len(examples)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_on_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = page.read_text(encoding="utf-8").count("```python")
    assert run_page(page) >= blocks


@pytest.mark.parametrize(
    "code",
    ["import stochastic_depth as sd\nsd.no_such_name", ">>> 1 + 1\n3"],
    ids=["error", "other output"],
)
def test_a_wrong_block_would_be_noticed(code: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n```python\n{code}\n```\n", encoding="utf-8")
    with pytest.raises(Exception, match=r"no_such_name|Expected:"):
        run_page(page)


def find_docstrings() -> dict[str, doctest.DocTest]:
    """The examples in all docstrings of the library, by name."""
    names = [m.name for m in pkgutil.walk_packages(sd.__path__, f"{sd.__name__}.")]
    found: dict[str, doctest.DocTest] = {}
    for name in [sd.__name__, *names]:
        module = importlib.import_module(name)
        for test in doctest.DocTestFinder(exclude_empty=True).find(module, name, globs={}):
            if test.examples:
                found[test.name] = test
    return found


DOCSTRINGS = find_docstrings()


@pytest.mark.parametrize("name", DOCSTRINGS)
def test_the_example_of_a_docstring_runs(name: str) -> None:
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    result = runner.run(DOCSTRINGS[name], out=report.append)
    assert result.attempted > 0
    assert result.failed == 0, "".join(report)


VERBS = [name for name in sd.__all__ if inspect.isfunction(getattr(sd, name))]


@pytest.mark.parametrize("name", [*VERBS, "StochasticDepth"])
def test_every_public_verb_has_an_example(name: str) -> None:
    public = getattr(sd, name)
    assert f"{public.__module__}.{public.__qualname__}" in DOCSTRINGS


def test_the_public_verbs_are_those_that_the_documentation_is_about() -> None:
    assert {"apply", "branches", "remove", "residual", "summary"} <= set(VERBS)
