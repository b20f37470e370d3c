"""Calls in a form or a precision that has not been seen: the block is watched when they come."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from .branch import Branch, block_of, choices, label_of, put_below
from .drop.collectives import has_units, needs_all_ranks
from .drop.ranks import world_size
from .drop.site import Site
from .drop.whole import WholeSite
from .find import Samples, find, find_blocks
from .find.plan import Findings, Gate, Plan, Refused, only
from .find.samples import NOWHERE

__all__ = ["watch_block"]

_Gates = dict[str, tuple[Gate, ...]]


def watch_block(
    site: Site, args: Any, kwargs: Mapping[str, Any], known_plan: Plan | None = None
) -> Plan | None:
    """What is known of a call of the site's block, from a run on just these values.

    The branches keep their identity: they are found again by what they call. Of a call in a known
    form, and in another precision, only dtypes are found out.
    """
    if any(type(x).__name__ == "Proxy" for x in (*args, *kwargs.values())):
        warnings.warn(
            "stochastic depth: torch.fx traces the model, and what it makes does not drop: trace "
            "first (create_feature_extractor, symbolic_trace) and apply to the result",
            stacklevel=2,
        )
        return None
    if known_plan is None and world_size() > 1 and has_units(site.block):
        _refuse_alone(site)
        return None
    samples = None
    if known_plan is None and any(branch.mode != "batch" for branch in site.branches):
        samples = site.findings.samples or Samples()
    try:
        if isinstance(site, WholeSite):
            findings = find_blocks(site.block, args, dict(kwargs), [""], samples=samples)
        else:
            findings = find(site.block, args, dict(kwargs), samples=samples)
    except Exception as error:  # of any kind: the call itself may raise it, too
        told = (str(error) or type(error).__name__).splitlines()[0][:200]
        warnings.warn(
            f"stochastic depth: nothing is dropped where {type(site.block).__name__} is called in "
            f"this way, as it could not be watched: {told}",
            stacklevel=2,
        )
        return None
    plan = next(iter(findings.plans.get("", {}).values()), Plan())
    if known_plan is not None:
        own = {
            b: plan.dtypes[i] for i, b in enumerate(_known(plan.branches, site)) if i in plan.dtypes
        }
        dtypes = {i: own[b] for i, b in enumerate(known_plan.branches) if b in own}
        return replace(known_plan, dtypes=dtypes, gates=_in_precision(known_plan.gates, plan.gates))
    if site.takes_new:
        _take_new(site, plan)
    known = _known(plan.branches, site)
    _tell_refused(site, [b for b in site.branches if b not in known], findings)
    _tell_new(site, [b for b, k in zip(plan.branches, known, strict=True) if k is None])
    for branch, found in zip(known, plan.branches, strict=True):
        if branch is not None:
            branch.sums |= found.sums
            branch.joins |= found.joins
            branch.talks |= found.talks
            if samples is not None:
                _place(site, branch, found)
    plan = only(plan, [b for b, k in zip(plan.branches, known, strict=True) if k is not None])
    return replace(plan, branches=[b for b in known if b is not None])


def _in_precision(known: _Gates, found: _Gates) -> _Gates:
    """The gates as they are known, with the dtypes of what they return as they were found now."""
    gates = {path: list(calls) for path, calls in known.items()}
    for path, calls in found.items():
        for i, (gate, now) in enumerate(zip(gates.get(path, ()), calls, strict=False)):
            if len(gate.returned) == len(now.returned):
                leaves = zip(gate.returned, now.returned, strict=True)
                gates[path][i] = replace(
                    gate, returned=tuple(leaf._replace(dtype=new.dtype) for leaf, new in leaves)
                )
    return {path: tuple(calls) for path, calls in gates.items()}


def _refuse_alone(site: Site) -> None:
    """Say that a block is not watched, as it would gather parameters on a rank that comes alone.

    Raises:
        RuntimeError: the other ranks may drop what runs here, and it waits for them.
    """
    block = type(site.block).__name__
    why = (
        "FSDP shards it, and to watch it this rank would wait for others that are not called so; "
        "give apply() example_inputs in this form, or call the model so once, in training, before "
        "it is sharded"
    )
    if any(needs_all_ranks(branch, site.block)[0] for branch in site.branches):
        raise RuntimeError(f"stochastic depth: {block} is called in a new form, and {why}")
    warnings.warn(
        f"stochastic depth: nothing is dropped where {block} is called in this way: {why}",
        stacklevel=2,
    )


def _place(site: Site, branch: Branch, found: Branch) -> None:
    """Select or mask samples only where its sum has them in one place in all forms of the call."""
    if found.place is None:
        branch.place, branch.reason = None, found.reason
    if found.mask == branch.mask or branch.mask.dim < 0:
        return
    branch.place, branch.mask = None, NOWHERE
    branch.reason = found.reason or "in calls of another form its sum has the samples elsewhere"
    if branch.mode != "batch":
        warnings.warn(
            f"stochastic depth: {branch.name} is dropped for the whole batch from now on, as "
            f"{type(site.block).__name__} is called in this way: {branch.reason}",
            stacklevel=2,
        )


def _take_new(site: Site, plan: Plan) -> None:
    """Drop branches that only this form of call has, at the rate of their block."""
    like = site.branches[0]
    before = _labels(site, site.findings.branches)
    for found, known in zip(plan.branches, _known(plan.branches, site), strict=True):
        if known is None and label_of(found) not in before:
            put_below(found, block_of(like))
            vars(found).update(choices(like), knows_samples=like.knows_samples)
            found.set_rate(like.p)
            found.order = site.branches[-1].order
            site.branches.append(found)


def _tell_refused(site: Site, missing: list[Branch], findings: Findings) -> None:
    """Warn of branches that this call has, too, and that cannot be dropped in it."""
    reasons = {label_of(refused): refused.reason for refused in findings.refused}
    for branch in missing:
        reason = reasons.get(label_of(branch))
        if reason is not None:
            warnings.warn(
                f"stochastic depth: {branch.name} is not dropped where "
                f"{type(site.block).__name__} is called in this way: {reason}",
                stacklevel=2,
            )


def _tell_new(site: Site, unknown: list[Branch]) -> None:
    """Warn of branches that only this call has, which are not dropped."""
    before = _labels(site, site.findings.branches)
    new = [branch.name for branch in unknown if label_of(branch) not in before]
    if new:
        warnings.warn(
            f"stochastic depth: {type(site.block).__name__} has branches in this call that apply() "
            f"did not see, and they are not dropped: {', '.join(new)}; give it example_inputs like "
            "those of training",
            stacklevel=2,
        )


def _known(found: list[Branch], site: Site) -> list[Branch | None]:
    """The branches of the site that those found, with names below the block, are.

    They go by their labels, or, where other modules are called, by the expression of their sum, if
    no other branch is added there.
    """
    by_label = {label_of(branch): branch for branch in site.branches}
    seen = _labels(site, [*site.findings.branches, *site.findings.refused])
    known = [by_label.get(label_of(branch)) for branch in found]
    for i, branch in enumerate(found):
        if known[i] is None and label_of(branch) not in seen:
            at = [b for b in site.branches if b.sums.keys() & branch.sums.keys()]
            here = [b for b in found if b.sums.keys() & branch.sums.keys()]
            if len(at) == len(here) == 1 and at[0] not in known:
                known[i] = at[0]
    return known


def _labels(site: Site, found: Iterable[Branch | Refused]) -> set[str]:
    """The labels of those found in the site's block."""
    block = block_of(site.branches[0])
    return {label_of(b) for b in (*found, *site.branches) if block_of(b) == block}
