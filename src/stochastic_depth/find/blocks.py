"""Whole blocks: what a module is given and returns, seen in one real run."""

from typing import Any

from torch import nn

from ..branch import Branch, block_of, is_below
from .batch import Samples
from .drops import find_drops, tell_drops
from .flow import Call, Flow
from .frames import Frame, Member
from .meet import record_examples
from .parts import WRITES
from .plan import Findings, Gate, Leaf, Plan, Refused
from .plans import Planned, dtypes_of
from .regions import Region
from .samples import place_samples

__all__ = ["WHOLE", "find_blocks"]

WHOLE = "(block)"  # the label of a branch that is its block; no child can be called so


def find_blocks(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    names: list[str],
    *,
    samples: Samples | None,
) -> Findings:
    """The modules of these names as one branch each, and what they return where it is dropped.

    The first floating-point tensor that a block is given is its shortcut; the first tensor that it
    returns takes its place. The arguments are those of :func:`find`.
    """
    flow = record_examples(model, args, kwargs)
    planned = Planned()
    findings = planned.findings
    findings.writes = flow.writes
    called: dict[str, list[int]] = {}
    for c, call in enumerate(flow.calls):
        called.setdefault(call.name, []).append(c)
    for name in (name for name in called if name in names):
        branch = Branch(f"{name}:{WHOLE}", "block", (name,) if name else ())
        branch.talks = flow.talks_within(called[name])
        made = {c: _region(flow, c, flow.calls[c]) for c in called[name]}
        reasons = {flow.calls[c].form: m for c, m in made.items() if isinstance(m, str)}
        if reasons:
            findings.refused.append(Refused(branch.name, next(iter(reasons.values()))))
        plans = findings.plans[name] = {form: Plan() for form in reasons}  # all its calls, or none
        for c, m in made.items():
            call = flow.calls[c]
            if isinstance(m, str) or call.form in reasons:
                continue
            region, gate = m
            planned.regions.setdefault(branch, []).append(region)
            if call.form not in plans:
                dtypes = dtypes_of(flow, [region])
                plan = Plan([branch], {"": (gate,)}, dtypes=dtypes, precision=call.precision)
                plans[call.form] = plan
                frame = Frame(c, [Member(region, gates=[c])], met=[c], gate_of={c: 0})
                planned.frames.append(frame)
    findings.branches = list(planned.regions)
    uncalled = [name for name in names if name not in called]
    findings.refused += [Refused(f"{name}:{WHOLE}", "it is not called") for name in uncalled]
    findings.nodes = {
        b: frozenset().union(*[r.nodes for r in rs]) for b, rs in planned.regions.items()
    }
    drops = find_drops(model, args, kwargs, flow.constants)
    inside = sorted(drops.modules & called.keys())
    for branch in findings.branches:
        branch.existing = tuple(name for name in inside if is_below(name, block_of(branch)))
    tell_drops(model, findings, drops, flow, products=True)
    if samples is not None:
        place_samples(model, args, kwargs, flow, planned, samples)
    return findings


def _region(flow: Flow, c: int, call: Call) -> tuple[Region, Gate] | str:
    """The block as a branch, or why it cannot be dropped."""
    nodes = flow.nodes
    main = next((i for i, n in enumerate(call.given) if n is not None and _is_float(flow, n)), None)
    output = next((i for i, n in enumerate(call.made) if n is not None), None)
    if main is None:
        return "it is called without a floating-point tensor, so it has no shortcut"
    if output is None:
        return "it returns no tensor"
    given, made = call.given[main], call.made[output]
    assert given is not None
    assert made is not None
    if nodes[given].shape != nodes[made].shape:
        return (
            f"given a tensor of shape {nodes[given].shape} it returns {nodes[made].shape}: dropped "
            "it would return its input; wrap it in StochasticDepth with a projection"
        )
    if not _is_float(flow, made):
        return "it returns no floating-point tensor"
    if call.writes:
        return WRITES.format(call.writes)
    leaves: list[Leaf] = []
    for i, (kind, n) in enumerate(zip(call.kinds, call.made, strict=True)):
        if i == output:
            leaves.append(Leaf("branch", main))
        elif n is not None and n in call.given:
            leaves.append(Leaf("argument", call.given.index(n)))
        elif kind == "none":
            leaves.append(Leaf("none"))
        elif n is not None and not flow.is_read_after(n, c):
            leaves.append(Leaf("unread"))
        else:
            what = "a tensor" if kind == "tensor" else "a value"
            return (
                f"besides its output it returns {what} that is used, and nothing can stand in for "
                "it where the block is dropped"
            )
    own = range(call.start, call.end)
    region = Region(made, given, made, frozenset(own), c, (c,), "identity", ())
    return region, Gate(0, last=True, returned=tuple(leaves), structure=call.structure)


def _is_float(flow: Flow, n: int) -> bool:
    dtype = flow.nodes[n].dtype
    return dtype is not None and dtype.is_floating_point
