"""What the callbacks of all engines share."""

from typing import Any

from torch import nn

from ..rate_schedule import RateSchedule
from ..schedules import Course
from ..surgery import apply, branches

__all__ = ["ensure_applied", "metrics", "schedule"]


def ensure_applied(model: nn.Module, options: dict[str, Any]) -> None:
    """Apply stochastic depth with ``options``, unless ``model`` has it already.

    Raises:
        ValueError: it has it, and there are options, which would have no effect.
    """
    if not branches(model):
        apply(model, **options)
    elif options:
        raise ValueError(
            f"the model has stochastic depth already, so {', '.join(options)} would have no "
            "effect: give them to sd.apply alone or to the callback alone"
        )


def schedule(
    model: nn.Module, course: Course | None, steps: int | None, all_steps: int
) -> RateSchedule:
    """The rates over training, in ``all_steps`` by default; where ``course`` is None they stay."""
    if course is None:
        return RateSchedule(model, _constant)
    return RateSchedule(
        model, course, all_steps if steps is None and isinstance(course, str) else steps
    )


def _constant(step: int) -> float:
    return 1.0


def metrics(schedule: RateSchedule) -> dict[str, float]:
    """What to log, by name."""
    return {f"stochastic_depth/{key}": float(v) for key, v in schedule.metrics().items()}
