"""From depth to drop probability: pure functions."""

from collections.abc import Callable, Sequence
from typing import Literal, cast, get_args

from .sampling import check_p

__all__ = ["Schedule", "depth_rates"]

Named = Literal["linear", "linear-timm", "linear-efficientnet", "uniform"]
Schedule = str | Callable[[int, int], float] | Sequence[float]


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
