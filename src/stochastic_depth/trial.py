"""``apply`` tries what was found: each branch, dropped and at another weight, on the examples."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode

from ._torch import tree_leaves
from .branch import Branch
from .drop.draws import Draws
from .drop.force import forced, plain
from .drop.site import Site
from .find import run_weighed
from .find.plan import Findings, Refused, only
from .find.state import copied, in_mode, untouched
from .install import block_of, watch_block

__all__ = ["refuse_what_fails"]

_WEIGHT = 2.0


def refuse_what_fails(model: nn.Module, findings: Findings, args: Any, kwargs: Any) -> Findings:
    """``findings`` without the branches that cannot be left out or weighed as they should.

    The model runs with all branches dropped, in training and in evaluation, and with all of them
    counted twice; the latter is compared with the plain model whose sums count them twice. Where
    that fails, each branch is tried alone, and what fails is refused with the reason. Where samples
    are selected, the model runs with some of them dropped and is compared with one that computes
    all and masks; where that fails, samples are masked.
    """
    if any(t.is_meta for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)):
        return findings  # no values to compare
    found = [b for b in findings.branches if b.kind != "block"]
    if not found:
        return findings
    sites = [
        Site(
            model.get_submodule(name),
            [b for b in found if block_of(b) == name],
            dict(plans),
            Draws(),
            watch_block,
            findings,
        )
        for name, plans in findings.plans.items()
    ]
    for site in sites:
        site.install()
    reasons: dict[Branch, str | None] = {}
    try:
        if _failure(model, findings, found, args, kwargs) is not None:
            reasons = {b: _failure(model, findings, [b], args, kwargs) for b in found}
        _mask_what_fails(model, [b for b in found if not reasons.get(b)], args, kwargs)
    finally:
        for site in sites:
            site.uninstall()
    if not any(reasons.values()):
        return findings
    right = [b for b in findings.branches if reasons.get(b) is None]
    findings.refused += [Refused(b.name, reason) for b, reason in reasons.items() if reason]
    findings.branches = right
    findings.plans = {
        name: {form: only(plan, right) for form, plan in plans.items()}
        for name, plans in findings.plans.items()
    }
    return findings


def _failure(
    model: nn.Module, findings: Findings, branches: Sequence[Branch], args: Any, kwargs: Any
) -> str | None:
    """What is wrong where these branches are dropped, or counted twice; None where nothing is."""
    for training in (True, False):
        try:
            _run(model, args, kwargs, dict.fromkeys(branches, (True, 1.0)), training)
        except Exception as error:  # of any kind: the model cannot do without the branch
            if training and _fails_anyway(model, args, kwargs):
                continue  # BatchNorm on a single sample, say
            where = "in training " if training else ""
            return f"{where}the model fails where it is left out: {_told(error)}"
    try:
        weighed = _run(model, args, kwargs, dict.fromkeys(branches, (False, _WEIGHT)))
    except Exception as error:
        return f"the model fails where it is weighed: {_told(error)}"
    expected = run_weighed(model, args, kwargs, dict.fromkeys(branches, _WEIGHT), findings)
    if not _are_close(weighed, expected):
        return (
            "counted twice it does not change the model's output as its sum says: what it computes "
            "reaches the output in another way, too"
        )
    return None


def _fails_anyway(model: nn.Module, args: Any, kwargs: Any) -> bool:
    try:
        with plain():
            _run(model, args, kwargs, None, training=True)
    except Exception:
        return True
    return False


def _mask_what_fails(model: nn.Module, branches: Sequence[Branch], args: Any, kwargs: Any) -> None:
    """Select no samples in branches where that gives something else than masking them."""
    selected = [b for b in branches if b.place is not None]
    if not selected or _selects(model, selected, args, kwargs):
        return
    for branch in selected:
        if not _selects(model, [branch], args, kwargs):
            branch.place, branch.mask = None, branch.place or branch.mask
            branch.reason = (
                "with samples selected, the model gives something else than with all computed and "
                "the dropped ones masked: its samples are not independent"
            )


def _selects(model: nn.Module, branches: Sequence[Branch], args: Any, kwargs: Any) -> bool:
    """Whether selected samples are what they are where all are computed and masked."""
    outputs = []
    for select in (True, False):
        with ExitStack() as stack:
            for branch in branches:
                stack.callback(vars(branch).update, dict(vars(branch)))
                branch.mode, branch.scale = "row", "train"
                branch.set_rate(0.5)
                if not select and branch.place is not None:
                    branch.mask = branch.place
                    branch.place = None
            chosen = {branch: (seed, 1.0) for seed, branch in enumerate(branches)}
            try:
                outputs.append(_run(model, args, kwargs, chosen))
            except Exception:  # of any kind: the samples do not fit
                return False
    return _are_close(*outputs)


def _run(
    model: nn.Module,
    args: Any,
    kwargs: Any,
    decisions: Mapping[Branch, tuple[int, float]] | None,
    training: bool = False,
) -> Any:
    """The output; nothing is left behind."""
    with (
        untouched(model),
        in_mode(model, training),
        uncompiled(),
        torch.no_grad(),
        nullcontext() if decisions is None else forced(decisions),
        BaseTorchFunctionMode(),  # torch's fused kernels, which call no child, stay out
    ):
        args, kwargs = copied((args, kwargs))
        return model(*args, **kwargs)


def uncompiled() -> AbstractContextManager[Any]:
    """Compiled blocks run as they are written: a trial is to make no graphs."""
    if not hasattr(torch.compiler, "set_stance"):  # before torch 2.6
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def _are_close(got: Any, expected: Any) -> bool:
    a = [x for x in tree_leaves(got) if isinstance(x, Tensor)]
    b = [x for x in tree_leaves(expected) if isinstance(x, Tensor)]
    return len(a) == len(b) and all(map(_is_close, a, b))


def _is_close(a: Tensor, b: Tensor) -> bool:
    """To a thousand times the rounding of the dtype, relative to the largest number."""
    if a.shape != b.shape:
        return False
    if a.numel() == 0 or not a.is_floating_point():
        return True
    eps = torch.finfo(torch.float32 if a.dtype == torch.float64 else a.dtype).eps
    a, b = a.double(), b.double()
    known = a.isfinite() & b.isfinite()
    if bool((a.isnan() != b.isnan()).any()):
        return False
    apart = torch.where(known, a - b, 0.0).abs().max()
    size = torch.where(known, b, 0.0).abs().max()
    return bool(apart <= 1e3 * eps * (1.0 + size))
