"""Drop rates over depth and over training: pure functions, and the schedule that drives them."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, get_args

from torch import nn

from .applied import awaited, branches, draws_of
from .branch import Branch, check_p

__all__ = [
    "DepthSchedule",
    "RateSchedule",
    "TimeSchedule",
    "check_steps",
    "depth_rates",
    "rate_factor",
]

NamedDepth = Literal["linear", "linear-timm", "linear-efficientnet", "uniform", "alternating"]
DepthSchedule = NamedDepth | Callable[[int, int], float] | Sequence[float]

NamedTime = Literal["early", "falling", "plateau", "late", "linear", "cosine", "exponential"]
TimeSchedule = NamedTime | Callable[[int], float]


def depth_rates(schedule: DepthSchedule, p: float | None, depth: int) -> list[float]:
    """The drop probability of each of ``depth`` blocks, from the first to the last.

    Args:
        schedule: how the rate grows with the depth l = 1..L, where L is ``depth``:

            - ``"linear"``: p l/L, the paper's: the last block has p;
            - ``"linear-timm"``: p (l-1)/(L-1), of timm and most of torchvision: the first
              block has 0 and the last p (a single block has p);
            - ``"linear-efficientnet"``: p (l-1)/L, of the EfficientNets: the first has 0, and p
              is never reached;
            - ``"uniform"``: p;
            - ``"alternating"``: 0 for the first block, p for the second, and so on, so that every
              other block can be left out later;
            - a function of (l, L) that returns the rate, or a list of L rates.
        p: the rate of the named schedules, in [0, 1]; None for a function or a list.
        depth: the number of blocks L, at least 1.

    Raises:
        TypeError, ValueError: a rate outside [0, 1], an unknown name, a list of another length,
            a rate given beside a function or list.

    Example:
        >>> from stochastic_depth.rates import depth_rates
        >>> depth_rates("linear", 0.5, 4)
        [0.125, 0.25, 0.375, 0.5]

    Reference:
        Huang et al., Deep Networks with Stochastic Depth, ECCV 2016 (arXiv:1603.09382), eq. 4;
        Elhoushi et al., Don't Drop Dropout, ICML 2026 (arXiv:2609.05275), for alternating rates.
    """
    levels = range(1, depth + 1)
    if isinstance(schedule, str):
        if schedule not in get_args(NamedDepth):
            raise ValueError(
                f"schedule must be one of {get_args(NamedDepth)}, a function (l, L) -> p or a "
                f"list of {depth} rates, got {schedule!r}"
            )
        if p is None:
            raise TypeError(f"p must be a number in [0, 1] for schedule={schedule!r}, got None")
        p = check_p(p)
        if schedule == "linear":
            return [p * (level / depth) for level in levels]
        if schedule == "linear-timm":
            return [p * ((level - 1) / (depth - 1)) if depth > 1 else p for level in levels]
        if schedule == "linear-efficientnet":
            return [p * ((level - 1) / depth) for level in levels]
        if schedule == "alternating":
            return [p if level % 2 == 0 else 0.0 for level in levels]
        return [p] * depth
    if p is not None:
        raise ValueError(
            f"p={p!r} and a schedule that sets the rates itself: give p with a named schedule, and "
            "p=None with a function or a list"
        )
    if callable(schedule):
        return [check_p(schedule(level, depth), f"schedule({level}, {depth})") for level in levels]
    if not isinstance(schedule, Sequence):
        raise TypeError(
            "schedule must be a name, a function (l, L) -> p or a list of rates, got "
            f"{type(schedule).__name__}"
        )
    if len(schedule) != depth:
        raise ValueError(
            f"schedule has {len(schedule)} rates, but there are {depth} blocks with residual "
            "branches to set"
        )
    rates = cast(Sequence[float], schedule)
    return [check_p(rate, f"schedule[{i}]") for i, rate in enumerate(rates)]


def rate_factor(schedule: TimeSchedule, step: int, steps: int | None = None) -> float:
    """What the target rates are multiplied with after ``step`` optimizer steps, in [0, 1].

    Args:
        schedule: how the rates change over training, where t is ``step`` and T is ``steps``:

            - ``"early"``: 1 - t/T, then 0: early stochastic depth, against underfitting;
            - ``"falling"``: 1 - t/(T-1), then 0: where T is all of training, the last step has
              full depth: the recipe for language models;
            - ``"plateau"``: 1, falling to 0 over the last fifth of T, then 0: where T is short of
              all of training, full depth for the steps after it;
            - ``"late"``: 0, and 1 from step T;
            - ``"linear"``: t/T, then 1: a warm-up;
            - ``"cosine"``: (1 - cos(pi t/T))/2, then 1: a warm-up;
            - ``"exponential"``: 1 - exp(-100 t/T), then 1: progressive layer dropping, whose
              gamma is 100/T;
            - a function of t.
        step: t, at least 0.
        steps: T, at least 1; None for a function.

    Raises:
        TypeError, ValueError: an unknown name, ``step`` below 0, ``steps`` missing or below 1,
            steps given beside a function, or a function's value outside [0, 1].

    Example:
        >>> from stochastic_depth.rates import rate_factor
        >>> [rate_factor("early", step, 4) for step in range(6)]
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]

    Reference:
        Liu et al., Dropout Reduces Underfitting, ICML 2023 (arXiv:2303.01500), for early and late;
        Elhoushi et al., Don't Drop Dropout, ICML 2026 (arXiv:2609.05275), for falling;
        https://github.com/KellerJordan/modded-nanogpt/pull/348 for the plateau;
        Zhang and He, Accelerating Training of Transformer-Based Language Models with Progressive
        Layer Dropping, NeurIPS 2020 (arXiv:2010.13369), for the exponential.
    """
    check_steps(schedule, steps)
    whole = hasattr(step, "__index__") and not isinstance(step, bool)  # numpy's and tensors, too
    if not whole or step < 0:
        raise ValueError(f"step must be a number of optimizer steps, at least 0, got {step!r}")
    step = int(step)
    if callable(schedule):
        return check_p(schedule(step), f"schedule({step})")
    done = min(step / cast(int, steps), 1.0)
    if schedule == "early":
        return 1.0 - done
    if schedule == "falling":
        return 1.0 - min(step / max(cast(int, steps) - 1, 1), 1.0)
    if schedule == "plateau":
        return min(1.0, 5.0 * (1.0 - done))
    if schedule == "late":
        return float(done == 1.0)
    if schedule == "linear" or done == 1.0:
        return done
    if schedule == "cosine":
        return (1.0 - math.cos(math.pi * done)) / 2.0
    return -math.expm1(-100.0 * done)


def check_steps(schedule: TimeSchedule, steps: int | None) -> None:
    """Raise where there is no such schedule over ``steps`` steps."""
    if callable(schedule):
        if steps is not None:
            raise ValueError(
                f"steps={steps!r} and a schedule that is a function of the step: drop it"
            )
        return
    if schedule not in get_args(NamedTime):
        raise ValueError(
            f"schedule must be one of {get_args(NamedTime)} or a function of the step, got "
            f"{schedule!r}"
        )
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(
            f"steps must be the number of optimizer steps that {schedule!r} takes, got {steps!r}"
        )
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps!r}")


class RateSchedule:
    """Change the rates of a model's branches over training, like a learning-rate scheduler.

    The rates you set (by ``apply`` or ``branch.p``) are the targets. Each step's rate is the target
    times a factor in [0, 1]; where the factor is 1, it is the target to the bit. The first step's
    rates are set at once, the next ones by :meth:`step`.

    Args:
        model: a model with stochastic depth; it may be wrapped (DistributedDataParallel), before
            or afterwards.
        schedule: ``"early"``, ``"falling"``, ``"plateau"``, ``"late"``, ``"linear"``, ``"cosine"``,
            ``"exponential"``, or a function from the number of steps done to a factor in [0, 1];
            see :func:`stochastic_depth.rates.rate_factor`.
        steps: the number of optimizer steps after which the rates stay as they are; None for a
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

    def __init__(self, model: nn.Module, schedule: TimeSchedule, steps: int | None = None) -> None:
        check_steps(schedule, steps)
        self.model = model
        self.schedule = schedule
        self.steps = steps
        self.steps_done = 0
        self._draws = draws_of(model)  # of each apply its own
        if not self._draws:
            raise ValueError("model has no stochastic depth: apply it first (sd.apply)")
        self._set_rates()

    @property
    def factor(self) -> float:
        """What the targets are multiplied with now."""
        return rate_factor(self.schedule, self.steps_done, self.steps)

    def step(self) -> None:
        """Set the rates of the next step; call it after each ``optimizer.step()``.

        Raises:
            RuntimeError: the branches are no longer those of the model.
        """
        self.steps_done += 1
        self._set_rates()

    def _set_rates(self) -> None:
        self._refresh()
        factor = self.factor
        for branch in self._branches:
            branch.set_rate(factor * branch.target)
        for first_call in awaited(self.model):
            first_call.factor = factor

    def _refresh(self) -> None:
        """Take in the branches that were only found in the first call."""
        draws = draws_of(self.model)
        if not set(draws) & set(self._draws):
            raise RuntimeError(
                "stochastic depth was removed or applied anew since this RateSchedule was made; "
                "make another one"
            )
        self._draws = draws
        self._branches: list[Branch] = branches(self.model)

    def metrics(self) -> dict[str, float]:
        """What to log: the factor, the sum of 1-p, and what was decided and dropped so far.

        Calls are counted, or samples in the modes that choose samples, of all branches since
        ``apply``.
        """
        own = branches(self.model)
        return {
            "factor": self.factor,
            "expected_depth": sum(1.0 - branch.p for branch in own),
            "decided": sum(branch.decided for branch in own),
            "dropped": sum(branch.dropped for branch in own),
        }

    def state_dict(self) -> dict[str, Any]:
        """The number of steps done. The targets are in ``sd.state_dict(model)``."""
        return {"steps_done": self.steps_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a :meth:`state_dict`, before or after ``sd.load_state_dict``.

        Raises:
            ValueError: it is no such state; nothing is changed.
        """
        if "steps_done" not in state:
            raise ValueError(
                "state has no 'steps_done': give what RateSchedule.state_dict returned"
            )
        rate_factor(self.schedule, state["steps_done"], self.steps)
        self.steps_done = int(state["steps_done"])
        self._set_rates()
