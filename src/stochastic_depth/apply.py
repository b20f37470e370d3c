"""The verbs that change a model: apply and remove."""

import warnings
from collections.abc import Collection, Sequence
from typing import Any, Literal, TypeVar

from torch import nn

from . import install as _install
from ._torch import is_flat_parameter
from .applied import awaited, branches, is_applied, sites
from .branch import Branch, DroppedGrad, Mode, Scale, check_choice, check_p, choices
from .drop.draws import Draw, Draws, Ranks
from .drop.over import check_not_skipped
from .drop.slot import keep_slots, put, slot_of
from .find import find, find_blocks, guess_inputs
from .find.parts import is_writing
from .find.plan import Findings
from .garbage import few_collections
from .install import Pending, Settings, keep_identity, prefixed
from .options import call_of, samples_of, seed_of
from .patterns import Filter, listed, matching_modules, outermost, some
from .rates import DepthSchedule
from .state import load_own_state
from .trial import refuse_what_fails

__all__ = ["apply", "remove", "settle"]

M = TypeVar("M", bound=nn.Module)


def apply(
    model: M,
    p: float | Literal["model"] | None,
    *,
    schedule: DepthSchedule = "linear",
    mode: Mode = "batch",
    scale: Scale = "train",
    include: Filter = None,
    exclude: Filter = None,
    blocks: Filter = None,
    example_inputs: Any = None,
    samples: int | tuple[int, int] | None = None,
    seed: int | None = None,
    draw: Draw = "auto",
    ranks: Ranks = "auto",
    dropped_grad: DroppedGrad = "none",
) -> M:
    """Add stochastic depth to every residual branch of ``model``, in place.

    Parameters, buffers, their names, the types and forwards of all modules and, with the default
    ``scale``, the output in evaluation stay exactly as they are. In training a dropped branch is
    absent: its modules are not called. Calling ``apply`` again replaces the previous settings. If
    it raises, the model is left as it was.

    The branches are found by watching the model run on ``example_inputs``, in evaluation and
    without side effects. If you give none, inputs are made up from what the model reveals (its
    configuration, its first layer), and the first training batch settles what was found.

    Args:
        model: any module. DropPath modules in its branches are replaced by our decisions until
            :func:`remove`.
        p: the probability to drop, in [0, 1], which ``schedule`` scales with depth. ``"model"``
            takes the rates of the model's own DropPath modules (0 where a branch has none), and
            None goes with a ``schedule`` that sets the rates itself. Which p suits which model:
            docs/recipes.md.
        schedule: how the rate grows with depth: ``"linear"`` (the paper's), ``"linear-timm"``,
            ``"linear-efficientnet"``, ``"uniform"``, ``"alternating"`` (every other block), a
            function (l, L) -> p with l = 1..L, or a list; see
            :func:`stochastic_depth.rates.depth_rates`. Depth counts the blocks with a selected
            branch in the order of execution; branches of one block share its depth.
        mode: ``"batch"``, one decision per branch and call; ``"row"``, one per sample, as in timm
            and torchvision, but only the kept samples are computed; or ``"subset"``, which keeps a
            fixed number of the B samples, the one nearest to B (1-p).
        scale: ``"train"``, a kept branch is divided by 1-p; ``"eval"``, the branch is multiplied
            by 1-p in evaluation (the paper); ``"none"`` (LayerDrop).
        include: which branches: globs on their names, names of modules (all below them), block
            types, functions of a :class:`Branch`, or a list of these. None is all.
        exclude: branches to leave alone, in the same forms.
        blocks: drop whole blocks (LayerDrop): globs on the names of modules, types, functions
            (name, module) -> bool, or a list of these; ``"all"`` is every block in which branches
            are found and that is in no other. A dropped one returns the first tensor it is given.
        example_inputs: what the model is called with: a tensor, a tuple of arguments or a dict of
            keywords, with at least two samples.
        samples: the dimension in which the inputs have the samples of the batch, which
            ``"row"`` and ``"subset"`` drop; or (dimension, rows), where so many neighbouring rows
            are one sample and dropped together, as the frames of a video. None finds out.
        seed: draw from a generator of the model's own, seeded with this, instead of torch's
            default one. Neither it nor ``draw="balanced"`` can be used inside torch.compile of the
            whole model.
        draw: how decisions in ``"batch"`` mode are drawn: ``"independent"``, each by itself;
            ``"balanced"``, so that every call of the model in training drops equally many branches,
            the sum of the rates, rounded down or up, and each branch at exactly its own rate;
            ``"auto"``, balanced in a process group of several ranks, where a step takes as long as
            the rank that drops least.
        ranks: how the ranks of a process group share decisions: ``"shared"`` makes the same ones
            on all, ``"separate"`` lets each draw its own (equally many, where they are balanced),
            ``"auto"`` shares them where ranks would otherwise wait for each other (FSDP inside a
            branch, SyncBatchNorm, tensor parallelism) and nowhere else.
        dropped_grad: the gradient of the parameters of a dropped branch. ``"none"``: none, so the
            optimizer leaves them as they are; ``"zero"``: zeros, as from a mask. In a process group
            it is always zeros, which are averaged with the other ranks' gradients.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: a bad argument; no residual branch found; a pattern that matches
            nothing; a model that fails on ``example_inputs``.

    Example:
        >>> import torch, stochastic_depth as sd
        >>> layer = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        >>> model = sd.apply(torch.nn.TransformerEncoder(layer, 2), p=0.2)
        >>> [round(branch.p, 3) for branch in sd.branches(model)]
        [0.1, 0.1, 0.2, 0.2]

    Reference:
        Huang et al., Deep Networks with Stochastic Depth, ECCV 2016 (arXiv:1603.09382); Fan et
        al., Reducing Transformer Depth on Demand with Structured Dropout (LayerDrop), ICLR 2020
        (arXiv:1909.11556). Balanced draws: Madow, On the Theory of Systematic Sampling, II, Annals
        of Mathematical Statistics 20, 1949.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for value, allowed, name in (
        (mode, Mode, "mode"),
        (scale, Scale, "scale"),
        (draw, Draw, "draw"),
        (ranks, Ranks, "ranks"),
        (dropped_grad, DroppedGrad, "dropped_grad"),
    ):
        check_choice(value, allowed, name)
    if isinstance(p, str) and p == "model":
        if schedule != "linear":
            raise ValueError(f"p='model' takes the model's own rates: drop schedule={schedule!r}")
    elif p is not None:
        p = check_p(p)
    if seed is not None:
        seed = seed_of(seed)
    if draw == "balanced" and mode != "batch":
        raise ValueError(
            f"draw='balanced' is for mode='batch', got mode={mode!r}; mode='subset' computes "
            "equally many samples in every call"
        )
    if blocks is not None and (include is not None or exclude is not None):
        raise ValueError(
            "blocks says which blocks are dropped; include and exclude are for branches"
        )
    if any(map(is_flat_parameter, model.parameters())):
        raise ValueError(
            "FullyShardedDataParallel has flattened the model's parameters, so that it cannot run "
            "alone: apply first and wrap then (fully_shard may come first)"
        )
    settings = Settings(
        p, schedule, mode, scale, dropped_grad,
        listed(include, "include"), listed(exclude, "exclude"), listed(blocks, "blocks"),
        Draws(seed, ranks, draw), samples_of(samples, mode),
    )  # fmt: skip
    check_not_skipped(model, "apply() is called")
    with few_collections():
        put_back = keep_slots(model)
        _install.remove(model)
        try:
            _apply(model, example_inputs, settings)
        except BaseException:
            put_back()
            raise
    return model


def _apply(model: nn.Module, example_inputs: Any, settings: Settings) -> None:
    if example_inputs is not None:
        args, kwargs = call_of(example_inputs)
        findings = _find(model, args, kwargs, settings)
        complete(model, refuse_what_fails(model, findings, args, kwargs), settings)
        return
    findings, parts = Findings(), {"": model}
    whole = guess_inputs(model)
    if whole is not None:
        findings = _find(model, *whole, settings)
    else:  # a wrapper around networks that are called by themselves, perhaps
        if settings.blocks not in (None, "all"):
            matching_modules(model, settings.blocks)
        parts |= {n: m for n, m in model.named_children() if any(True for _ in m.parameters())}
        for name, part in parts.items():
            if name and (guess := guess_inputs(part)) is not None:
                found = prefixed(_find(part, *guess, settings), name)
                findings.branches += found.branches
                findings.plans |= found.plans
                findings.refused += found.refused
                findings.unused += found.unused
    if findings.branches or whole is not None:
        _install.install(model, findings, settings)
        _tell_unused(findings)
    else:
        warnings.warn(
            f"stochastic depth: {type(model).__name__} says too little of its inputs to run it, so "
            "its branches will be found in the first training call; to find them now, pass "
            "example_inputs",
            stacklevel=4,
        )
    for pending in [Pending(model, part, settings) for part in parts.values()]:
        put(pending.part).site = pending


def _find(model: nn.Module, args: Any, kwargs: Any, settings: Settings) -> Findings:
    samples = None if settings.mode == "batch" else settings.samples
    if settings.blocks is None:
        return find(model, args, kwargs, samples=samples)
    if settings.blocks == "all":
        names = outermost(find(model, args, kwargs, samples=None).branches)
    else:
        names = matching_modules(model, settings.blocks)
    return find_blocks(model, args, kwargs, names, samples=samples)


def _tell_unused(findings: Findings) -> None:
    if findings.unused:
        warnings.warn(
            "stochastic depth: the model has stochastic depth of its own that is not replaced and "
            "goes on dropping: "
            + "; ".join(f"{r.name or 'the model'}: {r.reason}" for r in findings.unused[:3]),
            stacklevel=5,
        )


def _tell_writing(findings: Findings) -> None:
    """Say what is not dropped for the way in which the model is called, which is easily changed."""
    writing = [r for r in findings.refused if is_writing(r.reason)]
    if writing:
        warnings.warn(
            "stochastic depth: branches that write into what they are given are not dropped: "
            f"{some([r.name for r in writing])}\n  {writing[0].reason}",
            stacklevel=5,
        )


def complete(
    model: nn.Module,
    findings: Findings,
    settings: Settings,
    tell: bool = True,
    beside: Sequence[Branch] | None = None,
) -> None:
    """Set up what was found on real inputs, and say what users should know of it."""
    chosen = _install.install(model, findings, settings, beside)
    if tell:
        _tell_unused(findings)
    _tell_writing(findings)
    if findings.batched and 0 not in findings.batched and settings.samples.dim is None:
        (dim, *_) = findings.batched
        warnings.warn(
            f"mode={settings.mode!r}: samples are taken to be in dimension {dim} of the inputs, as "
            f"they stay apart there and not in dimension 0; say so with samples={dim}, or give the "
            "dimension in which they are",
            stacklevel=5,
        )
    rows = [f"{b.name} ({b.place.fold} rows)" for b in chosen if b.place and b.place.fold > 1]
    if rows and settings.mode != "batch" and settings.samples.rows == 1:
        warnings.warn(
            "samples are taken to be as many neighbouring rows as in the example; where that "
            f"number varies from batch to batch, use mode='batch': {some(rows)}",
            stacklevel=5,
        )
    masked = [b for b in chosen if settings.mode != "batch" and b.place is None]
    if masked:
        reasons = list(dict.fromkeys(b.reason for b in masked if b.reason))
        warnings.warn(
            f"mode={settings.mode!r}: samples cannot be selected in {len(masked)} of {len(chosen)} "
            "branches, so all are computed there and the dropped ones masked (correct, but no "
            f"speed-up): {some([b.name for b in masked])}"
            + "".join(f"\n  {reason}" for reason in reasons[:3]),
            stacklevel=5,
        )


@few_collections()
def settle(pending: Pending, args: Any, kwargs: dict[str, Any]) -> None:
    """Find on a real batch what was found on inputs that were made up, or not at all.

    A branch that is found again keeps its identity, what was set of it since ``apply``, and the
    share of its target that a RateSchedule has given it; others get that of the schedule. What was
    applied to a part since stays as it is, and so does what was removed.
    """
    model, part, settings, given = pending.model, pending.part, pending.settings, pending.given
    check_not_skipped(part, "the first training call, which settles the branches, comes")
    others = _install.others_in(part, settings)
    foreign = {b for module in others for b in branches(module)}
    gone = [block for block in pending.blocks if not is_applied(block)]
    before = {branch.name: branch for branch in branches(part) if branch not in foreign}
    changed = {b: choices(b) for b in before.values()}
    changed = {b: chosen for b, chosen in changed.items() if chosen != given.get(b)}
    factors = {b: b.p / b.target for b in before.values() if b.target > 0.0}
    name = next(name for name, module in model.named_modules() if module is part)
    beside = None if part is model else _beside(pending, before.values())
    refused = _install.refused_beside(pending, name)
    put_back, slot = keep_slots(part), slot_of(part)
    _install.remove(part)
    try:
        findings = refuse_what_fails(part, _find(part, args, kwargs, settings), args, kwargs)
        findings = prefixed(findings, name)
        findings.refused += refused
        _install.tell_lost(before.values(), findings)
        tell = not before  # else it was said of the inputs that were made up
        complete(model, keep_identity(findings, before), settings, tell, beside)
        if slot_of(part) is not None:
            slot.site = slot_of(part).site  # for a part that has been compiled with its slot
        for branch in branches(part):
            vars(branch).update(changed.get(branch, {}))
            branch.set_rate(factors.get(branch, pending.factor) * branch.target)
        for site in _install.sites_of(pending):
            site.findings.refused = findings.refused
        _install.put_others(others, gone)
        if pending.saved is not None:
            load_own_state(*pending.saved)
    except BaseException:
        put_back()
        raise


def _beside(pending: Pending, own: Collection[Branch]) -> list[Branch] | None:
    """The branches of other parts of the model; None where nothing is left to be found there."""
    found = [b for s in _install.sites_of(pending) for b in s.branches]
    beside = sorted((b for b in found if b not in own), key=lambda b: b.order)
    waits = any(other is not pending for other in awaited(pending.model))
    return beside if beside or waits else None


def remove(model: M) -> M:
    """Undo :func:`apply`.

    Args:
        model: a module; one without stochastic depth is left alone.

    Returns:
        The model.

    Example:
        >>> import torchvision, stochastic_depth as sd
        >>> model = sd.apply(torchvision.models.resnet18(), 0.2)
        >>> sd.branches(sd.remove(model))
        []
    """
    check_not_skipped(model, "remove() is called")
    for site in sites(model):
        site.draws.withdraw(site.branches)  # others may be balanced with them
    _install.remove(model)
    return model
