"""One bar for all runs together."""

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .names import label
from .task import Task
from .training import Variant


class Overall:
    """A bar with the time left; where no one watches a terminal, a line for each epoch."""

    def __init__(self, console: Console, task: Task, seeds: Sequence[int]) -> None:
        self.console = console
        self.settings = task.settings
        self.steps = task.steps()
        self.total = task.cost() * len(seeds)
        self.done = 0.0
        self.seed = 0
        self.variants: Sequence[Variant] = ()
        self.epoch = -1
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f} %"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal or not seeds,
            transient=True,
            speed_estimate_period=120,
        )
        self.line = self.bar.add_task("starting", total=self.total)

    def __enter__(self) -> "Overall":
        self.started = time.monotonic()
        self.bar.start()
        return self

    def __exit__(self, *args: Any) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text)

    def begin(self, seed: int, variants: Sequence[Variant]) -> None:
        """Another seed begins."""
        self.seed, self.variants, self.epoch = seed, variants, -1
        self.before = self.done

    def tick(self, cost: float) -> None:
        """Something was done that costs as much as ``cost`` training batches."""
        self.done = min(self.done + cost, self.total)
        epochs = [len(variant.history) for variant in self.variants]
        done = min(epochs, default=0)
        if done != self.epoch:
            if done and self.epoch >= 0 and not self.console.is_terminal:
                self.say(f"{self.place(done)}: {self.errors()}; {self.left()}")
            self.epoch = done
        shown = self.place(min(done + 1, self.settings.epochs))
        self.bar.update(self.line, completed=self.done, description=shown)

    def place(self, epoch: int) -> str:
        """Which seed and epoch."""
        return f"seed {self.seed + 1} of {self.settings.seeds}, epoch {epoch} of " + str(
            self.settings.epochs
        )

    def errors(self) -> str:
        """The validation errors of the last epoch."""
        found = (
            f"{100 * variant.history[-1]['val_error']:.1f} % {label(variant.p)}"
            for variant in self.variants
        )
        return "validation error " + ", ".join(found)

    def left(self) -> str:
        """The time that is left."""
        seconds = (time.monotonic() - self.started) * (self.total / self.done - 1)
        return (
            f"about {seconds / 60:.0f} min left" if seconds > 90 else f"about {seconds:.0f} s left"
        )
