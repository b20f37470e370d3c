"""Random numbers that gradient checkpointing has to see a second time.

Checkpointing runs a part of the forward again during backward. It saves and restores torch's
default generators, but no others, and with ``preserve_rng_state=False`` not even these. A branch
that drops other rows when it is recomputed gives wrong gradients, mostly without an error. So what
is drawn where it may be recomputed is recorded, and a recomputation gets what is on record or
raises.

A draw is recorded under a ticket, a number from torch's default generator, which a recomputation
draws again. For coins of another generator the record holds what was drawn. Coins of the default
generator are drawn again, and must not change for it, so there the ticket is put back, and the
record holds what the draw was for.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

__all__ = ["draw_replayed", "is_recomputing", "may_be_recomputed", "saves_through_hooks"]

_MOST_DRAWS = 1 << 14  # on record for one generator; forwards between a forward and its backward
_MOST_NUMBERS = 1 << 22  # in all of them, 16 MiB

_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)


def is_recomputing() -> bool:
    """Whether a backward pass is what runs this forward."""
    return torch._C._current_graph_task_id() != -1


def saves_through_hooks() -> bool:
    """Whether there are hooks on what autograd saves; a torch that cannot tell has some."""
    return _hooks(False) is not None


def may_be_recomputed() -> bool:
    """Whether a backward pass runs this forward, or may run it again.

    Checkpointing computes a forward without gradients, or with hooks on what autograd saves.
    """
    return not torch.is_grad_enabled() or saves_through_hooks() or is_recomputing()


class _Record:
    """The latest draws of one generator; None stands for different numbers under one ticket."""

    def __init__(self) -> None:
        self.draws: OrderedDict[Hashable, Tensor | None] = OrderedDict()
        self.numbers = 0

    def add(self, ticket: Hashable, drawn: Tensor) -> None:
        known = self.draws.setdefault(ticket, drawn)
        if known is drawn:
            self.numbers += drawn.numel()
        elif known is not None and not torch.equal(known, drawn):
            self.draws[ticket] = None
            self.numbers -= known.numel()
        while len(self.draws) > _MOST_DRAWS or self.numbers > _MOST_NUMBERS:
            oldest = self.draws.popitem(last=False)[1]
            self.numbers -= 0 if oldest is None else oldest.numel()


_of_default: OrderedDict[int, Hashable] = OrderedDict()  # the purpose of the latest such draw
_of_others: WeakKeyDictionary[torch.Generator, _Record] = WeakKeyDictionary()


def draw_replayed(
    draw: Callable[[], Tensor], purpose: Hashable, generator: torch.Generator | None
) -> Tensor:
    """What ``draw()`` draws from ``generator``; in a recomputation, what the forward drew.

    Args:
        draw: draws the numbers, a 1-d tensor.
        purpose: what they are for: a recomputation with another purpose is an error.
        generator: where they come from; None is torch's default CPU generator.

    Raises:
        RuntimeError: it is not known what the forward drew.
    """
    if generator is None:
        state = torch.get_rng_state()
        ticket = _draw_ticket()
        torch.set_rng_state(state)
        if not is_recomputing():
            _of_default[ticket] = purpose
            if len(_of_default) > _MOST_DRAWS:
                _of_default.popitem(last=False)
        elif _of_default.get(ticket) != purpose:
            raise RuntimeError(
                f"{_RECOMPUTES} other coins than the forward tossed. {_CAUSES}; "
                "use preserve_rng_state=True, the default"
            )
        return draw()
    record = _of_others.setdefault(generator, _Record())
    mark = purpose, _draw_ticket()
    if not is_recomputing():
        drawn = draw()
        record.add(mark, drawn)
        return drawn
    if mark not in record.draws:
        raise RuntimeError(
            f"{_RECOMPUTES} coins of a generator of your own (seed=, coins=, generator=) that are "
            f"not on record. {_CAUSES}; use preserve_rng_state=True, the default, or torch's "
            "default generator for the coins (seed=None)"
        )
    found = record.draws[mark]
    if found is None:
        raise RuntimeError(
            f"{_RECOMPUTES} coins of a generator of your own (seed=, coins=, generator=), and "
            "torch's default generator, by whose numbers they are found again, was in the same "
            "state in several forwards: seed it differently from step to step, or not at all"
        )
    return found


def _draw_ticket() -> int:
    return int(torch.randint(1 << 62, (), device="cpu"))


_RECOMPUTES = "gradient checkpointing recomputes a branch during backward with"
_CAUSES = (
    "Either the state of torch's default CPU generator was not restored (preserve_rng_state=False)"
    ", or the rate, the mode or the batch changed since the forward, or "
    f"{_MOST_DRAWS:,} draws were made in between"
)
