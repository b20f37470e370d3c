"""What the callbacks of all engines share."""

from typing import Any

import torch
from torch import nn

from ..executor import installed
from ..rate_schedule import RateSchedule
from ..schedules import Course
from ..surgery import apply, branches

__all__ = ["ensure_applied", "generator_states", "metrics", "schedule", "set_generator_states"]


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


def generator_states(model: nn.Module) -> list[torch.Tensor]:
    """The states of the model's own generators, if it was applied with a seed."""
    return [generator.get_state() for generator in _generators(model)]


def set_generator_states(model: nn.Module, states: list[torch.Tensor]) -> None:
    """Go on from :func:`generator_states`."""
    for generator, state in zip(_generators(model), states, strict=True):
        generator.set_state(state)


def _generators(model: nn.Module) -> list[torch.Generator]:
    forwards = filter(None, map(installed, model.modules()))
    return list({f.generator: None for f in forwards if f.generator is not None})
