"""``apply`` tries what was found: each branch, dropped and at another weight, on the examples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode

from ._torch import tensor_leaves
from .branch import Branch, block_of, is_below
from .drop.decide import choose_samples
from .drop.draws import Draws
from .drop.force import forced, plain
from .drop.merging import slots
from .drop.part import parts_in
from .drop.site import Site
from .drop.slot import here
from .drop.whole import WholeSite
from .find import first_samples, run_weighed
from .find.checks import kept_in
from .find.meet import plainly
from .find.noise import NoNoise
from .find.plan import Findings
from .find.state import Kept, attributes, copied, in_mode, untouched
from .find.unwritten import unwritten
from .find.weighed import AnotherWay, Weight
from .find.zeros import without, zeros_in
from .install import by_block
from .new_forms import watch_block

__all__ = ["refuse_what_fails"]

_WEIGHT = 2.0
_NOT_THE_FIRST = 1  # a seed that selects others than the first samples


def refuse_what_fails(model: nn.Module, findings: Findings, args: Any, kwargs: Any) -> Findings:
    """``findings`` without the branches that cannot be left out or weighed as they should.

    The model runs with all branches dropped, in training and in evaluation, and with all of them
    counted twice, or on some samples twice and on the others not at all; what it gives in
    evaluation is compared with the plain model whose sums count them so. Where that fails, each
    branch is tried alone, and what fails is refused with the reason. Where samples are selected and
    that fails, selecting is compared with computing all and masking, and where these differ,
    samples are masked. Blocks that are dropped as a whole enter no sum: of them, what the model
    returns has to keep its form.
    """
    if any(t.is_meta for t in tensor_leaves((args, kwargs))):
        return findings  # no values to compare
    found = findings.branches
    whole = any(b.kind == "block" for b in found)
    if not found:
        return findings
    of_block = by_block(found)
    kind = WholeSite if whole else Site
    sites = [
        kind(
            model.get_submodule(name),
            of_block.get(name, []),
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
        trial = _Trial(model, findings, args, kwargs)
        failure = trial.fails_without_blocks if whole else trial.failure
        if whole or not trial.is_right_at_once(found):
            if failure(found) is not None:
                reasons = _reasons(found, failure)
            trial.mask_what_fails([b for b in found if not reasons.get(b)])
    finally:
        for site in sites:
            site.uninstall()
        for branch in found:
            branch.decided = branch.dropped = 0
    findings.refuse({branch: reason for branch, reason in reasons.items() if reason})
    return findings


def _reasons(
    branches: Sequence[Branch], failure: Callable[[Sequence[Branch]], str | None]
) -> dict[Branch, str | None]:
    """What is wrong with each of them alone, or with those of a block, or with all together."""
    reasons = {b: failure([b]) for b in branches}
    for groups in (by_block(branches).values(), [branches]):
        if not any(reasons.values()):
            for together in groups:
                reasons |= dict.fromkeys(together, failure(together))
    return reasons


def _by_level(branches: Sequence[Branch]) -> list[list[Branch]]:
    """Blocks by how many others they are in: these would leave other samples to choose from."""
    levels: dict[int, list[Branch]] = {}
    for b in branches:
        around = [o for o in branches if o.kind == "block" and is_below(block_of(b), block_of(o))]
        levels.setdefault(len(around), []).append(b)
    return list(levels.values())


class _Trial:
    """Runs of a model with its branches dropped or weighed, which leave nothing behind."""

    def __init__(self, model: nn.Module, findings: Findings, args: Any, kwargs: Any) -> None:
        self.model, self.findings, self.inputs = model, findings, (args, kwargs)
        self.kept, self.zeros = Kept(model), zeros_in(model)

    def is_right_at_once(self, branches: Sequence[Branch]) -> bool:
        """Whether nothing is wrong with all of them, where there are some that select samples."""
        selected = [b for b in branches if b.place is not None]
        if not selected or self.fails_without(branches) is not None:
            return False
        weights: dict[Branch, Weight] = dict.fromkeys(branches, _WEIGHT)
        with _choosing(selected) as chosen:
            weights |= {b: partial(_weighed, b, seed) for b, (seed, _) in chosen.items()}
            decisions = {**dict.fromkeys(branches, (False, _WEIGHT)), **chosen}
            try:
                return self.agrees(self.run(decisions, self.inputs), weights, self.inputs)
            except Exception:  # of any kind: which of them it is will be tried
                return False

    def failure(self, branches: Sequence[Branch]) -> str | None:
        """What is wrong where these are dropped, or counted twice; None where nothing is."""
        if (reason := self.fails_without(branches)) is not None:
            return reason
        few = first_samples(self.inputs, 1)
        if few is not None:
            try:
                if self.weighed_differs(branches, few) is None:
                    return None
            except Exception:  # of any kind: it takes no single sample
                pass
        return self.weighed_differs(branches, self.inputs)

    def fails_without_blocks(self, blocks: Sequence[Branch]) -> str | None:
        """The same for whole blocks, which leave what the model returns in its form."""
        try:
            kept, left = (
                self.run(dict.fromkeys(blocks, (dropped, 1.0)), self.inputs)
                for dropped in (False, True)
            )
        except Exception as error:  # of any kind, as below
            return f"the model fails where it is left out: {_told(error)}"
        before, after = len(tensor_leaves(kept)), len(tensor_leaves(left))
        if before != after:
            return (
                f"where it is left out, the model returns {after} tensors and not {before}: hooks "
                "collect what it returns, as for output_hidden_states=True; call the model without"
            )
        return None

    def fails_without(self, branches: Sequence[Branch]) -> str | None:
        """How the model fails where these are dropped; None where it does not."""
        dropped = dict.fromkeys(branches, (True, 1.0))
        for training in (True, False):
            try:
                output = self.run(dropped, self.inputs, training)
            except _Kept as error:
                return str(error)
            except Exception as error:  # of any kind: the model cannot do without the branch
                if training and self.fails_anyway():
                    continue  # BatchNorm on a single sample, say
                where = "in training " if training else ""
                return f"{where}the model fails where it is left out: {_told(error)}"
            if training and self.goes_another_way(branches):
                return (
                    "in training the model computes it and does not come to its sum as in "
                    "evaluation: its block's forward() is called directly, or goes another way"
                )
        weights: dict[Branch, Weight] = dict.fromkeys(branches, 0.0)
        try:
            if not self.agrees(output, weights, self.inputs):
                with NoNoise():  # type: ignore[no-untyped-call]
                    if not self.agrees(self.run(dropped, self.inputs), weights, self.inputs):
                        return (
                            "left out it does not change the model's output as its sum says: it "
                            "does something else, too, as counting calls or telling others a number"
                        )
        except AnotherWay:  # without some the model does not come to the sums of others
            alone = (self.fails_without([b]) for b in branches if len(branches) > 1)
            return next(filter(None, alone), None)
        return None

    def goes_another_way(self, branches: Sequence[Branch]) -> bool:
        """Whether training computes some of these where they are kept, and does not meet their sum.

        What it does not compute at all, it may leave out by chance.
        """
        if here.joined.issuperset(branches):
            return False
        ran: set[Branch] = set()
        with ExitStack() as hooks:
            for branch in branches:
                for name in branch.modules:
                    module = self.model.get_submodule(name)
                    hooks.enter_context(
                        module.register_forward_pre_hook(lambda *_, b=branch: ran.add(b))
                    )
            try:
                self.run(dict.fromkeys(self.findings.branches, (False, _WEIGHT)), self.inputs, True)
            except Exception:  # of any kind: it fails anyway, or says what is wrong in training
                return False
        return bool(ran - here.joined)

    def fails_anyway(self) -> bool:
        try:
            with plain():
                self.run(None, self.inputs, training=True)
        except Exception:
            return True
        return False

    def weighed_differs(self, branches: Sequence[Branch], inputs: Any) -> str | None:
        """What is wrong where these count twice."""
        try:
            weighed = self.run(dict.fromkeys(branches, (False, _WEIGHT)), inputs)
        except Exception as error:
            return f"the model fails where it is weighed: {_told(error)}"
        if not self.agrees(weighed, dict.fromkeys(branches, _WEIGHT), inputs):
            return (
                "counted twice it does not change the model's output as its sum says: what it "
                "computes reaches the output in another way, too"
            )
        return None

    def agrees(self, output: Any, weights: Mapping[Branch, Weight], inputs: Any) -> bool:
        """Whether the plain model gives the same where its sums count the branches so often."""
        args, kwargs = inputs
        with without(self.zeros):
            expected = run_weighed(self.model, args, kwargs, weights, self.findings, self.kept)
        return _are_close(output, expected)

    def mask_what_fails(self, branches: Sequence[Branch]) -> None:
        """Select no samples in branches where that gives something else than masking them."""
        for selected in _by_level([b for b in branches if b.place is not None]):
            if self.selecting_differs(selected) is None:
                continue
            for branch, reason in _reasons(selected, self.selecting_differs).items():
                if reason is not None:
                    branch.place, branch.mask = None, branch.place or branch.mask
                    branch.reason = reason

    def selecting_differs(self, branches: Sequence[Branch]) -> str | None:
        """What is wrong where samples are selected; None where it is as if they were masked."""
        outputs = []
        for select in (True, False):
            with _choosing(branches) as chosen:
                for branch in () if select else branches:
                    if branch.place is not None:
                        branch.mask, branch.place = branch.place, None
                try:
                    outputs.append(self.run(chosen, self.inputs))
                except Exception as error:  # of any kind: the samples do not fit
                    done = "selected" if select else "masked"
                    return f"with samples {done}, the model fails: {_told(error)}"
        if not _are_close(*outputs):
            return (
                "with samples selected, the model gives something else than with all computed and "
                "the dropped ones masked: its samples are not independent"
            )
        return None

    def run(
        self,
        decisions: Mapping[Branch, tuple[int, float]] | None,
        inputs: Any,
        training: bool = False,
    ) -> Any:
        """The output."""
        with (
            untouched(self.model, self.kept),
            in_mode(self.model, training),
            plainly(),
            without(self.zeros),
            nullcontext() if decisions is None else forced(decisions),
            unwritten(self.model) if training or self.findings.writes else nullcontext(),
            BaseTorchFunctionMode(),  # torch's fused kernels, which call no child, stay out
        ):
            here.joined = set()
            args, kwargs = copied(inputs)
            output = self.model(*args, **kwargs)
            for name, module in self.model.named_modules():
                if parts_in((*attributes(module), *module._buffers.values())):
                    raise _Kept(kept_in(name))
            return output


class _Kept(RuntimeError):
    """A module has a value of a branch."""


@contextmanager
def _choosing(branches: Sequence[Branch]) -> Iterator[dict[Branch, tuple[int, float]]]:
    """Decisions by which each of them selects half of its samples, for as long."""
    with ExitStack() as stack:
        for branch in branches:
            stack.callback(vars(branch).update, dict(vars(branch)))
            branch.mode, branch.scale = "subset", "train"  # never all of them, nor none
            branch.set_rate(0.5)
        yield {branch: (seed, 1.0) for seed, branch in enumerate(branches, _NOT_THE_FIRST)}


def _weighed(branch: Branch, seed: int, x: Tensor) -> Tensor:
    """A branch's value, each sample with its weight in the decision of this number."""
    place = branch.place
    assert place is not None
    kept, weight = choose_samples(branch, seed, x.shape[place.dim] // place.fold, x.device)
    weights = x.new_zeros(x.shape[place.dim]).index_fill(0, slots(place, kept), weight)
    return x * weights.view([-1 if d == place.dim else 1 for d in range(x.dim())])


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def _are_close(got: Any, expected: Any) -> bool:
    a, b = tensor_leaves(got), tensor_leaves(expected)
    return len(a) == len(b) and all(map(_is_close, a, b))


def _is_close(a: Tensor, b: Tensor) -> bool:
    """To a thousand times the rounding of the dtype, relative to the largest number."""
    if a.shape != b.shape:
        return False
    if a.is_complex() and b.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    if a.numel() == 0 or not a.is_floating_point():
        return True
    eps = torch.finfo(torch.float32 if a.dtype == torch.float64 else a.dtype).eps
    a, b = a.cpu().double(), b.cpu().double()  # not every device has that precision
    known = a.isfinite() & b.isfinite()
    if bool((a.isnan() != b.isnan()).any()):
        return False
    apart = torch.where(known, a - b, 0.0).abs().max()
    size = torch.where(known, b, 0.0).abs().max()
    return bool(apart <= 1e3 * eps * (1.0 + size))
