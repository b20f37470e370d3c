"""What calls write to beside tensors: lists, caches and other objects, and who else knows these."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .flow import Call, Flow
from .state import attributes
from .tensors import held_by, may_hold, objects_within, tensors_within

__all__ = ["Written"]

_DEPTH = 4


class Written:
    """Notes in the calls of a run what they change of what they are given."""

    def __init__(self, flow: Flow) -> None:
        self.calls, self.around = flow.calls, flow.around
        self.given: dict[int, list[tuple[Any, list[int]]]] = {}  # by open call, and what is in it
        self.changed: list[tuple[Any, Call]] = []

    def enter(self, number: int, args: Any, kwargs: Any) -> None:
        """A call begins."""
        given = (*args, *kwargs.values())
        self.given[number] = [(x, held_by(x)) for x in given if may_hold(x)]

    def leave(self, number: int, result: Any, node: Callable[[Tensor], int | None]) -> None:
        """It has returned ``result``; ``node`` gives the numbers of tensors."""
        call = self.calls[number]
        for x, before in self.given.pop(number):
            if before != held_by(x):
                call.writes, call.owner = type(x).__name__, self._owner(x, number)
                call.put |= {node(t) for t in tensors_within(x, _DEPTH) if id(t) not in before}
                self.changed.append((x, call))
        made_here = [w for w in self.changed if self.calls[w[1].owner].parent == number]
        if made_here:
            # What is not returned is gone, and may not be kept alive by this.
            self.changed = [w for w in self.changed if self.calls[w[1].owner].parent != number]
            for x, inner in made_here:
                if _share(x, result):
                    inner.owner = number
                    self.changed.append((x, inner))

    def _owner(self, x: Any, number: int) -> int:
        """The outermost call that was given ``x``, or whose module keeps it, else the call."""
        owner = number
        for c in self.around(self.calls[number].parent):
            given = [y for y, _ in self.given[c]]
            if _share(x, (given, attributes(self.calls[c].module))):
                owner = c
        return owner


def _share(x: Any, y: Any) -> bool:
    """Whether an object is in both."""
    own = {id(part) for part in objects_within(x, _DEPTH)}
    return any(id(part) in own for part in objects_within(y, _DEPTH))
