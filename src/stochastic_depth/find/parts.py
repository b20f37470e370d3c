"""What of a branch can be left out: what nobody else needs, in calls that do nothing else."""

from bisect import bisect_left
from collections.abc import Iterable
from functools import cached_property

from .flow import Flow
from .functions import VIEWS
from .measure import Measures

__all__ = ["OUTSIDE", "WRITES", "Parts", "is_writing"]

OUTSIDE = (
    "a part of it is computed outside of torch, where it cannot be seen: put that into a module of "
    "its own"
)
WRITES = "it is given a {}, which it changes: call the model with use_cache=False, or without it"


def is_writing(reason: str) -> bool:
    """Whether this is the reason why a branch that writes into a cache is refused."""
    return reason.startswith(WRITES.partition("{}")[0])


class _Values:
    """Nodes of a flow, as a set and in order."""

    def __init__(self, nodes: Iterable[int]) -> None:
        self.all = frozenset(nodes)

    @cached_property
    def ordered(self) -> list[int]:
        return sorted(self.all)

    def between(self, start: int, end: int) -> int:
        """How many are from ``start`` to before ``end``."""
        return bisect_left(self.ordered, end) - bisect_left(self.ordered, start)

    def __bool__(self) -> bool:
        return bool(self.all)


class Parts(Measures):
    """Parts of branches, in a recorded run."""

    def __init__(self, flow: Flow) -> None:
        super().__init__(flow)
        self.stream: frozenset[int] = frozenset()  # what the branch in question starts from

    def without_leaks(self, branch: set[int], ends: set[tuple[int, int]]) -> set[int]:
        """``branch`` less what others read too; ``ends`` are where it enters what goes on."""
        branch = set(branch)
        for i in sorted(branch, reverse=True):
            if self.leaks(i, branch, ends):  # and so does, in turn, all that it needs
                branch.remove(i)
        return branch

    def leaks(self, i: int, branch: set[int], ends: set[tuple[int, int]]) -> bool:
        if i in self.flow.kept:
            return True
        return any(r not in branch and (r, i) not in ends for r in self.readers[i])

    def whole_calls(self, branch: set[int], m: int, ends: set[tuple[int, int]]) -> set[int]:
        """``branch`` less the calls that it holds only a part of, those around the sum apart."""
        branch = set(branch)
        around = {
            c for i in branch for c in self.flow.around(self.nodes[i].call)
            if not self.calls[c].start <= m < self.calls[c].end
        }  # fmt: skip
        again = True
        while again and branch:
            again = False
            values = _Values(branch)
            for c in sorted(around):
                call = self.calls[c]
                if values.between(call.start, call.end) and self.does_more(c, values):
                    branch.difference_update(range(call.start, call.end))
                    branch = self.without_leaks(branch, ends)
                    around.discard(c)
                    again = True
                    break
        return branch

    def does_more(self, c: int, branch: _Values) -> bool:
        """Whether a call computes, or hands on, anything else that somebody may need."""
        call, count = self.calls[c], self.flow.count
        if count[call.end] - count[call.start] > branch.between(call.start, call.end):
            return True
        for n in call.made:
            if n is None or n in branch.all:
                continue
            if n in call.given and n not in self.stream:
                continue  # an argument that is handed on is there without the call
            if self.live[n] if self.nodes[n].varies else self.flow.used_until[n] >= call.end:
                return True
        return any(i not in branch.all for i in self.flow.exports.get(c, ()))

    def largest(self, branch: set[int], block: int, m: int, whole: bool = True) -> tuple[int, ...]:
        """The largest calls in ``branch``, in order."""
        values = _Values(branch)
        found: dict[int, None] = {}
        known: dict[int, int | None] = {}
        for i in values.ordered:
            innermost = self.nodes[i].call
            if innermost not in known:
                outer = None
                for c in self.flow.around(innermost):
                    call = self.calls[c]
                    if c == block or call.start <= m < call.end:
                        break
                    if whole and self.does_more(c, values):
                        break
                    outer = c
                known[innermost] = outer
            if (outer := known[innermost]) is not None:
                found[outer] = None
        return tuple(found)

    def entries(self, values: set[int]) -> set[int]:
        """The values from outside that are read."""
        nodes = self.nodes
        return {x for i in values for x in nodes[i].sources if nodes[x].varies and x not in values}

    def viewed(self, values: set[int]) -> set[int]:
        """These, and what they are views of."""
        found = set(values)
        for i in values:
            while self.nodes[i].op in VIEWS:
                i = self.nodes[i].sources[0]
                found.add(i)
        return found

    def leak(self, near: set[int]) -> str:
        """Why nothing of a branch can be left out: who else uses what it computes."""
        around = {c for i in near for c in self.flow.around(self.nodes[i].call)}
        for c in sorted(around, reverse=True):
            if self.calls[c].writes:
                return WRITES.format(self.calls[c].writes)
        for c in self.largest(near, 0, max(near) + 1, whole=False):
            call = self.calls[c]
            outside = [
                n
                for n in call.made
                if n is not None and any(r >= call.end and r not in near for r in self.readers[n])
            ]
            if outside and len(call.made) > 1:
                return (
                    f"{call.name or 'the model'} also returns something else that is used, so it "
                    "cannot be left out: return that from a module of its own"
                )
        return (
            "what the branch computes is also used outside of it: compute what both need before "
            "the branch"
        )
