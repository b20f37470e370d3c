"""In which call of which module the branches run: frames, the modules opened in them, gates."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from .flow import Flow
from .regions import Finder, Region

__all__ = ["Frame", "Member", "frames_of"]


@dataclass(eq=False)
class Member:
    """A region in its frame.

    Attributes:
        region: the region.
        gates: its calls that the frame meets, in order.
        free: its values that are made in the frame itself, in order.
    """

    region: Region
    gates: list[int] = field(default_factory=list)
    free: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Frame:
    """One call of a block.

    Attributes:
        call: the block's.
        members: its branches, in the order of their sums.
        met: the calls that its forward makes, directly or in an opened module.
        opened: the calls of opened modules.
        gate_of: the index in ``members`` of a call that is a gate.
    """

    call: int
    members: list[Member]
    met: list[int] = field(default_factory=list)
    opened: list[int] = field(default_factory=list)
    gate_of: dict[int, int] = field(default_factory=dict)


def frames_of(flow: Flow, finder: Finder, regions: list[Region], tops: list[int]) -> list[Frame]:
    """The frames of ``regions``, each of which begins in the call in ``tops``, or in one around it.

    ``tops`` is changed where frames overlap, which makes one of them.
    """
    children: dict[int, list[int]] = {}
    for c, call in enumerate(flow.calls):
        children.setdefault(call.parent, []).append(c)
    units = [finder.units(r, top) for r, top in zip(regions, tops, strict=True)]
    again = True
    while again:
        again = False
        opened: dict[int, set[int]] = {}
        for k, region in enumerate(regions):
            opened.setdefault(tops[k], set()).update(_between(flow, region, units[k], tops[k]))
        owners = {c: top for top, calls in sorted(opened.items(), reverse=True) for c in calls}
        for k, top in enumerate(tops):
            if top in owners and owners[top] != top:
                tops[k] = owners[top]
                units[k] = finder.units(regions[k], tops[k])
                again = True
    frames = []
    together: dict[int, list[int]] = {}
    for k, top in enumerate(tops):
        together.setdefault(top, []).append(k)
    for top, mine in sorted(together.items()):
        frame = Frame(top, [Member(regions[k]) for k in mine])
        modules = {id(flow.calls[c].module) for c in opened[top]}
        _meet(flow, children, top, modules, frame)
        _assign(flow, frame, [units[k] for k in mine])
        frames.append(frame)
    return frames


def _between(flow: Flow, region: Region, units: tuple[int, ...], top: int) -> Iterator[int]:
    """The calls between a frame and what it does of a branch."""
    gates = set(units)
    inner = {flow.calls[c].parent for c in units}
    inner.update(flow.nodes[merge.node].call for merge in region.merges)
    inner.add(flow.nodes[region.sum].call)
    inner.update({flow.nodes[i].call for i in region.nodes})
    for c in inner:
        chain: list[int] = []
        for outer in flow.around(c):
            if outer == top:
                yield from chain
                break
            if outer in gates:
                chain = []
            else:
                chain.append(outer)


def _meet(
    flow: Flow, children: dict[int, list[int]], call: int, modules: set[int], frame: Frame
) -> None:
    for c in children.get(call, ()):
        if id(flow.calls[c].module) in modules:
            frame.opened.append(c)
            _meet(flow, children, c, modules, frame)
        else:
            frame.met.append(c)


def _assign(flow: Flow, frame: Frame, units: list[tuple[int, ...]]) -> None:
    """Which of the calls that a frame meets belong to which branch."""
    owner = {c: k for k, calls in enumerate(units) for c in calls}
    of_node: dict[int | None, int] = {}
    for k, member in enumerate(frame.members):
        of_node |= dict.fromkeys(member.region.nodes, k)
    for c in frame.met:
        inside = takewhile(frame.call.__ne__, flow.around(c))
        found = [owner[outer] for outer in inside if outer in owner]
        call = flow.calls[c]
        if not found and call.structure is None and flow.count[call.start] == flow.count[call.end]:
            # It hands on what it is given: an Identity, a Dropout in evaluation.
            found = [of_node[n] for n in call.made if n in of_node]
        for k in found[:1]:
            frame.gate_of[c] = k
            frame.members[k].gates.append(c)
    for member in frame.members:
        spans = [range(flow.calls[c].start, flow.calls[c].end) for c in member.gates]
        member.free = sorted(member.region.nodes.difference(*spans))
