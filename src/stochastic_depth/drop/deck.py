"""Which branches are balanced with one another."""

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Generator

from ..branch import Branch
from .balance import Rounds, cost_classes

__all__ = ["Deck", "deal"]


class Deck:
    """Branches of which none is inside another, with their rounds of balanced decisions.

    Shared decisions have rounds of their own, since all ranks lay them in the same order.

    Args:
        branches: the branches in the order of execution.
        classes: of each, see :func:`.balance.cost_classes`.
    """

    def __init__(self, branches: Sequence[Branch], classes: Sequence[int]) -> None:
        self.branches = list(branches)
        self.name = branches[0].name
        self._keys = {branch: key for key, branch in enumerate(branches)}
        self._gone: set[Branch] = set()
        self.rounds = {kind: Rounds(classes) for kind in ("separate", "shared")}

    def is_dropped(self, branch: Branch, kind: str, generator: Generator, rank: int) -> bool:
        """Decide a call of ``branch``; see :meth:`.balance.Rounds.take`."""
        key = self._keys[branch]
        return self.rounds[kind].take(key, self._rates, generator, rank) < branch.p

    def withdraw(self, branch: Branch) -> None:
        """Balance the others among themselves from the next call of the model on."""
        self._gone.add(branch)

    def _rates(self) -> list[float]:
        return [b.p if b.decides_calls and b not in self._gone else 0.0 for b in self.branches]

    def resume(self, before: "Deck") -> None:
        """Go on where a deck of the same branches was."""
        if [b.name for b in before.branches] == [b.name for b in self.branches]:
            for kind, rounds in self.rounds.items():
                rounds.set_state(before.rounds[kind].state())


def deal(
    branches: Sequence[Branch], nodes: Mapping[Branch, frozenset[int]], costs: Sequence[float]
) -> list[Deck]:
    """Put branches together that are equally deep in others.

    A branch that is inside another runs only where that is kept, so its coin has to be independent
    of the other's.

    Args:
        branches: the branches in the order of execution.
        nodes: of each, what it computes.
        costs: of each, in any unit; the same on all ranks.
    """
    holders: dict[int, list[int]] = {}  # the sizes of the branches that compute a value
    for branch in branches:
        for node in nodes.get(branch, ()):
            holders.setdefault(node, []).append(len(nodes[branch]))
    levels = []
    for branch in branches:
        own = nodes.get(branch, frozenset())
        levels.append(sum(size > len(own) for size in holders[next(iter(own))]) if own else 0)
    decks = []
    for level in sorted(Counter(levels)):
        members = [i for i, at in enumerate(levels) if at == level]
        classes = cost_classes([costs[i] for i in members])
        decks.append(Deck([branches[i] for i in members], classes))
    return decks
