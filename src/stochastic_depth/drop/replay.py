"""Decisions that gradient checkpointing has to see a second time.

Checkpointing runs a part of the forward again during backward. It restores torch's default
generators, but no others, and with ``preserve_rng_state=False`` not even these. A branch that
decides anew when it is recomputed gives wrong gradients, mostly without an error. So what is
decided where it may be recomputed is recorded under a *ticket*, a number from torch's default
generator, and a recomputation, which finds that generator in the same state, gets what is on record
or raises.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch

from .._torch import graph_task, saved_tensors_hooks

__all__ = ["Tape", "is_recomputing", "may_be_recomputed", "ticket_of"]

T = TypeVar("T")
_Key = tuple[tuple[str, ...], Hashable, int]  # names of branches, purpose, ticket
_MOST = 1 << 14  # on record; forwards between a forward and its backward


def is_recomputing() -> bool:
    """Whether a backward pass is what runs this forward."""
    return graph_task() != -1


def may_be_recomputed() -> bool:
    """Whether a backward pass runs this forward, or may run it again.

    Checkpointing computes a forward without gradients, or with hooks on what autograd saves.
    """
    return not torch.is_grad_enabled() or saved_tensors_hooks() is not None or is_recomputing()


def ticket_of(default: bool) -> int:
    """The number that torch's default generator gives next.

    Args:
        default: whether decisions are drawn from that generator, too. Then nobody's numbers change.
            Otherwise nothing of ours makes its state another one from call to call, so the ticket
            is taken from it, in the forward and when that is repeated.
    """
    state = torch.get_rng_state() if default else None
    ticket = int(torch.randint(1 << 62, (), device="cpu"))
    if state is not None:
        torch.set_rng_state(state)
    return ticket


class Tape:
    """What one model has decided lately, by ticket; ambiguous where one ticket stands for two.

    It is no part of what is copied or pickled: a copy's backward passes are its own.
    """

    def __init__(self) -> None:
        self._decided: OrderedDict[_Key, Any] = OrderedDict()
        self._repeated: set[Hashable] = set()  # those whose backward pass has been seen
        self.tickets: set[tuple[str, int]] = set()  # of all others, by branch

    def __reduce__(self) -> Any:
        return Tape, ()

    def check_rates(self, names: Iterable[str]) -> None:
        """Raise where a backward pass repeats a forward that has drawn for one of these branches.

        Their rates leave nothing to draw now.
        """
        if is_recomputing():
            ticket = ticket_of(default=True)
            if any((name, ticket) in self.tickets for name in names):
                raise RuntimeError(_NOT_ON_RECORD)

    def decide(
        self, draw: Callable[[], T], names: Sequence[str], purpose: Hashable, default: bool
    ) -> T:
        """What ``draw()`` decides; in a recomputation, what the forward decided.

        Args:
            draw: makes the decision.
            names: of the branches.
            purpose: what it is for: a recomputation with another purpose finds nothing.
            default: whether it draws from torch's default generator. A recomputation then draws
                again, so that the numbers after it are those of the forward.

        Raises:
            RuntimeError: it is not known what the forward decided.
        """
        ticket = ticket_of(default)
        key = tuple(names), purpose, ticket
        noted = {(name, ticket) for name in names}
        if not is_recomputing():
            decided = draw()
            clash = self._decided.get(key, decided) != decided and key not in self._repeated
            self._decided[key] = _AMBIGUOUS if clash else decided
            self._repeated.discard(key)
            self.tickets |= noted
            while len(self._decided) > _MOST:
                oldest, _ = self._decided.popitem(last=False)
                self._repeated.discard(oldest)
                self.tickets -= {(name, oldest[-1]) for name in oldest[0]}
            return decided
        if key not in self._decided:
            raise RuntimeError(_NOT_ON_RECORD)
        decided = self._decided[key]
        if decided is _AMBIGUOUS:
            raise RuntimeError(
                "gradient checkpointing recomputes a branch, and torch's default generator, by "
                "whose numbers its drop decision is found again, was in the same state in several "
                "forwards: seed it differently from step to step, or not at all"
            )
        self._repeated.add(key)
        self.tickets -= noted
        if default:
            draw()
        return decided


_AMBIGUOUS = object()
_NOT_ON_RECORD = (
    "gradient checkpointing recomputes a branch whose drop decision is not on record. Either the "
    "state of torch's default CPU generator was not restored (preserve_rng_state=False), or the "
    "rate or the mode changed since the forward, or a call in a new form showed that samples "
    f"cannot be chosen, or {_MOST:,} decisions were made in between; keep preserve_rng_state=True, "
    "the default"
)
