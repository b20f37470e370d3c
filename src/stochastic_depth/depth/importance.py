"""``importance``: how much each branch or block of a model matters, on given batches."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..branch import Branch, check_choice
from ..drop.force import forced
from ..drop.slot import keep_slots
from ..find import WHOLE
from ..find.state import in_mode, untouched
from ..install import remove
from ..options import call_of
from .influence import influence_of_blocks, influence_of_branches
from .looks import Inputs, Look, check_model, inputs_of, look_at, opened
from .progress import Progress, told
from .table import By, Importance, Of, Row

__all__ = ["importance"]

Loss = Callable[[nn.Module, Any], Any]


def importance(
    model: nn.Module,
    batches: Iterable[Any],
    by: By = "influence",
    *,
    of: Of = "branches",
    loss: Loss | None = None,
    progress: Progress = False,
) -> Importance:
    """How much each branch, or each block, of a model matters on ``batches``.

    The model runs in evaluation, without stochastic depth and without gradients, and is left as it
    was.

    Args:
        model: a model; stochastic depth need not be applied to it.
        batches: a list or a DataLoader (there may be several passes). Each batch is what the model
            is called with: a tensor, a tuple of arguments or a dict of keywords; or, with
            ``loss``, anything that ``loss`` takes.
        by: ``"influence"``, 1 - cosine between input and output (for a branch, between its shortcut
            and its sum), in one pass; ``"loss"``, the loss without it, in one pass for each;
            ``"greedy"``, where they are left out one after the other, each time the one whose
            removal gives the least loss, in n(n+1)/2 passes.
        of: ``"branches"`` or ``"blocks"``.
        loss: (model, batch) -> the loss on this batch; it calls the model once. Losses are averaged
            over the batches. None takes the ``loss`` that transformers' models return when they
            are given labels.
        progress: True shows a bar if rich or tqdm is installed; a function is called with the
            number of passes done and their total.

    Returns:
        A table; ``ranking`` lists the names, the least important first, for :func:`prune`.

    Raises:
        TypeError, ValueError: a bad argument, no batch, no loss, nothing to measure, or a model
            that fails on the first batch.

    Example:
        >>> import torch, torchvision, stochastic_depth as sd
        >>> model = torchvision.models.resnet18()
        >>> table = sd.importance(model, [torch.randn(2, 3, 64, 64)], of="blocks")
        >>> sorted(table.ranking)
        ['layer1.0', 'layer1.1', 'layer2.1', 'layer3.1', 'layer4.1']
        >>> table.unmeasured[0][0]
        'layer2.0'

    Reference:
        Men et al., ShortGPT, 2024 (arXiv:2403.03853), for the influence.
    """
    check_model(model)
    check_choice(by, By, "by")
    check_choice(of, Of, "of")
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be a list of batches or a DataLoader, got a {type(batches).__name__}: "
            "put a single batch into a list"
        )
    if iter(batches) is batches:
        batches = list(batches)
    first = next(iter(batches), None)
    if first is None:
        raise ValueError("importance needs at least one batch")
    put_back = keep_slots(model)
    remove(model)
    try:
        return _measured(model, batches, first, by, of, loss, progress)
    finally:
        put_back()


def _measured(
    model: nn.Module, batches: Iterable[Any], first: Any, by: By, of: Of, loss: Loss | None,
    progress: Progress,
) -> Importance:  # fmt: skip
    look = look_at(model, None, inputs=_call(model, first, loss))
    if of == "blocks":
        targets = [look.wholes.get(n) or Branch(f"{n}:{WHOLE}", "block", (n,)) for n in look.blocks]
        refused = look.whole.refused
    else:
        targets, refused = list(look.found.branches), look.found.refused
    unmeasured = (
        [] if by == "influence" and of == "blocks" else [(r.name, r.reason) for r in refused]
    )
    if not targets and not unmeasured:
        raise ValueError(f"{type(model).__name__} has no {of} that could be measured")
    if by == "influence":
        calls = (_call(model, batch, loss) for batch in batches)
        if of == "blocks":
            result = influence_of_blocks(model, targets, calls)
        else:
            result = influence_of_branches(model, look, targets, calls)
        values = result.values(targets)
        rows = [Row(_name(b.name), values[b]) for b in targets if b in values]
        unmeasured += [(b.name, reason) for b, reason in result.failed.items()]
        base = None
    else:
        targets = [b for b in targets if b.name not in {name for name, _ in unmeasured}]
        passes = _Passes(model, look, targets, batches, loss or _own_loss)
        with told(progress, passes.number(by)) as step:
            passes.step = step
            base = passes.loss_without(())
            if not math.isfinite(base):
                raise ValueError(f"the loss of the whole model is {base}")
            order = passes.each() if by == "loss" else passes.greedily()
        rows = [Row(_name(b.name), value) for b, value in order]
        unmeasured += passes.failed
    told_of = tuple((_name(name), reason) for name, reason in unmeasured)
    return Importance(tuple(rows), told_of, by, of, base)


def _name(name: str) -> str:
    return name.removesuffix(f":{WHOLE}")


class _Passes:
    """Passes over the batches, with something left out in each."""

    def __init__(
        self,
        model: nn.Module,
        look: Look,
        targets: list[Branch],
        batches: Iterable[Any],
        loss: Loss,
    ) -> None:
        self.model, self.look, self.targets = model, look, targets
        self.batches, self.loss = batches, loss
        self.failed: list[tuple[str, str]] = []
        self.step: Callable[[], None] = lambda: None

    def number(self, by: By) -> int:
        n = len(self.targets)
        return 1 + (n if by == "loss" else n * (n + 1) // 2)

    def loss_without(self, left_out: Sequence[Branch]) -> float:
        total, count = 0.0, 0
        with opened(self.model, self.look, left_out) as stands:
            decisions = dict.fromkeys(stands.values(), (True, 1.0))
            for batch in self.batches:
                with (
                    untouched(self.model),
                    in_mode(self.model, False),
                    torch.no_grad(),
                    forced(decisions) if decisions else nullcontext(),
                ):
                    total += float(self.loss(self.model, batch))
                count += 1
        self.step()
        return total / count

    def each(self) -> list[tuple[Branch, float]]:
        """In the order of execution."""
        return [(b, v) for b in self.targets if (v := self._try([], b)) is not None]

    def greedily(self) -> list[tuple[Branch, float]]:
        """In the order in which they are left out."""
        gone: list[Branch] = []
        order: list[tuple[Branch, float]] = []
        left = list(self.targets)
        while left:
            tried = [(b, v) for b in left if (v := self._try(gone, b)) is not None]
            if not tried:
                break
            best, value = min(tried, key=lambda pair: pair[1])
            gone.append(best)
            order.append((best, value))
            left = [b for b, _ in tried if b is not best]
        return order

    def _try(self, gone: list[Branch], branch: Branch) -> float | None:
        try:
            value = self.loss_without([*gone, branch])
        except Exception as error:  # of any kind: it is said, and what cannot be measured is kept
            self.failed.append((branch.name, f"{type(error).__name__}: {error}".split("\n")[0]))
            return None
        if not math.isfinite(value):
            self.failed.append((branch.name, f"without it the loss is {value}"))
            return None
        return value


def _own_loss(model: nn.Module, batch: Any) -> Any:
    args, kwargs = call_of(batch)
    loss = getattr(model(*args, **kwargs), "loss", None)
    if loss is None:
        raise ValueError(
            "what the model returns has no loss: give loss=, a function of (model, batch), as "
            "lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])"
        )
    return loss


class _Called(BaseException):
    """Ends a run whose arguments are known."""


def _call(model: nn.Module, batch: Any, loss: Loss | None) -> Inputs:
    """What the model is called with on a batch."""
    if loss is None:
        return inputs_of(model, batch)
    calls: list[Inputs] = []

    def take(_: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((args, kwargs))
        raise _Called

    with suppress(_Called), model.register_forward_pre_hook(take, with_kwargs=True):
        loss(model, batch)
    if not calls:
        raise ValueError("loss has to call the model, as model(...), and did not")
    return calls[0]
