"""The outcome: a table, sentences, metrics.json and a figure."""

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from .figure import plot
from .files import write_json
from .names import label
from .results import Change, Comparison, Result
from .task import Task


def write_report(results: Sequence[Result], task: Task, folder: Path, console: Console) -> None:
    """Print the table and what it shows, and write metrics.json and curves.png into ``folder``."""
    comparison = Comparison(results)
    noise = task.settings.label_noise
    findings = comparison.findings(noise)
    console.print()
    console.print(table(comparison, task.title()))
    console.print(reading(comparison))
    for finding in [*findings, *comparison.unranked()]:
        console.print(f"\n{finding}")
    write_json(
        folder / "metrics.json",
        {
            "settings": asdict(task.settings),
            "machine": machine(),
            "findings": findings,
            "summary": comparison.summary(),
            "images_left_out": list(task.splits.unreadable),
            "files_ignored": list(task.splits.ignored),
            "warnings": list(task.splits.warnings),
            "results": [asdict(result) for result in results],
        },
    )
    count = len(task.splits.train)  # type: ignore[arg-type]
    plot(comparison, f"{task.title()}, {count:,} training images", noise, folder / "curves.png")


def table(comparison: Comparison, title: str) -> Table:
    """The rates side by side, each with its change against the first."""
    table = Table("", title=title, title_justify="left")
    for p in comparison.by_rate:
        table.add_column(label(p), justify="right", no_wrap=True)
        if p != comparison.reference:
            table.add_column("change", justify="right", no_wrap=True)
    for quantity in comparison.quantities:
        cells = []
        for p in comparison.by_rate:
            mean = Change(tuple(comparison.values(quantity, p))).mean
            cells.append(f"{mean:.{quantity.decimals}f}")
            if p != comparison.reference:
                change = comparison.change(quantity, p)
                if quantity.ratio:
                    cells.append(change.text(2, "") + " ×")
                else:
                    cells.append(change.text(max(quantity.decimals, 1)))
        table.add_row(quantity.name, *cells)
    return table


def reading(comparison: Comparison) -> str:
    """How to read the table."""
    seeds, found = comparison.seeds, machine()
    text = f"{seeds} seed{'s'[: seeds > 1]}; "
    if comparison.others:
        text += "changes are against the first column, "
        text += "paired by seed, ± half a 95 % interval; " if seeds > 1 else "of one seed; "
        text += "all rates saw the same batches from the same start, and were trained by turns; "
    return text + (
        "the time per step is the mean of the middle half of all steps "
        f"({found['cpu']}, {found['threads']} thread{'s'[: found['threads'] != '1']}). "
        "With branches left out, the test error is that of the chosen epoch, and those go first "
        "without which the loss on validation images is least."
    )


def machine() -> dict[str, str]:
    """What the times depend on."""
    return {
        "cpu": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
