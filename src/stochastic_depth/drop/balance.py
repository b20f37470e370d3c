"""Balanced decisions: every step drops equally many branches, each with exactly its own rate.

Systematic sampling with unequal probabilities. Lay an interval of length p_i for every branch end
to end, draw one u ~ U[0, 1), and drop the branches whose intervals contain u + k for a whole
number k. Then every branch drops with its own p_i, in whatever order they lie; the number dropped
is the sum of the rates, rounded down or up; and which of the two depends on u alone. So ranks that
share u and lay the branches in orders of their own drop equally many, and different ones.

Reference:
    Madow, On the Theory of Systematic Sampling, II, Annals of Mathematical Statistics 20, 1949.
"""

import copy
import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Generator, Tensor

__all__ = [
    "Rounds",
    "Way",
    "balanced_order",
    "chances_to_run",
    "coins",
    "cost_classes",
    "slowest",
    "stream",
]

Way = Literal["independent", "shared", "balanced"]  # how the decisions of several ranks are drawn

ONE = 1 << 53  # lengths, rounded up, and positions are whole parts of 1, so nothing drifts
STEP = int((5**0.5 - 1) / 2 * ONE) | 1  # the golden section of it, odd: no position comes twice
_TOLERANCE = 0.1  # by which part of the highest cost of a class its others may be lower
_STEPS = 200  # that are simulated
_LEAST = 4  # branches of a class, where there are so many


def coins(rates: Sequence[float], order: Sequence[int], u: float) -> list[float]:
    """One number in [0, 1) for each branch, to be dropped where it is below the branch's rate.

    It is the distance from the start of the branch's interval to the next point u + k. Each is
    uniform by itself, so a rate that changes after the draw is exact at once, 0 and 1 included;
    together they are balanced for ``rates``.

    Args:
        rates: the probability to drop of each branch, in [0, 1].
        order: the numbers of the branches, as their intervals lie.
        u: uniform in [0, 1), and independent of the order.
    """
    drawn = [0.0] * len(rates)
    distance = int(u * ONE)
    for i in order:
        drawn[i] = distance / ONE
        distance = (distance - math.ceil(rates[i] * ONE)) % ONE
    return drawn


def cost_classes(costs: Sequence[float]) -> list[int]:
    """The class of each branch, counted from the most costly: those that cost about the same.

    Every class then drops the sum of its own rates to within one, and equally many on all ranks.
    A very small class has hardly any orders: where all costs differ, the same few sets of branches
    would be dropped over and over, on all ranks. So it is filled up with the next in cost.

    Args:
        costs: of each branch, in any unit; the same on all ranks, so counted and not timed.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        group = groups[-1] if groups else []
        if group and (len(group) < _LEAST or costs[i] >= (1.0 - _TOLERANCE) * costs[group[0]]):
            group.append(i)
        else:
            groups.append([i])
    if len(groups) > 1 and len(groups[-1]) < _LEAST:
        groups[-2:] = [groups[-2] + groups[-1]]
    number = {i: g for g, group in enumerate(groups) for i in group}
    return [number[i] for i in range(len(costs))]


def balanced_order(classes: Sequence[int], generator: Generator) -> list[int]:
    """An order of the branches: at random in each class, and the classes always one after another.

    So u alone says how many branches of each class are dropped, on all ranks.
    """
    order: list[int] = torch.randperm(len(classes), generator=generator, device="cpu").tolist()
    return sorted(order, key=classes.__getitem__)


def stream(seed: int) -> Generator:
    """The generator that all ranks have in the same state: u comes from it, and what orders follow.

    torch's CPU generator looks at the lower 32 bits of its seed, hence the digest.
    """
    return Generator().manual_seed(_digest(seed))


def _digest(*numbers: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest())


@dataclass
class _Pass:
    """One run through the model: where it began, its u, its rounds, and who took how many."""

    first: int
    u: float
    orders: int
    taken: list[int]
    rounds: list[list[float]] = field(default_factory=list)


class Rounds:
    """The coins of all branches of a model, drawn in rounds.

    Where a forward begins is seen from who calls: a *pass* begins with a call of the branch with
    which the last one began, or of one before it. In a pass, a branch's n-th call takes its coin of
    round n, and the first to ask for a round draws it, for all branches. Hence

    - a forward that runs several times a step, or a part of the model that is called by itself,
      makes further passes or rounds, and the next whole forward is again one round;
    - a block that runs several times in a pass takes one coin of each of several rounds, while the
      branches that run once share the first;
    - only the rounds of the present pass are kept, whoever has not been called. Where the branch
      with which it began is called no more, one that has taken ``limit`` coins begins the next.

    Whatever is called, and how often, each coin is uniform, so every rate is exact; the calls
    decide only how well balanced the decisions are. The one exception: a branch that runs only
    where another is kept (it is inside) needs rounds of its own, as its coin knows of the other's.

    The generator is asked twice a pass: for u, and for a number from which the orders of each rank
    follow. The u of further rounds follow from the first, in steps of the golden section. So a
    block that ranks run unequally often in a pass does not bring their u apart, and no rank has a
    state of its own to be saved. Each thread has passes of its own; copies and pickles begin with a
    new one.

    Args:
        classes: of each branch, in the order of execution: see :func:`cost_classes`.
        limit: the most rounds of a pass.
    """

    def __init__(self, classes: Sequence[int], limit: int = 64) -> None:
        self.classes = list(classes)
        self.limit = limit
        self._of_thread = threading.local()  # so that no lock is needed

    def __reduce__(self) -> tuple[Any, ...]:
        return Rounds, (self.classes, self.limit)

    def take(
        self, key: int, rates: Callable[[], Sequence[float]], generator: Generator, rank: int
    ) -> float:
        """The coin for a call of a branch, which is dropped where it is below its present rate.

        A branch whose rate is 0 or 1 may take it or not.

        Args:
            key: the number of the branch, in the order of execution.
            rates: tells the present rates of all branches; asked when a round is drawn.
            generator: where u comes from, in the same state on all ranks; see :func:`stream`.
            rank: ranks with different numbers lay the branches in different orders.
        """
        now: _Pass | None = getattr(self._of_thread, "now", None)
        if now is None or key <= now.first or now.taken[key] == self.limit:
            u = torch.rand((), dtype=torch.float64, device="cpu", generator=generator).item()
            orders = int(torch.randint(1 << 62, (), device="cpu", generator=generator))
            now = self._of_thread.now = _Pass(key, u, orders, [0] * len(self.classes))
        n = now.taken[key]
        if n == len(now.rounds):
            u = (int(now.u * ONE) + n * STEP) % ONE / ONE
            own = Generator().manual_seed(_digest(now.orders, rank, n))
            now.rounds.append(coins(rates(), balanced_order(self.classes, own), u))
        now.taken[key] = n + 1
        return now.rounds[n][key]

    def state(self) -> dict[str, Any]:
        """The present pass of this thread, in numbers and lists; empty where there is none."""
        now: _Pass | None = getattr(self._of_thread, "now", None)
        return asdict(now) if now is not None else {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`, of a model with as many branches."""
        if state and len(state["taken"]) != (count := len(self.classes)):
            raise ValueError(
                f"the state is of {len(state['taken'])} branches, and here are {count}"
            )
        self._of_thread.now = _Pass(**copy.deepcopy(state)) if state else None


def slowest(
    rates: Sequence[float],
    costs: Sequence[float],
    ranks: int,
    draw: Way = "independent",
    *,
    classes: Sequence[int] | None = None,
    around: Sequence[int | None] | None = None,
    generator: Generator | None = None,
) -> float:
    """The expected share of the branches' compute that the slowest of ``ranks`` executes a step.

    Computed, but for balanced draws where the costs in a class differ, or branches are inside of
    others: these are simulated.

    Args:
        rates: the probability to drop of each branch.
        costs: of each branch, in any unit.
        ranks: how many take part in a step.
        draw: ``"independent"``, by each rank for each branch; ``"shared"``, all ranks drop the
            same branches; ``"balanced"``, equally many of each class.
        classes: of balanced draws; None is the :func:`cost_classes` of ``costs``.
        around: by branch, the number of the one that it is inside of, if any: it runs only where
            that is kept, and its cost is a part of that one's.
        generator: for the simulation; None is one with a fixed seed.
    """
    outer = [None] * len(rates) if around is None else list(around)
    own = list(costs)
    for i, holder in enumerate(outer):
        if holder is not None:
            own[holder] -= costs[i]
    total = sum(own)
    if not total:
        return 1.0
    shares = [max(cost, 0.0) / total for cost in own]
    if draw == "independent" and ranks > 1:
        return _slowest_independent(rates, shares, outer, ranks)
    classes = cost_classes(costs) if classes is None else list(classes)
    equal = len(set(zip(classes, own, strict=True))) == len(set(classes))
    if draw != "balanced" or ranks == 1 or (equal and not any(o is not None for o in outer)):
        reached = chances_to_run(rates, outer)
        return sum(chance * share for chance, share in zip(reached, shares, strict=True))
    weights = torch.tensor(shares, dtype=torch.float64, device="cpu")
    runs = _simulated_runs(rates, classes, outer, ranks, generator)
    return sum([(run.double() @ weights).max().item() for run in runs], 0.0) / _STEPS


def chances_to_run(rates: Sequence[float], around: Sequence[int | None]) -> list[float]:
    """Of each branch, how probable it is that it is kept, and all branches around it."""

    def chance(i: int) -> float:
        outer = around[i]
        return (1.0 - rates[i]) * (1.0 if outer is None else chance(outer))

    return [chance(i) for i in range(len(rates))]


def _slowest_independent(
    rates: Sequence[float], shares: Sequence[float], around: Sequence[int | None], ranks: int
) -> float:
    """From the distribution of what one rank executes, F: the mean of the highest is Σ 1 - F^N."""
    units = [round(share * (1 << 14)) for share in shares]
    inside: dict[int | None, list[int]] = {}
    for i, outer in enumerate(around):
        inside.setdefault(outer, []).append(i)

    def with_those_in(outer: int | None, chances: Tensor) -> Tensor:
        for i in inside.get(outer, ()):  # roll: what would come round is 0 as yet
            kept = with_those_in(i, chances.roll(units[i]))
            chances = rates[i] * chances + (1.0 - rates[i]) * kept
        return chances

    nothing = torch.zeros(sum(units) + 1, dtype=torch.float64, device="cpu")
    nothing[0] = 1.0
    below = with_those_in(None, nothing).cumsum(0).clamp(max=1.0) ** ranks
    return 1.0 - below[:-1].mean().item()


def _simulated_runs(
    rates: Sequence[float],
    classes: Sequence[int],
    around: Sequence[int | None],
    ranks: int,
    generator: Generator | None,
) -> Tensor:
    """By step and rank, which branches run; those that are equally deep in others are one draw."""
    generator = generator or Generator().manual_seed(0)
    runs = torch.ones(_STEPS, ranks, len(rates), dtype=torch.bool, device="cpu")
    level, members = 0, [i for i, outer in enumerate(around) if outer is None]
    while members:
        own = [rates[i] for i in members], [classes[i] for i in members]
        dropped = torch.stack(list(simulated(*own, ranks, _STEPS, generator)))
        if level:  # their u is not that of the branches around them
            dropped = dropped[torch.randperm(_STEPS, generator=generator)]
            runs[..., members] = runs[..., [around[i] for i in members]]
        runs[..., members] &= ~dropped
        level, members = level + 1, [i for i, outer in enumerate(around) if outer in members]
    return runs


def simulated(
    rates: Sequence[float], classes: Sequence[int], ranks: int, steps: int, generator: Generator
) -> Iterator[Tensor]:
    """Balanced draws of many ranks, step by step: which branch (column) each rank (row) drops.

    The u of the steps are spread evenly, one in each part of [0, 1).
    """
    p = torch.tensor(rates, dtype=torch.float64, device="cpu")
    number = torch.tensor(classes, device="cpu")
    for step in range(steps):
        u = (step + torch.rand((), dtype=torch.float64, device="cpu", generator=generator)) / steps
        at_random = torch.rand(
            ranks, len(p), dtype=torch.float64, device="cpu", generator=generator
        )
        order = (at_random + number).argsort(1)
        ends = p[order].cumsum(1)
        dropped = (u - ends + p[order]) % 1.0 < p[order]
        yield torch.empty_like(dropped).scatter_(1, order, dropped)
