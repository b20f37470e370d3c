"""What the callbacks of all engines share."""

from typing import Any

from torch import nn

from ..applied import branches, is_applied
from ..apply import apply
from ..rates import RateSchedule, TimeSchedule

__all__ = ["ensure_applied", "metrics", "rate_schedule"]


def ensure_applied(model: nn.Module, options: dict[str, Any]) -> None:
    """Apply stochastic depth with ``options``, unless ``model`` has it already.

    Raises:
        ValueError: it has it, and there are options, which would have no effect.
    """
    if not is_applied(model) and (options or not branches(model)):
        if "p" not in options:
            raise ValueError("the model has no stochastic depth: give p, or apply it first")
        apply(model, **options)
    elif options:
        raise ValueError(
            f"the model has stochastic depth already, so {', '.join(options)} would have no "
            "effect: give them to sd.apply alone or to the callback alone"
        )


def rate_schedule(
    model: nn.Module, schedule: TimeSchedule | None, steps: int | None, all_steps: int | None
) -> RateSchedule:
    """The rates over training, in ``all_steps`` by default; as they are where there is no schedule.

    Raises:
        ValueError: the training has no end that is known, and no ``steps`` are given.
    """
    if schedule is None:
        return _AsTheyAre(model, _constant)
    if steps is None and isinstance(schedule, str):
        if all_steps is None:
            raise ValueError(
                f"schedule={schedule!r} needs to know how long training takes, and this one has no "
                "end: give steps"
            )
        steps = all_steps
    return RateSchedule(model, schedule, steps)


def _constant(step: int) -> float:
    return 1.0


class _AsTheyAre(RateSchedule):
    """Leaves rates to whoever else sets them, and logs what they are."""

    def _set_rates(self) -> None:
        self._refresh()

    @property
    def factor(self) -> float:
        """The share of the targets that the rates are now, all together."""
        targets = sum(branch.target for branch in self._branches)
        return sum(branch.p for branch in self._branches) / targets if targets else 1.0


def metrics(schedule: RateSchedule) -> dict[str, float]:
    """What to log, by name."""
    return {f"stochastic_depth/{key}": float(v) for key, v in schedule.metrics().items()}
