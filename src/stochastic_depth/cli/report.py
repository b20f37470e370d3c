"""The outcome: a table, metrics.json, and the curves."""

import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

WITHOUT, WITH = "without", "with"
COLOURS = {WITHOUT: "tab:gray", WITH: "tab:blue"}


@dataclass(frozen=True)
class Result:
    """What one arm of one seed gave; errors are shares of images, times are seconds."""

    seed: int
    arm: str
    test_error: float
    test_loss: float
    step_seconds: float
    expected_depth: float
    realised_depth: float
    history: list[dict[str, float]]

    def line(self) -> str:
        """The result in one line."""
        return (
            f"seed {self.seed} {self.arm:>7}: test error {100 * self.test_error:.2f} %, "
            f"{1000 * self.step_seconds:.0f} ms a step, depth {self.realised_depth:.2f}"
        )


@dataclass(frozen=True)
class Quantity:
    """A row of the table."""

    name: str
    value: Callable[[Result], float]
    decimals: int
    ratio: bool = False


QUANTITIES = (
    Quantity("test error, %", lambda result: 100 * result.test_error, 2),
    Quantity("validation error, %", lambda result: 100 * result.history[-1]["val_error"], 2),
    Quantity("time a step, ms", lambda result: 1000 * result.step_seconds, 1, ratio=True),
    Quantity("expected depth", lambda result: result.expected_depth, 2),
    Quantity("realised depth", lambda result: result.realised_depth, 2),
)


def write_report(
    results: Sequence[Result],
    settings: dict[str, Any],
    skipped: Sequence[str],
    folder: Path,
    console: Console,
) -> None:
    """Print the table and write metrics.json and curves.png into ``folder``."""
    arms = {
        arm: found
        for arm in (WITHOUT, WITH)
        if (found := [result for result in results if result.arm == arm])
    }
    console.print()
    console.print(table(arms))
    console.print(reading(arms))
    metrics = {
        "settings": settings,
        "machine": machine(),
        "summary": summary(arms),
        "skipped_images": list(skipped),
        "runs": [asdict(result) for result in results],
    }
    write_json(folder / "metrics.json", metrics)
    plot(arms, folder / "curves.png")
    console.print(f"\n{folder}/: metrics.json, curves.png, and model.pt of every run")


def table(arms: dict[str, list[Result]]) -> Table:
    """The arms side by side."""
    table = Table("", title="stochastic depth")
    for arm in arms:
        table.add_column(arm, justify="right", no_wrap=True)
    if len(arms) > 1:
        table.add_column("change", justify="right", no_wrap=True)
    for quantity in QUANTITIES:
        cells = [spread(values(quantity, runs), quantity.decimals) for runs in arms.values()]
        if len(arms) > 1:
            change = changes(quantity, arms)
            cells.append(spread(change, 2) + " ×" if quantity.ratio else spread(change, 2, "+"))
        table.add_row(quantity.name, *cells)
    return table


def reading(arms: dict[str, list[Result]]) -> str:
    """How to read the table, and what it shows of the error."""
    seeds = len(arms[WITH])
    text = (
        f"{'Mean ± standard deviation over ' if seeds > 1 else ''}{seeds} seed{'s'[: seeds > 1]}. "
        f"A step's time is the median of a run, on this machine ({machine()['cpu']}, "
        f"threads: {torch.get_num_threads()}). Errors are those of the last epoch."
    )
    if len(arms) == 1:
        return text
    change = changes(QUANTITIES[0], arms)
    better = sum(value < 0 for value in change)
    verdict = f"Test error was lower with stochastic depth in {better} of {seeds} seeds"
    if seeds == 1:
        verdict += "; one seed shows no more than that."
    elif abs(statistics.fmean(change)) <= statistics.stdev(change):
        verdict += "; the difference is within its own spread over the seeds."
    else:
        verdict += "; the difference is larger than its own spread over the seeds."
    return f"{text}\nBoth arms saw the same batches from the same start. {verdict}"


def summary(arms: dict[str, list[Result]]) -> dict[str, dict[str, list[float]]]:
    """The table's values, one for each seed."""
    rows = {
        quantity.name: {arm: values(quantity, runs) for arm, runs in arms.items()}
        for quantity in QUANTITIES
    }
    if len(arms) > 1:
        for quantity in QUANTITIES:
            name = "ratio" if quantity.ratio else "difference"
            rows[quantity.name][name] = changes(quantity, arms)
    return rows


def values(quantity: Quantity, runs: Sequence[Result]) -> list[float]:
    """The quantity in each run, by seed."""
    return [quantity.value(run) for run in sorted(runs, key=lambda run: run.seed)]


def changes(quantity: Quantity, arms: dict[str, list[Result]]) -> list[float]:
    """With against without, seed by seed."""
    pairs = zip(values(quantity, arms[WITH]), values(quantity, arms[WITHOUT]), strict=True)
    return [a / b if quantity.ratio else a - b for a, b in pairs]


def spread(found: Sequence[float], decimals: int, sign: str = "") -> str:
    """Mean ± standard deviation."""
    text = f"{statistics.fmean(found):{sign}.{decimals}f}"
    return text if len(found) == 1 else f"{text} ± {statistics.stdev(found):.{decimals}f}"


def machine() -> dict[str, str]:
    """What the times depend on."""
    return {
        "cpu": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def plot(arms: dict[str, list[Result]], path: Path) -> None:
    """Training loss, error and time a step: a thin line or point a run, a thick one the mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained", dpi=100)
    loss, error, step = figure.subplots(1, 3)
    for place, (arm, runs) in enumerate(arms.items()):
        colour = COLOURS[arm]
        for axes, key, scale in ((loss, "train_loss", 1), (error, "val_error", 100)):
            curves = [[scale * epoch[key] for epoch in run.history] for run in runs]
            epochs = range(1, len(curves[0]) + 1)
            for curve in curves:
                axes.plot(epochs, curve, color=colour, linewidth=0.8, alpha=0.5)
            mean = [statistics.fmean(column) for column in zip(*curves, strict=True)]
            axes.plot(epochs, mean, color=colour, linewidth=2.5, marker="o", label=arm)
            axes.set_xticks(epochs)
            axes.set_xlabel("epoch")
        times = [1000 * run.step_seconds for run in runs]
        step.plot([place] * len(times), times, "o", color=colour, alpha=0.6)
        step.hlines(statistics.fmean(times), place - 0.2, place + 0.2, color=colour, linewidth=2.5)
    loss.set_title("training loss")
    error.set_title("validation error, %")
    step.set_title("time a step, ms")
    step.set_xticks(range(len(arms)), list(arms))
    step.set_xlim(-0.6, len(arms) - 0.4)
    step.set_ylim(bottom=0)
    error.legend(title="stochastic depth", frameon=False)
    for axes in (loss, error, step):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write all of the file or nothing."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    draft.replace(path)
