"""What all experiments share: runs that are kept, tables with paired intervals, and the page."""

import argparse
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from stochastic_depth.cli.files import write_json
from stochastic_depth.cli.report import machine
from stochastic_depth.cli.statistics import half_width, middle_mean

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
SIZES = ("tiny", "small", "large")
LABELS = {
    "tiny": "**A tiny run, which shows that the command works and nothing else.**",
    "small": "Run on a CPU.",
    "large": "Run at the larger size.",
}
STYLES = (  # Okabe and Ito's colours, which colour-blind readers can tell apart
    ("#000000", "o"),
    ("#0072B2", "s"),
    ("#D55E00", "^"),
    ("#009E73", "D"),
    ("#CC79A7", "v"),
    ("#E69F00", "P"),
    ("#56B4E9", "X"),
)
PACKAGES = ("torch", "torchvision", "timm", "transformers", "lightning", "stochastic-depth")
PLUS_MINUS = "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"
Numbers = dict[str, float]


@dataclass
class Store:
    """The numbers of all runs of an experiment at one size, in a file of their own."""

    name: str
    size: str
    runs: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return RESULTS / f"{self.name}-{self.size}.json"

    def load(self) -> "Store":
        if self.path.is_file():
            self.runs = json.loads(self.path.read_text())["runs"]
        return self

    def get(self, key: str, run: Callable[[], Any]) -> Any:
        """What the run of that name gave, now or before."""
        if key not in self.runs:
            started = time.monotonic()
            print(f"{self.name}: {key} ...", flush=True)
            self.runs[key] = run()
            self.path.parent.mkdir(exist_ok=True)
            made_by = {"machine": machine(), "versions": versions()}
            write_json(self.path, {**made_by, "size": self.size, "runs": self.runs})
            print(f"{self.name}: {key}: {time.monotonic() - started:.0f} s", flush=True)
        return self.runs[key]


def arguments(description: str | None, seeds: int) -> tuple[str, int]:
    """The size and the number of seeds that were asked for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--size", choices=SIZES, default="small", help="tiny shows that it works; default: small"
    )
    parser.add_argument("--seeds", type=int, help=f"default: {seeds}, or 2 if tiny")
    given = parser.parse_args()
    return given.size, given.seeds or (2 if given.size == "tiny" else seeds)


def versions() -> dict[str, str]:
    """What the numbers depend on besides the machine."""
    return {name: version(name) for name in PACKAGES}


def device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train_by_turns(
    models: dict[str, nn.Module],
    batches: Iterable[tuple[Any, torch.Tensor]],
    loss: Callable[[nn.Module, Any, torch.Tensor], torch.Tensor],
    steps: int,
    lr: float,
    seed: int,
) -> dict[str, float]:
    """Train all models on the same batches, by turns; the seconds per step of each.

    AdamW and one cycle of the learning rate. All draw the same random numbers in a step.
    """
    names = list(models)
    optimizers = {
        name: torch.optim.AdamW(models[name].parameters(), lr, fused=True) for name in names
    }
    schedules = {
        name: torch.optim.lr_scheduler.OneCycleLR(o, lr, total_steps=steps, cycle_momentum=False)
        for name, o in optimizers.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for step, (inputs, labels) in enumerate(itertools.islice(batches, steps)):
        turn = step % len(names)
        for name in names[turn:] + names[:turn]:
            torch.manual_seed(1_000_003 * seed + step)
            started = time.perf_counter()
            optimizers[name].zero_grad()
            loss(models[name], inputs, labels).backward()
            optimizers[name].step()
            schedules[name].step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: middle_mean(found) for name, found in seconds.items()}


def mean(values: Sequence[float], decimals: int) -> str:
    """A mean."""
    return f"{fmean(values):.{decimals}f}".replace("-", "−")


def change(values: Sequence[float], reference: Sequence[float], decimals: int) -> str:
    """The mean of paired differences, and half its 95 % interval."""
    differences = [a - b for a, b in zip(values, reference, strict=True)]
    text = f"{fmean(differences):+.{decimals}f}"
    half = half_width(differences)
    text += "" if half is None else f"{PLUS_MINUS}{half:.{decimals}f}"
    return text.replace("-", "−")


def ratio(values: Sequence[float], reference: Sequence[float]) -> str:
    """The mean of paired ratios, and half its 95 % interval."""
    ratios = [a / b for a, b in zip(values, reference, strict=True)]
    half = half_width(ratios)
    return f"{fmean(ratios):.2f}" + ("" if half is None else f"{PLUS_MINUS}{half:.2f}")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def axes(count: int, title: str, **shared: bool) -> tuple[Any, Any]:
    """A figure of the width of a page, with panels side by side that may share their axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.9), layout="constrained", dpi=100)
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(1, count, squeeze=False, **shared)[0]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def draw_pairs(panel: Any, by_arm: dict[str, list[float]]) -> None:
    """Each arm's values side by side, the ones of a seed joined by a line, and their mean."""
    columns = list(by_arm.values())
    for values in zip(*columns, strict=True):
        panel.plot(range(len(columns)), values, color="#999999", linewidth=0.7, zorder=0)
    for place, values in enumerate(columns):
        colour, marker = STYLES[place]
        panel.plot([place] * len(values), values, marker, color=colour, alpha=0.6)
        panel.plot((place - 0.2, place + 0.2), [fmean(values)] * 2, color=colour, linewidth=2.5)
    panel.set_xticks(range(len(columns)), list(by_arm))
    panel.set_xlim(-0.5, len(columns) - 0.5)


def draw_curve(
    panel: Any, x: Sequence[float], y: Sequence[Sequence[float]], place: int, name: str
) -> None:
    """The means at each x as a thick line, and each seed as a thin one."""
    colour, marker = STYLES[place]
    for seed in zip(*y, strict=True):
        panel.plot(x, seed, color=colour, linewidth=0.7, alpha=0.5)
    means = [fmean(values) for values in y]
    panel.plot(x, means, color=colour, linewidth=2, marker=marker, label=name)


def write_section(store: Store, title: str, text: str, figure: Any) -> None:
    """Put a section into the page, in place of the one of that name."""
    image = DOCS / "images" / f"evidence-{store.name}.png"
    image.parent.mkdir(exist_ok=True)
    figure.savefig(image)
    kept = json.loads(store.path.read_text())
    names = ", ".join(f"{name} {number}" for name, number in kept["versions"].items())
    on = kept["machine"]
    section = (
        f"<!-- {store.name} -->\n## {title}\n\n{LABELS[store.size]} `python -m "
        f"experiments.{store.name}{'' if store.size == 'small' else ' --size ' + store.size}`; "
        f"{on['cpu']}, {on['threads']} thread{'s'[: on['threads'] != '1']}, Python "
        f"{on['python']}, {names}. All seeds' numbers are in "
        f"`experiments/results/{store.path.name}`.\n\n{text}\n\n"
        f"![{title}](images/{image.name})\n<!-- /{store.name} -->"
    )
    page = DOCS / "evidence.md"
    content = page.read_text()
    found = re.compile(rf"<!-- {store.name} -->.*<!-- /{store.name} -->", re.DOTALL)
    if not found.search(content):
        raise SystemExit(f"{page} has no section '{store.name}': add its two comments")
    page.write_text(found.sub(lambda _: section, content))
    print(f"{page}: section '{store.name}' written")
