"""From depth, and from the step of training, to drop probability: pure functions."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, cast, get_args

from .sampling import check_p

__all__ = ["Course", "Schedule", "check_steps", "depth_rates", "rate_factor"]

Named = Literal["linear", "linear-timm", "linear-efficientnet", "uniform"]
Schedule = str | Callable[[int, int], float] | Sequence[float]

NamedCourse = Literal["early", "late", "linear", "cosine", "exponential"]
Course = str | Callable[[int], float]


def depth_rates(schedule: Schedule, p: float | None, depth: int) -> list[float]:
    """The drop probability of each of ``depth`` blocks, from the first to the last.

    Args:
        schedule: how the rate grows with the depth l = 1..L, where L is ``depth``:

            - ``"linear"``: p l/L, the paper's: the last block has p;
            - ``"linear-timm"``: p (l-1)/(L-1), of timm and most of torchvision: the first
              block has 0 and the last p (a single block has p);
            - ``"linear-efficientnet"``: p (l-1)/L, of the EfficientNets: the first has 0, and p
              is never reached;
            - ``"uniform"``: p;
            - a function of (l, L) that returns the rate, or a list of L rates.
        p: the rate of the named schedules, in [0, 1]; None is 0.2. The others need none.
        depth: the number of blocks L, at least 1.

    Raises:
        TypeError, ValueError: a rate outside [0, 1], an unknown name, a list of another length,
            a rate given beside a function or list.

    Example:
        >>> from stochastic_depth.schedules import depth_rates
        >>> depth_rates("linear", 0.5, 4)
        [0.125, 0.25, 0.375, 0.5]

    Reference:
        Huang et al., Deep Networks with Stochastic Depth, ECCV 2016 (arXiv:1603.09382), eq. 4.
    """
    levels = range(1, depth + 1)
    if isinstance(schedule, str):
        if schedule not in get_args(Named):
            raise ValueError(
                f"schedule must be one of {get_args(Named)}, 'model', a function (l, L) -> p or a "
                f"list of {depth} rates, got {schedule!r}"
            )
        p = check_p(0.2 if p is None else p)
        if schedule == "linear":
            return [p * (level / depth) for level in levels]
        if schedule == "linear-timm":
            return [p * ((level - 1) / (depth - 1)) if depth > 1 else p for level in levels]
        if schedule == "linear-efficientnet":
            return [p * ((level - 1) / depth) for level in levels]
        return [p] * depth
    if p is not None:
        raise ValueError(
            f"p={p!r} and a schedule that sets the rates itself: give p with a named schedule, or "
            "the function or list alone"
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


def rate_factor(course: Course, step: int, steps: int | None = None) -> float:
    """What the target rates are multiplied with after ``step`` optimizer steps, in [0, 1].

    Args:
        course: how the rates go on over training, where t is ``step`` and T is ``steps``:

            - ``"early"``: 1 - t/T, then 0: early stochastic depth, against underfitting;
            - ``"late"``: 0, and 1 from step T;
            - ``"linear"``: t/T, then 1: a warm-up;
            - ``"cosine"``: (1 - cos(pi t/T))/2, then 1: a warm-up;
            - ``"exponential"``: 1 - exp(-100 t/T), then 1: progressive layer dropping, whose
              gamma is 100/T;
            - a function of t.
        step: t, at least 0.
        steps: T, at least 1; None for a function.

    Raises:
        TypeError, ValueError: an unknown name, ``steps`` missing or below 1, steps given beside a
            function, or a function's value outside [0, 1].

    Example:
        >>> from stochastic_depth.schedules import rate_factor
        >>> [rate_factor("early", step, 4) for step in range(6)]
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]

    Reference:
        Liu et al., Dropout Reduces Underfitting, ICML 2023 (arXiv:2303.01500), for early and late;
        Zhang and He, Accelerating Training of Transformer-Based Language Models with Progressive
        Layer Dropping, NeurIPS 2020 (arXiv:2010.13369), for the exponential.
    """
    check_steps(course, steps)
    if callable(course):
        return check_p(course(step), f"course({step})")
    done = min(step / cast(int, steps), 1.0)
    if course == "early":
        return 1.0 - done
    if course == "late":
        return float(done == 1.0)
    if course == "linear" or done == 1.0:
        return done
    if course == "cosine":
        return (1.0 - math.cos(math.pi * done)) / 2.0
    return -math.expm1(-100.0 * done)


def check_steps(course: Course, steps: int | None) -> None:
    """Raise where there is no such course over ``steps`` steps."""
    if callable(course):
        if steps is not None:
            raise ValueError(
                f"steps={steps!r} and a course that is a function of the step: drop it"
            )
        return
    if course not in get_args(NamedCourse):
        raise ValueError(
            f"course must be one of {get_args(NamedCourse)} or a function of the step, got "
            f"{course!r}"
        )
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(
            f"steps must be the number of optimizer steps that {course!r} takes, got {steps!r}"
        )
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps!r}")
