"""A bar where passes take long: a function of yours, rich's or tqdm's, or none."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Progress", "told"]

Progress = bool | Callable[[int, int], Any]


@contextmanager
def told(progress: Progress, total: int) -> Iterator[Callable[[], None]]:
    """What is called after each of ``total`` passes."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if callable(progress):
            progress(done, total)
        elif update is not None:
            update()

    update: Callable[[], Any] | None = None
    if progress is not True:
        yield step
        return
    try:
        from rich.progress import Progress as Bar
    except ImportError:
        try:
            from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]
        except ImportError:
            yield step
            return
        with tqdm(total=total, desc="importance") as plain:
            update = plain.update
            yield step
        return
    with Bar() as bar:
        task = bar.add_task("importance", total=total)
        update = lambda: bar.advance(task)  # noqa: E731
        yield step
