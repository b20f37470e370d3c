"""Residual regions of a recorded run: which values a sum's branch is made of.

For a sum ``m = s + b`` let ``Anc(v)`` be a value and all that it is computed from. The branch is
what ``b`` needs and ``s`` does not, ``Anc(b) - Anc(s)``, less what anybody else reads; the
shortcut's own work is ``Anc(s) - Anc(b)``: none for an *identity*, little and linear for a
*projection*. Its block is the innermost call around the sum in which it still reads the shortcut.
Calls of modules are dropped as a whole: one that also does something else is left outside of the
branch, or, where nothing of the branch would remain, looked into.
"""

import heapq
from collections.abc import Container
from dataclasses import dataclass
from typing import Literal

from .flow import Flow
from .functions import ADD, SUMS, VIEWS
from .lookalikes import Lookalikes
from .plan import Merge
from .sides import OF_STACKS, sides, stacked
from .spot import is_ours

__all__ = ["Finder", "Region", "Rejected"]

_SLICES = {"__getitem__", "narrow", "item", "split", "chunk", "select"}
_COPIES = {"clone", "contiguous", "alias", "detach", "to", "float", "half", "bfloat16", "type_as"}
_JOINS = {"stack", "cat", "concat", "concatenate", "hstack", "vstack"}
_OF_MANY = "it is one of several in a stack that is summed: add them one by one, x + f(x) + g(x)"


@dataclass(eq=False)
class Region:
    """A branch in this run.

    Attributes:
        sum: the node of the sum; the value after the branch.
        shortcut: the node of the other side.
        output: the branch's node that enters the sum.
        nodes: the branch's own, in order.
        block: the call whose frame the branch is found in.
        calls: the largest calls that are in it as a whole, in order.
        merges: where it enters what goes on.
        drops: calls of modules in it that drop it by themselves.
        stream: the values that it may start from: the shortcut, those before sums with others, and
            what these others start with.
        needs: the values that it is computed of and its shortcut is not.
    """

    sum: int
    shortcut: int
    output: int
    nodes: frozenset[int]
    block: int
    calls: tuple[int, ...]
    kind: Literal["identity", "projection"]
    merges: tuple[Merge, ...]
    drops: tuple[int, ...] = ()
    stream: frozenset[int] = frozenset()
    needs: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Rejected:
    """A sum that looks residual: its block, the calls in it, and why it cannot be dropped."""

    block: int
    calls: tuple[int, ...]
    reason: str
    sum: int


class Finder(Lookalikes):
    """Finds the region of each sum of a flow, and knows what belongs to one."""

    def __init__(self, flow: Flow, drops: Container[str]) -> None:
        super().__init__(flow)
        self.found: dict[int, Region] = {}
        self.rejected: list[Rejected] = []
        self.streams: dict[int, int] = {}  # by sum, refused or not, what it goes on from
        self.drops = [c for c, call in enumerate(flow.calls) if call.made and call.name in drops]

    def run(self) -> None:
        ours = {c for c, call in enumerate(self.calls) if is_ours(call.module)}
        for m, node in enumerate(self.nodes):
            if not self.live[m] or not ours.isdisjoint(self.flow.around(node.call)):
                continue
            for shortcut, branch in sides(node, self.nodes):
                region = self.region(m, shortcut, branch)
                if region is not None:
                    self.found[region.sum] = region
                    break
            terms = stacked(node, self.nodes)
            for branch in terms[1:] if len(terms) > 2 else ():
                if (region := self.region(m, terms[0], branch)) is not None:
                    self.rejected.append(Rejected(region.block, region.calls, _OF_MANY, m))

    # One sum.

    def region(self, m: int, s: int, b: int) -> Region | None:
        nodes = self.nodes
        if not nodes[b].varies:
            return None
        if not (nodes[m].is_continuous and nodes[b].is_continuous):
            return None
        if nodes[s].shape != nodes[m].shape:
            return None  # attention scores and their mask, say
        of_branch, of_shortcut = self.apart(b, s)
        if b not in of_branch:
            return None
        trunk, own, starts = self.trunk(s, of_shortcut)
        if own and not self.is_little(own):
            return None
        self.stream = starts.union(trunk)
        m, merges = self.merges(m, b, of_branch)
        of_branch.update(merge.branch for merge in merges)
        ends = {(merge.node, merge.branch) for merge in merges}
        tight = self.without_leaks(of_branch, ends)
        whole = self.whole_calls(tight, m, ends)
        found = self.placed(m, s, b, trunk, own, of_branch, whole, merges)
        if isinstance(found, Rejected) and tight != whole:
            # Look into the calls that do more than it.
            found = self.placed(m, s, b, trunk, own, of_branch, tight, merges)
        if found is None:
            return None
        self.streams[m] = trunk[-1]
        if isinstance(found, Rejected):
            self.rejected.append(found)
            return None
        return None if self.has_stream(found) else found

    def apart(self, branch: int, shortcut: int) -> tuple[set[int], set[int]]:
        """What the one side needs alone, and what the other."""
        nodes = self.nodes
        marks = {branch: 1, shortcut: 2} if nodes[shortcut].varies else {branch: 1}
        heap = [-i for i in marks]
        heapq.heapify(heap)
        alone = len(marks)
        found: tuple[set[int], set[int]] = set(), set()
        while heap and alone:
            i = -heapq.heappop(heap)
            mark = marks[i]
            if mark != 3:
                alone -= 1
                found[mark - 1].add(i)
            for x in nodes[i].sources:
                if not nodes[x].varies:
                    continue
                before = marks.get(x)
                if before is None:
                    marks[x] = mark
                    heapq.heappush(heap, -x)
                    alone += mark != 3
                elif before | mark != before:
                    marks[x] = 3
                    alone -= 1
        return found

    def placed(
        self, m: int, s: int, b: int, trunk: list[int], own: set[int],
        branch: set[int], kept: set[int], merges: tuple[Merge, ...],
    ) -> Region | Rejected | None:  # fmt: skip
        for block in self.flow.around(self.nodes[m].call):  # the innermost in which it is residual
            start, end = self.calls[block].start, self.calls[block].end
            if any(not start <= i < end for i in own):
                continue
            near = {i for i in branch if start <= i < end}
            inside = {i for i in kept if start <= i < end}
            if not self.is_residual(b, trunk, own, near):
                continue
            calls = self.largest(inside or near, block, m)
            name = self.calls[block].name
            below = f"{name}." if name else ""
            if all(self.calls[c].name.startswith(below) for c in calls):
                break
        else:
            return None
        if not self.is_substantial(near, m):
            return None
        reason = self.objection(inside, near, m)
        if not reason and self.starts_elsewhere(own, near, inside):
            reason = self.leak(near)
        needs = branch.union(trunk)
        if reason := reason or self.likeness(m, b, own, needs, inside, block):
            return Rejected(block, calls, reason, m)
        drops = tuple(c for c in self.drops if not inside.isdisjoint(self.calls[c].made))
        kind: Literal["identity", "projection"] = "projection" if own else "identity"
        nodes = frozenset(inside)
        return Region(
            m, s, b, nodes, block, calls, kind, merges, drops, self.stream, frozenset(branch)
        )

    def is_residual(self, b: int, trunk: list[int], own: set[int], near: set[int]) -> bool:
        """Whether the branch starts where the shortcut does, and is no product with that."""
        read = {x for i in near for x in self.nodes[i].sources}
        if not own:
            learned = () if self.nodes[trunk[-1]].varies else read  # queries, and what is made of
            constants = (x for x in learned if not self.nodes[x].varies)  # them alone
            alone = any(self.is_made_of(x, self.stream) for x in constants)
            return alone or not read.isdisjoint(self.stream)
        start, depth = self.entries(own), self.depth(own)
        if not start <= read:
            return False
        if all(self.nodes[i].op in VIEWS for i in own):
            return True
        if self.slices(start, own | near) or self.is_part(start, own) or self.is_part(start, near):
            return False  # of a part of it: a step, the coordinates
        weighted = any(self.nodes[x].weights for i in near for x in self.nodes[i].sources)
        deeper = self.depth(near) > depth if any(depth) else weighted
        return len(start) == 1 and deeper and not self.is_gated(b, near, start)

    def slices(self, start: set[int], values: set[int]) -> list[int]:
        """The slices of ``start``, where ``values`` are made of such alone."""
        readers = [i for i in values if not start.isdisjoint(self.nodes[i].sources)]
        return readers if all(self.nodes[i].op in _SLICES for i in readers) else []

    def is_part(self, start: set[int], values: set[int]) -> bool:
        """Whether ``values`` are made of one slice of ``start``, but no crop or stride."""
        slices = self.slices(start, values)
        if len(slices) != 1 or self.nodes[slices[0]].op in ("chunk", "split"):
            return False
        (i,) = slices
        left, whole = self.nodes[i].shape, self.nodes[self.nodes[i].sources[0]].shape
        return len(left) != len(whole) or any(2 * a < b for a, b in zip(left, whole, strict=True))

    def starts_elsewhere(self, own: set[int], near: set[int], left: set[int]) -> bool:
        """Whether what is left of a branch starts from something else than its shortcut."""
        start = self.entries(own)
        if all(self.nodes[i].op in VIEWS for i in own):
            if not (self.slices(start, own) and self.slices(start, near)):
                return False
            again = (len(self.readers[x]) > 1 for x in self.matrices(left))  # these are steps
            return any(again) or start.isdisjoint(self.viewed(self.entries(left)))
        inner = [x for i, x in self.streams.items() if i in near and self.nodes[x].varies]
        return not near.union(start).issuperset(inner)

    def trunk(self, s: int, own: set[int]) -> tuple[list[int], set[int], frozenset[int]]:
        """x + f(x) + g(x): the second branch reads the trunk x of the shortcut x + f(x).

        Or what both start with, in x + f(norm(x)) + g(norm(x)).
        """
        trunk, starts = [s], frozenset[int]()
        while own:
            inner, node = self.found.get(trunk[-1]), self.nodes[trunk[-1]]
            if inner is not None:
                own = own - inner.needs - {trunk[-1]}
                trunk.append(inner.shortcut)
                call = self.calls[inner.block]
                starts |= {i for i in inner.needs - inner.nodes if call.start <= i < call.end}
            elif trunk[-1] in own and node.op in _COPIES:
                own = own - {trunk[-1]}
                trunk.append(node.sources[0])
            else:
                break
        return trunk, own, starts

    def has_stream(self, region: Region) -> bool:
        """Whether a branch ends in a sum that brings along what its shortcut is made of.

        So does x + f(x) in x + f(x) + light(x), where light(x) is taken for the shortcut, and in
        (x + f(x)) + (x + g(x)): two residual blocks beside each other.
        """
        output, needs = region.output, set(region.needs)
        while (node := self.nodes[output]).op in VIEWS | _COPIES | ADD | {"flip"}:
            if node.op in ADD and len(node.sources) > 1:  # else Python's sum(), which begins with 0
                break
            needs.discard(output)
            output = node.sources[0]
        trunk, own, _ = self.trunk(output, needs)
        sums = [self.found[i] for i in trunk if i in self.found]
        is_made = any(self.depth(own)) and all(r.kind == "identity" for r in sums)
        if not sums or is_made or not self.is_little(own):  # what it starts from is made in it
            return False
        starts = self.entries(own) or {trunk[-1]}
        if not starts.isdisjoint(region.stream):
            s = region.shortcut
            beside, _, _ = self.trunk(s, self.apart(region.output, s)[1])
            return any(i in self.found for i in beside[:-1])
        return self.is_made_of(region.shortcut, starts)

    def is_block(self, region: Region) -> bool:
        """Whether a branch makes a block: not a layer of several parts, or one with a correction.

        The correction (DoRA) has fewer weights than what the layer has just made.
        """
        s = region.shortcut
        made = self.viewed({s}) if s >= self.calls[region.block].start else set()
        if region.kind == "projection":
            _, made, _ = self.trunk(s, self.apart(region.output, s)[1])
            if self.depth(set(region.nodes))[0] < 2:
                return False
        return self.size_of(made) <= self.size_of(region.nodes)

    # Where it enters what goes on.

    def merges(self, m: int, b: int, branch: set[int]) -> tuple[int, tuple[Merge, ...]]:
        """The sum of slices, ``cat([b[:, :k] + s, b[:, k:]])``, is a sum of the whole."""
        node, readers = self.nodes[m], self.readers[m]
        if node.op in OF_STACKS:
            return m, (self.merge(node.sources[0], b, plain=False),)
        plain = node.op in SUMS or node.op.startswith("lerp")
        merges = [self.merge(m, b, plain)]
        whole = self.cut_of(b)
        if whole in branch and len(readers) == 1 and self.nodes[readers[0]].op in _JOINS:
            rest = [x for x in self.nodes[readers[0]].sources if x != m]
            if rest and all(self.cut_of(x) == whole for x in rest):
                merges += [self.merge(readers[0], x, plain=False) for x in rest]
                return readers[0], tuple(merges)
        return m, tuple(merges)

    def merge(self, m: int, branch: int, plain: bool) -> Merge:
        node = self.nodes[m]
        return Merge(m, branch, plain, node.key, node.sources.index(branch))

    def cut_of(self, i: int) -> int | None:
        """What a value is a slice of."""
        node = self.nodes[i]
        return node.sources[0] if node.op in _SLICES else None

    def units(self, region: Region, top: int) -> tuple[int, ...]:
        """The calls that are in a branch as a whole, where ``top`` is its frame."""
        self.stream = region.stream
        return self.largest(set(region.nodes), top, region.sum)
