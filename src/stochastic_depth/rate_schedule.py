"""Rates that change in the course of training."""

from typing import Any

from torch import nn

from .schedules import Course, check_steps, rate_factor
from .surgery import branches

__all__ = ["RateSchedule"]


class RateSchedule:
    """Rates of a model's branches over training, driven as a learning rate scheduler is.

    The rates that were set (by ``apply`` or ``branch.p``) are the targets. It sets those of the
    first step at once, and with every :meth:`step` those of the next: a factor in [0, 1] times
    the target, and the target itself, to the bit, where the factor is 1.

    Args:
        model: a model with stochastic depth; it may be wrapped (DistributedDataParallel), before
            or afterwards.
        course: ``"early"``, ``"late"``, ``"linear"``, ``"cosine"``, ``"exponential"``, or a
            function from the number of steps done to a factor in [0, 1]; see
            :func:`stochastic_depth.schedules.rate_factor`.
        steps: how many optimizer steps it takes until the rates stay as they are; None for a
            function.

    Raises:
        TypeError, ValueError: a bad argument; a model without branches.

    Example:
        >>> import torchvision, stochastic_depth as sd
        >>> model = sd.apply(torchvision.models.resnet18(), p=0.5)
        >>> schedule = sd.RateSchedule(model, "linear", steps=10)
        >>> for _ in range(4):  # in the training loop, after optimizer.step()
        ...     schedule.step()
        >>> sd.branches(model)[-1].p
        0.2
        >>> print(schedule.metrics())
        {'factor': 0.4, 'expected_depth': 7.1, 'decided': 0, 'dropped': 0}

    Reference:
        Liu et al., Dropout Reduces Underfitting, ICML 2023 (arXiv:2303.01500).
    """

    def __init__(self, model: nn.Module, course: Course, steps: int | None = None) -> None:
        check_steps(course, steps)
        self.course = course
        self.steps = steps
        self.steps_done = 0
        self._branches = branches(model)
        if not self._branches:
            raise ValueError("model has no stochastic depth: apply it first (sd.apply)")
        self._set_rates()

    @property
    def factor(self) -> float:
        """What the targets are multiplied with now."""
        return rate_factor(self.course, self.steps_done, self.steps)

    def step(self) -> None:
        """Set the rates of the next step; call it after each ``optimizer.step()``.

        Raises:
            RuntimeError: the branches are no longer those of the model.
        """
        self.steps_done += 1
        self._set_rates()

    def _set_rates(self) -> None:
        if not all(branch.applied for branch in self._branches):
            raise RuntimeError(
                "stochastic depth was removed or applied anew since this RateSchedule was made; "
                "make another one"
            )
        factor = self.factor
        for branch in self._branches:
            branch._state.p, branch._state.target = factor * branch.target, branch.target

    def metrics(self) -> dict[str, float]:
        """What to log: the factor, the sum of 1-p, and what was decided and dropped so far.

        Calls are counted, or rows in the modes that choose rows, of all branches since applied.
        """
        return {
            "factor": self.factor,
            "expected_depth": sum(1.0 - branch.p for branch in self._branches),
            "decided": sum(branch.decided for branch in self._branches),
            "dropped": sum(branch.dropped for branch in self._branches),
        }

    def state_dict(self) -> dict[str, Any]:
        """Steps done, targets and counts; the course is not in it, make the schedule with it."""
        return {
            "steps_done": self.steps_done,
            "targets": [branch.target for branch in self._branches],
            "decided": [branch.decided for branch in self._branches],
            "dropped": [branch.dropped for branch in self._branches],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`.

        Raises:
            ValueError: it is that of a model with another number of branches.
        """
        count = len(state["targets"])
        if count != len(self._branches):
            raise ValueError(
                f"state is that of a model with {count} branches, and this one has "
                f"{len(self._branches)}: apply with the same arguments as before"
            )
        self.steps_done = state["steps_done"]
        columns = (state[key] for key in ("targets", "decided", "dropped"))
        for branch, target, decided, dropped in zip(self._branches, *columns, strict=True):
            branch.p = target
            branch._state.decided, branch._state.dropped = decided, dropped
        self._set_rates()
