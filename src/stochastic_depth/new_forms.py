"""Calls in a form or a precision that has not been seen: the block is watched when they come."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .branch import Branch, block_of, choices
from .drop.site import Site
from .drop.whole import WholeSite
from .find import Samples, find, find_blocks
from .find.plan import Findings, Plan, only

__all__ = ["watch_block"]


def watch_block(
    site: Site, args: Any, kwargs: Mapping[str, Any], known_plan: Plan | None = None
) -> Plan | None:
    """What is known of a call of the site's block, from a run on just these values.

    The branches keep their identity: they are found again by what they call. Of a call in a known
    form, and in another precision, only the dtypes are found out.
    """
    if any(type(x).__name__ == "Proxy" for x in (*args, *kwargs.values())):
        warnings.warn(
            "stochastic depth: torch.fx traces the model, and what it makes does not drop: trace "
            "first (create_feature_extractor, symbolic_trace) and apply to the result",
            stacklevel=2,
        )
        return None
    samples = None
    if known_plan is None and any(branch.mode != "batch" for branch in site.branches):
        samples = site.findings.samples or Samples()
    try:
        if isinstance(site, WholeSite):
            findings = find_blocks(site.block, args, dict(kwargs), [""], samples=samples)
        else:
            findings = find(site.block, args, dict(kwargs), samples=samples)
    except Exception:  # of any kind: the call itself will raise it
        return None
    plan = next(iter(findings.plans.get("", {}).values()), Plan())
    if known_plan is not None:
        own = {_same(branch, site): plan.dtypes.get(i) for i, branch in enumerate(plan.branches)}
        dtypes = [(i, own.get(branch)) for i, branch in enumerate(known_plan.branches)]
        return replace(known_plan, dtypes={i: dtype for i, dtype in dtypes if dtype is not None})
    if site.takes_new:
        _take_new(site, plan)
    known: list[Branch | None] = [_same(branch, site) for branch in plan.branches]
    _tell_refused(site, [b for b in site.branches if b not in known], findings)
    _tell_new(site, plan)
    for branch, found in zip(known, plan.branches, strict=True):
        if branch is not None:
            branch.sums |= found.sums
            branch.joins |= found.joins
            if samples is not None and found.place is None:
                branch.place, branch.reason = None, found.reason
    plan = only(plan, [b for b, k in zip(plan.branches, known, strict=True) if k is not None])
    return replace(plan, branches=[b for b in known if b is not None])


def _take_new(site: Site, plan: Plan) -> None:
    """Drop branches that only this form of call has, at the rate of their block."""
    like = site.branches[0]
    block = block_of(like)
    known = {b.name.partition(":")[2] for b in site.findings.branches if block_of(b) == block}
    for found in plan.branches:
        if _same(found, site) is None and found.name.partition(":")[2] not in known:
            found.name = f"{block}{found.name}"
            prefix = f"{block}." if block else ""
            found.modules = tuple(prefix + name for name in found.modules)
            found.existing = tuple(prefix + name for name in found.existing)
            vars(found).update(choices(like))
            found.set_rate(like.p)
            found.order = site.branches[-1].order
            site.branches.append(found)


def _tell_refused(site: Site, missing: list[Branch], findings: Findings) -> None:
    """Warn of branches that this call has, too, and that cannot be dropped in it."""
    reasons = {refused.name.partition(":")[2]: refused.reason for refused in findings.refused}
    for branch in missing:
        reason = reasons.get(branch.name.partition(":")[2])
        if reason is not None:
            warnings.warn(
                f"stochastic depth: {branch.name} is not dropped where "
                f"{type(site.block).__name__} is called in this way: {reason}",
                stacklevel=2,
            )


def _tell_new(site: Site, plan: Plan) -> None:
    """Warn of branches that only this call has, which are not dropped."""
    before = {branch.name.partition(":")[2] for branch in site.findings.branches}
    before |= {branch.name.partition(":")[2] for branch in site.branches}
    new = [b.name for b in plan.branches if b.name.partition(":")[2] not in before]
    if new and not any(_same(branch, site) for branch in plan.branches if branch.name in new):
        warnings.warn(
            f"stochastic depth: {type(site.block).__name__} has branches in this call that apply() "
            f"did not see, and they are not dropped: {', '.join(new)}; give it example_inputs like "
            "those of training",
            stacklevel=2,
        )


def _same(found: Branch, site: Site) -> Branch | None:
    """The branch of the site that ``found``, with names below the block, is."""
    label = found.name.partition(":")[2]
    same = [b for b in site.branches if b.name.partition(":")[2] == label]
    return (
        same[0]
        if same
        else next((b for b in site.branches if b.sums.keys() & found.sums.keys()), None)
    )
