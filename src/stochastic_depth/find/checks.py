"""What a frame does with the values of a branch between its calls, and what cannot be run."""

from collections.abc import Iterable

from .flow import Flow
from .frames import Frame, Member
from .functions import DIVIDE, MULTIPLY, SUMS, VIEWS, writes
from .parts import OUTSIDE, WRITES

__all__ = [
    "is_absent",
    "is_linear",
    "kept_in",
    "objection",
    "read_parameters",
    "sums_before",
    "works_in_function",
]

# Of degree one in what they are given; of padding, the value is not known.
_LIKE = VIEWS - {"pad"} | {
    "dropout", "dropout2d", "feature_dropout", "neg", "__neg__", "relu", "mean", "sum", "t",
    "adjoint", "moveaxis", "swapdims", "index_select", "flip",
}  # fmt: skip
_JOINS = {"cat", "concat", "stack"}
_PRODUCTS = MULTIPLY | {"matmul", "__matmul__", "bmm"}


def objection(flow: Flow, frame: Frame, member: Member) -> str:
    """Why a branch cannot be left out of this frame, or nothing."""
    nodes, region = flow.nodes, member.region
    for c in member.gates:
        kinds = flow.calls[c].kinds
        if "object" in kinds and "tensor" not in kinds:
            return (
                f"{flow.calls[c].name} returns an object that cannot be taken apart: return "
                "tensors, in tuples, lists or dicts"
            )
    for c in {c for i in region.nodes for c in flow.around(nodes[i].call)}:
        call = flow.calls[c]
        made_in_frame = call.owner > frame.call  # a list that it makes, and gives to a child
        if call.writes and not made_in_frame and not call.start <= region.sum < call.end:
            return WRITES.format(call.writes)
    if any(flow.calls[c].function == "custom" for c in flow.around(frame.call)):
        return (
            "its block is called in a custom autograd.Function, whose backward pass may compute it "
            "in another way: have that Function used in training only"
        )
    if _is_added_in_function(flow, member):
        return (
            "its sum is in a custom autograd.Function, which passes on the gradients of tensors "
            "only: add it outside of that"
        )
    derived = _derived(flow, member) if flow.held or flow.looks else set()
    gates = set(member.gates)
    inside = tuple(f"{flow.calls[c].name}." for c in gates)
    for i in derived & flow.held.keys():
        handed_on = any(i in flow.calls[c].made for c in gates)
        within = any(flow.calls[c].start <= i < flow.calls[c].end for c in gates)
        if f"{flow.held[i]}.".startswith(inside) or (within and not handed_on):
            continue
        return kept_in(flow.held[i])
    absent = _absent(flow, member)
    for i in member.free:
        for x in nodes[i].sources:
            if nodes[x].op == "constant" and nodes[x].weights:
                return (
                    "it reads parameters of modules that are not registered: keep them in "
                    "attributes, or in an nn.ModuleList or nn.ModuleDict"
                )
        if nodes[i].op == "opaque" and i not in absent:
            return OUTSIDE
    if region.output not in absent and not _handed(flow, member).isdisjoint(region.nodes):
        return (
            "what it computes is handed on in a list or an attribute, where something else is when "
            "it is dropped: return it"
        )
    read = read_parameters(flow, member, flow.calls[frame.call].name)
    if region.output not in absent and not read:
        return (
            "none of its modules is called by itself: register them, and call them rather than "
            "their functions"
        )
    for i in member.free:
        node = nodes[i]
        into, values = node.sources[:1], node.sources[1:]
        if writes(node.op) and absent.isdisjoint(into) and not absent.isdisjoint(values):
            return (
                "it is written into a tensor that is not its own, which would stay as it was: "
                "use torch.cat or torch.where"
            )
    for n, c in flow.looks:
        if n in derived and gates.isdisjoint(flow.around(c)):
            where = flow.calls[c].name or "the model"
            return (
                f"{where} looks at a value of it in Python (item(), if, a float), and there is "
                "none where it is dropped: do that in a module of its own"
            )
    return ""


def _is_added_in_function(flow: Flow, member: Member) -> bool:
    """Whether a custom autograd.Function is given the branch, and adds it."""
    nodes, output = flow.nodes, member.region.output
    made_by = [flow.calls[c].function for c in member.gates if output in flow.calls[c].made]
    function = made_by[-1] if made_by else nodes[output].function
    return nodes[member.region.sum].function == "custom" and function != "custom"


def kept_in(name: str) -> str:
    """The reason where a module keeps a value of the branch."""
    return (
        f"a value of it is kept in an attribute of {name or 'the model'}, and there is none where "
        "it is dropped: keep it in a module that the branch calls"
    )


def _made(flow: Flow, member: Member, calls: Iterable[int]) -> set[int]:
    """The values of the branch that these calls return."""
    nodes = member.region.nodes
    return {n for c in calls for n in flow.calls[c].made if n is not None and n in nodes}


def _in_frame(flow: Flow, member: Member, values: set[int]) -> set[int]:
    """``values``, and what the frame computes of them."""
    found = set(values)
    for i in member.free:
        if not found.isdisjoint(flow.nodes[i].sources):
            found.add(i)
    return found


def _absent(flow: Flow, member: Member) -> set[int]:
    """The values that are not there when no gate of the branch is called."""
    calls = [flow.calls[c] for c in member.gates]
    within = {i for call in calls for i in range(call.start, call.end)}
    absent = _made(flow, member, member.gates) | within
    return _in_frame(flow, member, absent - _handed(flow, member))


def _handed(flow: Flow, member: Member) -> set[int]:
    """What the gates hand on in another way than by returning it: in a list, an attribute."""
    handed: set[int] = set()
    for c in member.gates:
        call = flow.calls[c]
        for i in range(call.start, call.end):
            seen = i not in call.made or i in call.put
            if seen and any(r >= call.end for r in flow.readers[i]):
                handed.add(i)
    return handed


def _derived(flow: Flow, member: Member) -> set[int]:
    """All that is computed of the branch but for its sum, also where nothing comes of it."""
    region = member.region
    ends = {merge.node for merge in region.merges} | {region.sum}
    derived = set(region.nodes)
    end = flow.calls[0].end
    for i in range(min(region.nodes), end):
        if i not in ends and i not in derived and any(x in derived for x in flow.nodes[i].sources):
            derived.add(i)
    return derived


def read_parameters(flow: Flow, member: Member, block: str) -> tuple[str, ...]:
    """The parameters that the frame reads for the branch alone."""
    nodes, own = flow.nodes, set(member.free)
    prefix = f"{block}." if block else ""
    found: list[str] = []
    waiting = {x for i in own for x in nodes[i].sources if nodes[x].weights}
    while waiting:  # the last one first, whose readers are all known
        x = max(waiting)
        waiting.remove(x)
        if own.issuperset(flow.readers[x]):
            own.add(x)
            waiting.update(nodes[x].sources)
            if nodes[x].op == "parameter" and nodes[x].name.startswith(prefix):
                found.append(nodes[x].name[len(prefix) :])
    return tuple(dict.fromkeys(reversed(found)))


def is_absent(flow: Flow, member: Member) -> bool:
    """Whether there is nothing left to add where none of the branch's calls is made."""
    return bool(member.gates) and member.region.output in _absent(flow, member)


def works_in_function(flow: Flow, member: Member) -> bool:
    """Whether a custom autograd.Function works on a value of the branch in the frame.

    That of reentrant checkpointing does if a value from outside goes into it.
    """
    nodes = flow.nodes
    calls = [flow.calls[c] for c in member.gates if flow.calls[c].function == "checkpoint"]
    free = [i for i in member.free if nodes[i].function == "checkpoint"]
    within = {*free, *(n for call in calls for n in call.made)}
    used = {n for i in free for n in nodes[i].sources}.union(*(call.given for call in calls))
    return any(nodes[i].function == "custom" for i in member.free) or any(
        n in member.region.nodes and n not in within for n in used
    )


def sums_before(flow: Flow, member: Member, last: set[int]) -> int:
    """How many sums with something else the branch goes through before its own."""
    after = _in_frame(flow, member, _made(flow, member, last))
    count = 0
    for i in member.free:
        node = flow.nodes[i]
        if i in after and node.op in SUMS and len(node.parts) == 2:
            count += sum(x in after for x in node.parts) == 1
    return count


def is_linear(flow: Flow, member: Member, last: set[int]) -> bool:
    """Whether all from the last gates to the sum is of degree one in them (conservative)."""
    nodes = flow.nodes
    degree: dict[int, int | None] = dict.fromkeys(_made(flow, member, last), 1)
    for i in member.free:
        node = nodes[i]
        degrees = [degree.get(x, 0) for x in node.sources]
        name = node.op.rstrip("_") if not node.op.startswith("__") else node.op
        if None in degrees:
            degree[i] = None
        elif not any(degrees):
            degree[i] = 0
        elif name in _LIKE:
            known = zip(node.sources, degrees, strict=True)
            of = {d for x, d in known if nodes[x].varies or name in _JOINS}
            degree[i] = 1 if of == {1} else None
        elif node.op in _PRODUCTS:
            degree[i] = 1 if len(degrees) <= 2 and degrees.count(1) == 1 else None
        elif node.op in DIVIDE:
            degree[i] = 1 if degrees[0] == 1 and not any(degrees[1:]) else None
        elif node.op in SUMS:
            degree[i] = 1 if degrees == [1, 1] else None
        else:
            degree[i] = None
    return degree.get(member.region.output) == 1
