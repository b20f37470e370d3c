"""From the regions of a run to plans: what every call of a block has to do with its branches."""

from dataclasses import dataclass, field

import torch
from torch import nn

from ..branch import Branch, Spot
from .checks import is_absent, is_linear, objection, read_parameters, sums_before, works_in_function
from .flow import Flow
from .frames import Frame, Member, frames_of
from .plan import Findings, Form, Gate, Leaf, Plan, Refused
from .regions import Finder, Region, Rejected

__all__ = ["Planned", "dtypes_of", "plan"]

Key = tuple[str, tuple[str, ...], frozenset[Spot], tuple[str, ...]]


@dataclass
class Planned:
    """Findings, and what of the run they are.

    Attributes:
        findings: what is found.
        regions: by branch; several where its block is called several times.
        frames: the calls of blocks; the plan of each is that of its block and form.
    """

    findings: Findings = field(default_factory=Findings)
    regions: dict[Branch, list[Region]] = field(default_factory=dict)
    frames: list[Frame] = field(default_factory=list)


def plan(model: nn.Module, flow: Flow, finder: Finder, regions: list[Region]) -> Planned:
    """What is found, from the regions of one run."""
    tops = [r.block for r in regions]
    refused: dict[int, str] = {}
    while True:
        kept = [k for k, r in enumerate(regions) if r.sum not in refused]
        regions, tops = [regions[k] for k in kept], [tops[k] for k in kept]
        frames = frames_of(flow, finder, regions, tops)
        before = len(refused)
        for frame in frames:
            for member in frame.members:
                if reason := objection(flow, frame, member):
                    refused[member.region.sum] = reason
                    region = member.region
                    finder.rejected.append(Rejected(frame.call, region.calls, reason, region.sum))
        if len(refused) > before:
            continue
        planner = _Planner(model, flow, frames)
        if not planner.conflicts:
            break
        # A block whose calls differ is a part of the frame around it.
        for k, top in enumerate(tops):
            if top in planner.conflicts:
                tops[k] = flow.calls[top].parent
    planner.refuse(finder.rejected)
    return planner.planned


class _Planner:
    def __init__(self, model: nn.Module, flow: Flow, frames: list[Frame]) -> None:
        self.model, self.flow = model, flow
        self.planned = Planned()
        self.conflicts: set[int] = set()
        self.keys: dict[Key, Branch] = {}
        self.labels: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self.first: dict[tuple[str, Form], Frame] = {}
        drafts = [(frame, self.draft(frame)) for frame in frames]
        self.compare(drafts)
        if not self.conflicts:
            for frame, draft in sorted(drafts, key=lambda d: d[0].members[0].region.sum):
                self.settle(frame, draft)
            self.planned.findings.branches.sort(key=lambda b: self.planned.regions[b][0].sum)

    def compare(self, drafts: list[tuple[Frame, Plan]]) -> None:
        """Find the blocks that are called in one form and do different things."""
        calls = self.flow.calls
        seen: dict[tuple[int, Form], tuple[Frame, Plan]] = {}
        for frame, draft in drafts:
            call = calls[frame.call]
            first, other = seen.setdefault((id(call.module), call.form), (frame, draft))
            if first is not frame and not self.is_same(first, other, frame, draft):
                self.conflicts |= {first.call, frame.call}
        planned = {frame.call for frame, _ in drafts}
        for c, call in enumerate(calls):
            known = seen.get((id(call.module), call.form))
            count = self.flow.count
            if known and c not in planned and count[call.start] < count[call.end]:
                self.conflicts.add(known[0].call)
        self.conflicts.discard(0)
        if self.conflicts:
            for frame, _ in drafts:
                call = calls[frame.call]
                if any(calls[c].module is call.module for c in self.conflicts):
                    self.conflicts.add(frame.call)

    def is_same(self, a: Frame, plan_a: Plan, b: Frame, plan_b: Plan) -> bool:
        same = (plan_a.gates, plan_a.opened, plan_a.dead) == (
            plan_b.gates, plan_b.opened, plan_b.dead,
        )  # fmt: skip
        spots = [[self.spots(m.region) for m in f.members] for f in (a, b)]
        return same and spots[0] == spots[1]

    def draft(self, frame: Frame) -> Plan:
        """The plan of one call, as yet without branches."""
        flow, block = self.flow, self.flow.calls[frame.call]
        names: dict[int, str] = {}
        gates: dict[str, list[Gate]] = {}
        wanted = {id(flow.calls[c].module) for c in frame.gate_of}
        last = {c for member in frame.members for c in self.last(member)}
        others = set()
        for c in frame.met:
            call = flow.calls[c]
            if id(call.module) not in wanted:
                others.add(_below(call.name, block.name))
            else:
                name = names.setdefault(id(call.module), _below(call.name, block.name))
                gates.setdefault(name, []).append(self.gate(frame, c, c in last))
        opened = frozenset(_below(flow.calls[c].name, block.name) for c in frame.opened)
        dead = frozenset(
            i
            for i, n in enumerate(block.made)
            if n is not None and not flow.is_read_after(n, frame.call)
        )
        named = {name: tuple(g) for name, g in gates.items()}
        dtypes = dtypes_of(flow, [member.region for member in frame.members])
        return Plan([], named, frozenset(others), opened, dead, dtypes, block.precision)

    def gate(self, frame: Frame, c: int, last: bool) -> Gate:
        k = frame.gate_of.get(c)
        if k is None:
            return Gate(None)
        flow, call = self.flow, self.flow.calls[c]
        nodes = frame.members[k].region.nodes
        leaves = []

        def dtype_of(n: int) -> torch.dtype | None:
            return flow.nodes[n].dtype if isinstance(call.precision, tuple) else None

        for n, kind in zip(call.made, call.kinds, strict=True):
            if n is None:
                leaves.append(Leaf("value" if kind == "tensor" else kind))
            elif n in nodes:
                leaves.append(Leaf("branch", dtype=dtype_of(n)))
            elif n in call.given:
                leaves.append(Leaf("argument", call.given.index(n)))
            else:  # dead where it was found; what works on it comes to nothing
                is_read = flow.last_read[n] >= call.end
                leaves.append(Leaf("branch" if is_read else "unread", dtype=dtype_of(n)))
        drops = c in frame.members[k].region.drops
        return Gate(
            k,
            last and not drops,
            returned=tuple(leaves),
            structure=call.structure,
            drops=type(call.module).__qualname__ if drops else "",
        )

    def last(self, member: Member) -> set[int]:
        """The gates on whose results no other gate of the branch works."""
        flow, nodes, drops = self.flow, member.region.nodes, set(member.region.drops)
        gate_at: dict[int, int] = {}
        handed: dict[int, int] = {}  # the last gate that is given a value
        for c in member.gates:
            call = flow.calls[c]
            if c in drops:
                continue
            for i in range(call.start, call.end):
                gate_at[i] = c
            for n in call.given:
                if n is not None:
                    handed[n] = c
        reach: dict[int, int] = {}
        for i in sorted(nodes, reverse=True):
            farthest = handed.get(i, -1)
            for r in flow.readers[i]:
                if r in nodes:
                    farthest = max(farthest, gate_at.get(r, -1), reach[r])
            reach[i] = farthest
        return {
            c
            for c in member.gates
            if c not in drops
            and all(reach[n] <= c for n in flow.calls[c].made if n is not None and n in nodes)
        }

    def spots(self, region: Region) -> tuple[dict[Spot, int], frozenset[Spot]]:
        """Where a branch is added, with its position among the terms, and where it enters else."""
        sums: dict[Spot, int] = {}
        joins: set[Spot] = set()
        for merge in region.merges:
            node = self.flow.nodes[merge.node]
            if node.spot is None:
                continue
            if not merge.plain:
                joins.add(node.spot)
                continue
            terms = node.parts or node.sources
            sums[node.spot] = terms.index(merge.branch) if merge.branch in terms else 1
        return sums, frozenset(joins)

    # The branches of a frame, which may have been found in another call of it.

    def settle(self, frame: Frame, draft: Plan) -> None:
        block = self.flow.calls[frame.call]
        found = self.planned.findings
        self.planned.frames.append(frame)
        known = found.plans.get(block.name, {}).get(block.form)
        if known is not None:
            for branch, member in zip(known.branches, frame.members, strict=True):
                self.planned.regions[branch].append(member.region)
            return
        draft.branches = [self.branch(frame, member) for member in frame.members]
        found.plans.setdefault(block.name, {})[block.form] = draft

    def branch(self, frame: Frame, member: Member) -> Branch:
        flow, region = self.flow, member.region
        block = flow.calls[frame.call].name
        modules = tuple(dict.fromkeys(flow.calls[c].name for c in member.gates))
        sums, joins = self.spots(region)
        weights = read_parameters(flow, member, block)
        key = block, modules, joins.union(sums), weights
        if (known := self.keys.get(key)) is not None:
            self.planned.regions[known].append(region)
            return known
        last = self.last(member)
        branch = Branch(
            self.name(block, self.label(frame, member)),
            region.kind,
            modules,
            existing=tuple(dict.fromkeys(flow.calls[c].name for c in region.drops)),
            sums=sums,
            joins=joins,
            in_function=works_in_function(flow, member),
            turn=sums_before(flow, member, last),
            linear=is_linear(flow, member, last),
            weights=weights,
            parameters=() if is_absent(flow, member) else weights,
            talks=flow.talks_within(member.gates, (frame.call, *frame.opened)),
        )
        self.keys[key] = branch
        self.planned.regions[branch] = [region]
        self.planned.findings.branches.append(branch)
        return branch

    def label(self, frame: Frame, member: Member) -> str:
        """The largest module around the branch's largest call that only the branch runs in."""
        calls, at = self.flow.calls, member.region.sum
        others = [calls[c].start for c in frame.gate_of if c not in member.gates]
        largest = max(member.gates, key=lambda c: self.size(calls[c].name), default=frame.call)
        for c in self.flow.around(largest):
            if c == frame.call or any(calls[c].start <= n < calls[c].end for n in (at, *others)):
                break
            largest = c
        return calls[largest].name

    def name(self, block: str, module: str) -> str:
        """The block and, after a colon, a module of the branch."""
        name = f"{block}:{_below(module, block) or 'branch'}"
        n = self.labels[name] = self.labels.get(name, 0) + 1
        return name if n == 1 else f"{name}#{n}"

    def size(self, name: str) -> int:
        if name not in self.sizes:
            modules = self.model.get_submodule(name).modules()
            held = (p for m in modules for p in m._parameters.values() if p is not None)
            self.sizes[name] = sum(p.numel() for p in held)
        return self.sizes[name]

    def refuse(self, rejected: list[Rejected]) -> None:
        regions = [region for found in self.planned.regions.values() for region in found]
        taken = {region.sum for region in regions}.union(*(region.nodes for region in regions))
        told: dict[tuple[str, str], None] = {}
        for r in rejected:
            if r.sum in taken:  # by a branch, or inside of one, with which it is left out
                continue
            block = self.flow.calls[r.block].name
            names = tuple(dict.fromkeys(self.flow.calls[c].name for c in r.calls))
            label = _below(max(names, key=self.size, default=""), block) or "branch"
            told[f"{block}:{label}", r.reason] = None
        self.planned.findings.refused = [Refused(*what) for what in told]


def dtypes_of(flow: Flow, regions: list[Region]) -> dict[int, torch.dtype]:
    """The dtypes of the sums of ``regions``, by number, that are not those of their shortcuts."""
    found: dict[int, torch.dtype] = {}
    for k, region in enumerate(regions):
        total, shortcut = (flow.nodes[n].dtype for n in (region.sum, region.shortcut))
        if total is not None and total != shortcut:
            found[k] = total
    return found


def _below(name: str, block: str) -> str:
    return name[len(block) + 1 :] if block else name
