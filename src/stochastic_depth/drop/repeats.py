"""Calls of a block's children that checkpointing inside of its forward makes again.

Its backward pass repeats them when the call of the block, with its decisions, is long over. It is
found again by the number that torch's default generator, whose state checkpointing restores, would
give next.
"""

from collections import OrderedDict
from typing import Any, NamedTuple

from .replay import ticket_of

__all__ = ["Repeat", "Repeats"]

_MOST = 1 << 10  # for one child; forwards between a forward and its backward


class Repeat(NamedTuple):
    """A call: of which frame, by which path, which call of this child, and in which Function."""

    frame: Any
    path: str
    turn: int
    function: str | None


class Repeats:
    """The latest such calls of one child, by ticket; none where it may be one of two."""

    def __init__(self) -> None:
        self.calls: OrderedDict[int, list[Repeat]] = OrderedDict()

    def add(self, repeat: Repeat) -> None:
        """Put a call on record."""
        ticket = ticket_of(default=True)
        known = self.calls.get(ticket)
        if known and known[0].frame is repeat.frame:
            known.append(repeat)  # the same child twice, with no random number in between
            return
        clash = known is not None
        if known:
            other = known[0].frame
            clash = other.graph() is not None and other.decisions() != repeat.frame.decisions()
        self.calls[ticket] = [] if clash else [repeat]
        while len(self.calls) > _MOST:
            self.calls.popitem(last=False)

    def find(self) -> Repeat:
        """The call that the backward pass repeats now.

        Raises:
            RuntimeError: it is not known which one that is.
        """
        calls = self.calls.get(ticket_of(default=True))
        if not calls:
            raise RuntimeError(
                "stochastic depth: a backward pass repeats a call of which it is not known whether "
                "it was dropped. Under gradient checkpointing, keep preserve_rng_state=True, and "
                "seed torch differently in each step; reversible blocks have to be called as plain "
                "ones in training, too"
            )
        calls.append(calls.pop(0))
        calls[-1].frame.done()
        return calls[-1]
