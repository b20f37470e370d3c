"""Every block of code in the documentation runs, and prints what it says."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
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


# Links, and what a page has to have.

LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")


def anchors(page: Path) -> set[str]:
    """Where links into a page can lead: its headings, as GitHub and MyST name them, and labels."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#{1,3} (.+)$", text, flags=re.M)
    slugs = {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}
    return slugs | set(re.findall(r"^\(([\w-]+)\)=$", text, flags=re.M))


def dead_links(page: Path) -> list[str]:
    """The links and pictures of a page that lead nowhere."""
    dead = []
    for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = (page.parent / path) if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(f"{path}#{anchor}")
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_internal_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page) == []


def test_a_dead_link_would_be_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n[a](nowhere.md) [b](#a-page) [c](#nowhere)\n", encoding="utf-8")
    assert dead_links(page) == ["nowhere.md#", "#nowhere"]


def test_every_page_is_in_the_contents() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = re.findall(r"^(\w+)$", index, flags=re.M)
    assert sorted([*listed, "index"]) == sorted(path.stem for path in (ROOT / "docs").glob("*.md"))


def test_every_public_name_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    described = re.findall(r"^\.\. (?:auto\w+|py:data):: ([\w.]+)", page, flags=re.M)
    own = [name for name in described if "." not in name]
    assert sorted(own) == sorted(sd.__all__)


# Troubleshooting.

ELSEWHERE = {"cli", "__main__.py"}  # the command line says what to do in its messages


def messages() -> dict[str, str]:
    """All warnings and runtime errors of the library: where they are, and their constant text."""
    found = {}
    for path in sorted((ROOT / "src" / "stochastic_depth").rglob("*.py")):
        if ELSEWHERE & set(path.parts):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            name = ast.unparse(call.func)
            if name == "warnings.warn" or name == "RuntimeError" or name.endswith("._run.error"):
                said = call.args[0]
                said = constants.get(said.id, said) if isinstance(said, ast.Name) else said
                texts = [n.value for n in ast.walk(said) if isinstance(n, ast.Constant)]
                found[f"{path.name}:{node.lineno}"] = " ".join(str(text) for text in texts)
    # Some only pass on what another place says.
    return {place: text for place, text in found.items() if len(text.split()) > 4}


MESSAGES = messages()


@pytest.mark.parametrize("place", MESSAGES)
def test_troubleshooting_explains_every_warning_and_runtime_error(place: str) -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [
        part.strip()
        for quote in re.findall(r"\*([^*|]+)\*", page)
        for part in quote.split("…")
        if len(part.split()) >= 4
    ]
    assert any(quote in MESSAGES[place] for quote in quoted), MESSAGES[place]


def test_the_messages_are_those_of_the_library() -> None:
    assert len(MESSAGES) > 15
