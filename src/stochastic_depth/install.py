"""From what was found to slots in the model, and from the first real batch to what was found."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ._torch import is_in_torch_func, outside_graphs
from .applied import branches, sites
from .branch import (
    COUNTS,
    Branch,
    DroppedGrad,
    Mode,
    Scale,
    block_of,
    choices,
    is_below,
    name_in_model,
    put_below,
)
from .drop.collectives import own_parameters
from .drop.draws import Draws
from .drop.pass_on import Unfused
from .drop.site import Site
from .drop.slot import Slot, outer_slot, put, slot_of, take_out
from .drop.whole import WholeSite
from .find import Samples, rate_of
from .find.parts import is_writing
from .find.plan import Findings, Refused, only
from .new_forms import watch_block
from .patterns import Filter, choose
from .rates import DepthSchedule, depth_rates

__all__ = [
    "Pending",
    "Settings",
    "by_block",
    "install",
    "keep_identity",
    "others_in",
    "prefixed",
    "put_others",
    "refused_beside",
    "remove",
    "sites_of",
    "tell_lost",
]


@dataclass(frozen=True)
class Settings:
    """How the branches of a model are chosen and dropped: the arguments of ``apply``."""

    p: Any
    schedule: DepthSchedule
    mode: Mode
    scale: Scale
    dropped_grad: DroppedGrad
    include: Filter
    exclude: Filter
    blocks: Filter
    draws: Draws
    samples: Samples


def by_block(branches: Iterable[Branch]) -> dict[str, list[Branch]]:
    """Branches by the qualified names of their blocks."""
    found: dict[str, list[Branch]] = {}
    for branch in branches:
        found.setdefault(block_of(branch), []).append(branch)
    return found


def install(
    model: nn.Module,
    findings: Findings,
    settings: Settings,
    beside: Sequence[Branch] | None = None,
) -> list[Branch]:
    """Set up the branches of ``findings`` that are chosen, and put slots into their blocks.

    Where these were made of a child that is called by itself, ``beside`` are the branches of the
    others, which count for depth and stay as they are.

    Raises:
        ValueError: nothing was found, a pattern matches nothing, rates that do not fit.
    """
    if beside is None and not findings.branches:
        raise ValueError(nothing_found(model, findings, settings.blocks))
    found = [*(beside or ()), *findings.branches]
    if beside:
        children = [name for name, _ in model.named_children()]
        found.sort(key=lambda b: children.index(block_of(b).partition(".")[0]))
    every = choose(model, found, settings.include, settings.exclude, strict=beside is None)
    chosen = [branch for branch in every if branch not in (beside or ())]
    rates = rates_of(model, _counted(every, chosen, settings), settings) if chosen else {}
    for order, branch in enumerate(every):
        branch.order = order
    for branch in chosen:
        branch.p = rates[branch]
        branch.knows_samples = settings.mode != "batch"
        branch.mode, branch.scale = settings.mode, settings.scale
        branch.dropped_grad = settings.dropped_grad
    about = replace(findings, plans={}, nodes={}, merges={}, constants=[])
    of_block = by_block(chosen)
    # What a branch costs, to balance decisions by. FLOPs would take another run of the model, and
    # are no better where it counts: see docs/benchmarks.md.
    sizes: dict[Branch, int] = {}
    for name, plans in findings.plans.items():
        if mine := of_block.get(name):
            kept = {form: only(plan, mine) for form, plan in plans.items()}
            kind = WholeSite if mine[0].kind == "block" else Site
            block = model.get_submodule(name)
            site = kind(block, mine, kept, settings.draws, watch_block, about)
            site.takes_new = settings.include is None and settings.exclude is None
            site.install()
            sizes |= {b: sum(p.numel() for p in own_parameters(b, site)) for b in mine}
            for wrapper in compiled_around(model, name):
                put(wrapper).site = site
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and hasattr(module, "layers"):
            slot = put(module)
            slot.site = slot.site or Unfused(module)
    settings.draws.deal(chosen, findings.nodes, [sizes[branch] for branch in chosen])
    return chosen


def _counted(every: list[Branch], chosen: list[Branch], settings: Settings) -> list[Branch]:
    """The branches that count for depth: of one part alone where the rates are those of its own."""
    rates: Any = settings.schedule
    is_list = isinstance(rates, Sequence) and not isinstance(rates, str)
    blocks = {block_of(branch) for branch in chosen}
    return chosen if is_list and len(rates) == len(blocks) else every


def compiled_around(model: nn.Module, name: str) -> list[nn.Module]:
    """What torch.compile(block) has put in a block's place: decisions are made outside of it."""
    parent, _, last = name.rpartition(".")
    return [model.get_submodule(parent)] if last == "_orig_mod" else []


def rates_of(model: nn.Module, chosen: list[Branch], settings: Settings) -> dict[Branch, float]:
    """The rates of the branches, by the depth of their blocks or from their DropPath modules."""
    if settings.p == "model":
        return dict(zip(chosen, _own_rates(model, chosen), strict=True))
    blocks = list(dict.fromkeys(map(block_of, chosen)))
    rates = depth_rates(settings.schedule, settings.p, len(blocks))
    by_block = dict(zip(blocks, rates, strict=True))
    return {branch: by_block[block_of(branch)] for branch in chosen}


def _own_rates(model: nn.Module, chosen: list[Branch]) -> list[float]:
    modules = {name: model.get_submodule(name) for b in chosen for name in b.existing}
    # timm has an Identity where the rate is 0.
    own = {n: rate_of(m) for n, m in modules.items() if not isinstance(m, nn.Identity)}
    if not own:
        raise ValueError(
            "p='model' keeps the rates of a model's DropPath modules, but "
            f"{type(model).__name__} has none in its residual branches; give p as a number"
        )
    for name, rate in own.items():
        if rate is None:
            raise ValueError(
                f"p='model' cannot read the rate of {name}, a {type(modules[name]).__name__}: "
                "give it an attribute drop_prob, or give p as a number"
            )
    return [max((own.get(name) or 0.0 for name in b.existing), default=0.0) for b in chosen]


def nothing_found(model: nn.Module, findings: Findings, blocks: Filter) -> str:
    """The error for a model without branches, with the reasons that are known."""
    refused = [*findings.refused, *findings.unused]
    reasons = "".join(f"\n  {r.name or 'the model'}: {r.reason}" for r in refused[:10])
    told = f" Skipped:{reasons}" if reasons else ""
    if blocks not in (None, "all"):
        return f"none of the blocks of blocks={blocks!r} can be dropped.{told}"
    return (
        f"no residual branch found in {type(model).__name__}: stochastic depth needs sums of a "
        f"shortcut and a branch. To drop blocks that have none, name them with blocks=.{told}"
    )


def keep_identity(findings: Findings, before: Mapping[str, Branch]) -> Findings:
    """The same findings, with the branches of before where they are found again."""
    for i, found in enumerate(findings.branches):
        known = before.get(found.name)
        if known is None:
            continue
        vars(known).update({name: x for name, x in vars(found).items() if name not in COUNTS})
        findings.branches[i] = known
        findings.nodes[known] = findings.nodes.pop(found, frozenset())
        findings.merges[known] = findings.merges.pop(found, ())
        for plans in findings.plans.values():
            for plan in plans.values():
                plan.branches = [known if b is found else b for b in plan.branches]
    return findings


class Pending:
    """Stands in the slot of a model whose branches only the first real batch settles.

    Until then the branches are those that were found on inputs that were made up, or none.

    Args:
        model: what stochastic depth was applied to.
        part: the module whose first call settles what is in it: the model, or a child of one that
            is not called itself.
        settings: the arguments of ``apply``.
    """

    is_root = True

    def __init__(self, model: nn.Module, part: nn.Module, settings: Settings) -> None:
        self.model, self.part, self.settings = model, part, settings
        self.under = put(part).site  # the part's own site, if it is a block
        self.factor = 1.0  # what a RateSchedule multiplies targets with
        self.saved: Any = None  # the model and the state that was loaded, to be restored then
        self.given = {branch: choices(branch) for branch in branches(part)}
        # A graph that asks the dict holds on to its keys' rates, and is made anew with each.
        self.found_any = bool(self.given)
        self.blocks = [site.block for site in sites(part)]

    def is_active(self) -> bool:
        return self._settles() or (self.under is not None and self.under.is_active())

    def _settles(self) -> bool:
        """Whether a call now is the first real one.

        In a graph what was found on inputs that were made up has to do, where anything was.
        """
        return self.part.training and not (self.found_any and torch.compiler.is_compiling())

    def run(self, slot: Slot, args: Any, kwargs: Any) -> Any:
        """Find on a real batch, then make the call."""
        if self._settles():
            return self._settle(args, kwargs)
        return self.under.run(slot, args, kwargs)

    @outside_graphs
    def _settle(self, args: Any, kwargs: Any) -> Any:
        from .apply import settle

        if is_in_torch_func():  # whose tensors cannot be looked at
            raise RuntimeError(
                "stochastic depth: the first training call, which settles the branches, comes "
                "inside of a transform of torch.func: pass example_inputs to apply(), or call the "
                "model once in training before"
            )
        settle(self, args, dict(kwargs))
        return self.part(*args, **kwargs)


def sites_of(pending: Pending) -> list[Site]:
    """The blocks with branches of the same ``apply``, in all parts of the model."""
    return [site for site in sites(pending.model) if site.draws is pending.settings.draws]


def refused_beside(pending: Pending, name: str) -> list[Refused]:
    """What was refused outside of the part of this name, where there may be no block to hold it."""
    refused = dict.fromkeys(r for site in sites_of(pending) for r in site.findings.refused)
    return [r for r in refused if not is_below(block_of(r), name)]


def others_in(part: nn.Module, settings: Settings) -> dict[nn.Module, Any]:
    """By module below ``part``, what another ``apply`` than that with ``settings`` put there."""
    found: dict[nn.Module, Any] = {}
    for module in part.modules():
        slot = outer_slot(module) or slot_of(module)
        site = None if slot is None else slot.site
        if module is not part and isinstance(site, Site | Pending):
            draws = site.draws if isinstance(site, Site) else site.settings.draws
            if draws is not settings.draws:
                found[module] = site
    return found


def tell_lost(before: Iterable[Branch], findings: Findings) -> None:
    """Report the branches that were found on made-up inputs and are not there on the real ones."""
    called = {name for branch in findings.branches for name in branch.modules}
    lost = []
    for name in [b.name for b in before if called.isdisjoint(b.modules)]:
        reasons = [r.reason for r in findings.refused if is_below(r.name, name)]
        if not reasons:
            findings.refused.append(Refused(name, _LOST))
        if not any(map(is_writing, reasons)):  # which is told of all
            lost.append(f"{name}: {reasons[0] if reasons else _LOST}")
    if lost:
        warnings.warn(
            "stochastic depth: apply() found branches on inputs that it made up, and on the first "
            f"training batch {len(lost)} of them cannot be dropped:\n  " + "\n  ".join(lost[:3]),
            stacklevel=6,
        )


_LOST = "it is not in the first training batch's run: give apply() example_inputs to know before"


def put_others(others: Mapping[nn.Module, Any], gone: Iterable[nn.Module]) -> None:
    """Put :func:`others_in` back, and leave nothing else there nor in the blocks that are gone."""
    for block in {*others, *gone}:
        slot = slot_of(block)
        if slot is not None and isinstance(slot.site, Site):
            slot.site.uninstall()
    for module, site in others.items():
        if isinstance(site, Site):
            site.install()
            continue
        if isinstance(site.under, Site):
            site.under.install()
        put(module).site = site


def prefixed(findings: Findings, prefix: str) -> Findings:
    """The same with the names of the whole model, of which a part was run."""
    if not prefix:
        return findings
    for branch in findings.branches:
        put_below(branch, prefix)
    findings.plans = {name_in_model(name, prefix): plans for name, plans in findings.plans.items()}
    findings.refused = [Refused(name_in_model(r.name, prefix), r.reason) for r in findings.refused]
    findings.unused = [Refused(name_in_model(r.name, prefix), r.reason) for r in findings.unused]
    return findings


def remove(model: nn.Module) -> None:
    """Take out all slots of ``model``."""
    for module in model.modules():
        slot = outer_slot(module) or slot_of(module)
        if slot is None:
            continue
        waits = isinstance(slot.site, Pending)
        site = slot.site.under if waits else slot.site
        if isinstance(site, Site):
            site.uninstall()
        if waits or isinstance(site, Site | Unfused):
            take_out(module)
