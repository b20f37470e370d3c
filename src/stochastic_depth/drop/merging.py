"""What was decided of a branch in one call of its block, and how its result joins the sum."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .._torch import tensor_leaves
from ..branch import Branch, Place
from ..find.spot import spot
from ..find.state import NORMS
from ..find.tensors import CHECKPOINT, version_of
from .collectives import own_parameters
from .decide import choose_samples, draw_mask, draw_subset
from .gradients import are_waited_for, left_out
from .part import Part, form, whole
from .replay import is_recomputing
from .rows import add_rows, take_rows
from .slot import here

__all__ = ["Merging", "Owner", "norms_in", "slots"]


class Owner(Protocol):
    """What a run asks about its branch."""

    def modules_of(self, branch: Branch) -> list[nn.Module]:
        """The modules that it calls."""

    def parameters_of(self, branch: Branch) -> list[Tensor]:
        """The parameters that it reads besides those of its modules."""


class Merging:
    """A branch in one call: what is decided, and how its result joins the sum.

    Attributes:
        dropped: nothing is kept, and no call of the branch runs.
        weight: of what is kept.
        kept: the samples that count, once they are chosen; None where all do.
        computed: those that calls compute, where not all: the kept ones, or one and a companion.
        mask: in a compiled graph, a boolean for the call or for each sample.
        size: how many samples the batch has, once that is known.

    Args:
        branch: the branch.
        decision: True drops it, False keeps it, a number is what its samples are chosen by, and
            None leaves the decision to the compiled graph.
        weight: of what is kept; a tensor where a compiled graph has to hold for any weight.
        device: where its values are.
        owner: asked for the modules that a branch calls, and the parameters that it reads itself.
        dtype: of its sum, where that is not its shortcut's.
        compiling: whether its calls are traced by torch.compile; None asks.
    """

    kept: Tensor | None = None
    computed: Tensor | None = None
    mask: Tensor | None = None
    size = 0
    sums = 0  # that its values have met
    counts = True  # in training, where nobody decided by hand
    function: str | None = None  # the file of the custom Function that makes the call of now
    called = False  # a call of it has come
    ended = False  # its last call has come, and gave a value that is told apart
    joined = False  # a value of it has come to its sum, or to what else it enters
    closed = False  # the call of its block has returned
    is_late = False  # it had been computed when its samples were chosen, and will be again
    slot: Tensor | None = None  # of each sample, that of a computed one
    split: tuple[Tensor, Tensor, int] | None = None  # a shortcut, what goes on of it, its version

    def __init__(
        self,
        branch: Branch,
        decision: int | bool | None,
        weight: Any,
        device: Any,
        owner: "Owner",
        dtype: torch.dtype | None = None,
        compiling: bool | None = None,
    ) -> None:
        self.branch, self.device, self.owner, self.dtype = branch, device, owner, dtype
        self.dropped, self.weight = decision is True, weight
        self.seed = None if isinstance(decision, bool) else decision
        self.decided = isinstance(decision, bool)
        self.in_graph = decision is None
        self.owed: list[Tensor] = []  # what dropped calls were given, which may need a gradient
        # Found out here, as a graph that asks for names would be one of this block alone.
        self.norms = norms_in(owner.modules_of(branch)) if self.in_graph else []
        self.compiling = torch.compiler.is_compiling() if compiling is None else compiling
        found_out = self.dropped and self.compiling and are_waited_for(branch)
        self.parameters = own_parameters(branch, owner) if found_out else None
        if self.in_graph and branch.decides_calls and torch.compiler.is_compiling():
            self.choose(1)
        # Whether its values have to be told apart up to their sum.
        is_one = isinstance(weight, float) and weight == 1.0
        self.is_weighed = not (self.decided and self.mask is None and is_one)

    @property
    def in_checkpoint(self) -> bool:
        """Whether no Function makes the call of now but, perhaps, reentrant checkpointing's."""
        return self.function in (None, CHECKPOINT)

    def choose(self, size: int) -> None:
        """Choose the samples, now that it is known how many there are."""
        branch = self.branch
        self.decided, self.size = True, size
        if self.in_graph:
            if branch.mode == "subset":
                self.kept, self.weight = draw_subset(branch, size, self.device)
            else:
                self.mask, self.weight = draw_mask(branch, size, self.device)
            return
        assert self.seed is not None
        if here.sizes is not None:
            here.sizes[branch] = size
        self.kept, self.weight = choose_samples(branch, self.seed, size, self.device)
        self.dropped = len(self.kept) == 0
        self.count(size, size - len(self.kept))
        if len(self.kept) == size:
            self.kept = None

    def count(self, size: int, dropped: int | None = None) -> None:
        if self.counts and not (self.compiling or is_recomputing()):
            self.branch.decided += size
            self.branch.dropped += size * self.dropped if dropped is None else dropped

    def is_over(self) -> bool:
        """Whether the call is, and this is no repetition of a part of it by checkpointing."""
        return self.closed and not self.compiling and not is_recomputing()

    def error(self, what: str) -> RuntimeError:
        return RuntimeError(f"stochastic depth: the branch {self.branch.name} {what}")

    def check_order(self) -> None:
        """Raise for ``x @ part`` in a graph: dynamo makes that of ``part @ x``, too."""
        if torch.compiler.is_compiling() and not self.dropped:
            raise self.error(
                "multiplies one of its values with @, and a graph of torch.compile's cannot tell "
                "which operand comes first: write torch.matmul(a, b)"
            )

    def is_sum(self) -> bool:
        """Whether user code adds, just now, where finding saw the branch's sum."""
        if self.compiling or torch.compiler.is_compiling():  # which cannot tell where it is
            self.sums += 1
            return self.sums > self.branch.turn
        return spot() in self.branch.sums

    def is_join(self) -> bool:
        if not (self.compiling or torch.compiler.is_compiling()):
            return spot() in self.branch.joins
        if not self.branch.linear:  # else it may be weighed anywhere on its way
            raise self.error(
                "meets its shortcut otherwise than in a plain sum, after an operation that is not "
                "linear in it, and a graph of torch.compile's cannot tell where: write x + y"
            )
        return True

    def joining(self, part: Part) -> Tensor:
        """The part as a tensor of full size, weighed, with zeros for what is dropped."""
        self.joined = True
        x, place = part._value, part._place
        if x is None:
            return self.nothing(form(part))
        at = place or self._place_of_sum()
        if not self.decided:
            self.choose(x.shape[at.dim] // at.fold)
            self.is_late = True
        if self.mask is not None:
            return torch.where(self.mask_for(x, *at), x * self.weight, 0.0)
        if self.dropped:  # zeros that have a gradient, which checkpointing wants to see
            return x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0.0)
        if self.kept is None:
            weighed: Tensor = x * self.weight
            return weighed
        shape = list(x.shape)
        shape[at.dim] = self.size * at.fold
        return self.merge(x.new_zeros(shape), part)

    def nothing(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros of the form of ``like``, for what a dropped branch would have made."""
        zeros = torch.zeros(like.shape, dtype=dtype or like.dtype, device=self.device)
        return self._left_out(zeros, in_place=True)

    def _place_of_sum(self) -> Place:
        return self.branch.place or self.branch.mask

    def counted(self, x: Tensor, place: Place) -> Tensor:
        """The part of what was computed that counts."""
        return x if self.computed is self.kept else x.narrow(place.dim, 0, place.fold)

    def mask_for(self, x: Tensor, dim: int, fold: int = 1) -> Tensor:
        """The mask of a compiled graph, in the shape in which it meets ``x``."""
        assert self.mask is not None
        shape = [1] * x.dim()
        if len(self.mask) == 1:
            return self.mask.view(shape)
        shape[dim] = -1
        return self.mask.repeat_interleave(fold).view(shape)

    # The sum.

    def scaled(self, shortcut: Tensor, factor: float) -> Tensor:
        """``factor * shortcut``, in the precision of the sum."""
        return shortcut if factor == 1 else self._as_summed(shortcut) * factor

    def _as_summed(self, shortcut: Tensor) -> Tensor:
        """In the precision that the sum of a kept branch has."""
        if self.dtype is None:
            return shortcut
        return shortcut.to(torch.promote_types(shortcut.dtype, self.dtype))

    def merge(
        self,
        shortcut: Tensor,
        part: Part,
        factor: float = 1,
        in_place: bool = False,
        first: bool = False,
    ) -> Tensor:
        """``shortcut + factor * part``, as decided; ``first`` keeps the layout of the part."""
        self.joined = True
        v, place = part._value, part._place
        at = place or self._place_of_sum()
        self._decide_by(shortcut, at)
        if self.dropped:
            if v is not None:
                self.owe(v)  # all its samples are dropped, which came out here
            return self.leave_out(shortcut, in_place)
        assert v is not None
        alpha = factor * self.weight
        if place is None and self.kept is None:
            if self.mask is not None:
                mask = self.mask_for(shortcut, *at)
                masked = torch.where(mask, shortcut + v * alpha, shortcut)
                return shortcut.copy_(masked) if in_place else masked
            if shortcut.shape != v.shape:
                self.check_shape(shortcut, v)
            if isinstance(self.weight, Tensor):  # a compiled block, made for any rate
                return shortcut.add_(v * alpha) if in_place else shortcut + v * alpha
            if in_place:
                return shortcut.add_(v, alpha=alpha)
            if shortcut.stride() == v.stride():
                return torch.add(shortcut, v, alpha=alpha)
            # As the plain sum does, keeps the layout of what comes first.
            return torch.add(v * alpha, shortcut) if first else torch.add(shortcut, v * alpha)
        assert self.kept is not None
        chosen = slots(at, self.kept)
        if place is not None:
            shape = list(shortcut.shape)
            shape[at.dim] = len(chosen)
            v = self.counted(v, at).expand(shape)
        else:
            if shortcut.shape != v.shape:
                self.check_shape(shortcut, v)
                v = v.expand(shortcut.shape)
            v = take_rows(v, chosen, at.dim)
        if in_place:
            return shortcut.index_add_(at.dim, chosen, v.to(shortcut.dtype), alpha=alpha)
        if self.split is not None and self.split[0] is shortcut:
            _, whole_shortcut, version = self.split
            if version == version_of(shortcut):  # else it was written to since
                shortcut = whole_shortcut
        dtype = torch.promote_types(shortcut.dtype, v.dtype)
        return add_rows(shortcut.to(dtype), chosen, v.to(dtype), alpha, at.dim)

    def written(self, total: Tensor, part: Part) -> Tensor:
        """A sum that is written into ``part`` has the precision of that."""
        return total.to(self.dtype or total.dtype if part._value is None else part._value.dtype)

    def interpolate(self, shortcut: Tensor, part: Part, weight: Any) -> Tensor:
        """``shortcut.lerp(part, weight)``, as decided."""
        self.joined = True
        self._decide_by(shortcut, part._place or self._place_of_sum())
        if self.dropped:
            self.owe(part._value)
            return self.leave_out(shortcut)
        v = whole(part)
        if self.kept is None and self.mask is None:
            return torch.lerp(shortcut, v, weight * self.weight)
        return self.merge(shortcut, Part(self, (v - shortcut) * weight, True))

    def _decide_by(self, shortcut: Tensor, at: Place) -> None:
        """Count, and choose, the samples of a sum."""
        if self.decided and self.branch.decides_calls:
            return
        entries = shortcut.shape[at.dim] if shortcut.dim() > at.dim else at.fold
        if not self.decided:
            self.choose(entries // at.fold)
            self.is_late = True
        elif self.size == 0:  # p is 0 or 1
            self.count(entries // at.fold)
        elif self.mask is None and entries != self.size * at.fold:
            raise self.error(
                f"has a sum of shape {tuple(shortcut.shape)} for {self.size} samples in dimension "
                f"{at.dim}, which is not as it was watched"
            )

    def leave_out(self, shortcut: Tensor, in_place: bool = False) -> Tensor:
        """The sum where the branch is dropped."""
        return self._left_out(shortcut if in_place else self._as_summed(shortcut), in_place)

    def _left_out(self, shortcut: Tensor, in_place: bool) -> Tensor:
        given, self.owed = self.owed, []
        parameters = self.parameters
        if parameters is None:
            waits = are_waited_for(self.branch) and torch.is_grad_enabled()
            parameters = own_parameters(self.branch, self.owner) if waits else []
        return left_out(shortcut, parameters, given, in_place)

    def owe(self, given: Any) -> None:
        """Note what a dropped call is given, where somebody waits for the gradient of that."""
        if are_waited_for(self.branch):
            for x in tensor_leaves(given):  # a graph that asks for the id of one is for that alone
                if x.requires_grad and not any([x is known for known in self.owed]):
                    self.owed.append(x)

    def check_copies(self, before: list[Any], after: list[Any]) -> None:
        """Raise where a call wrote into a copy of what it is given, which nobody else sees."""
        if len(before) != len(after) or any(a is not b for a, b in zip(before, after, strict=True)):
            raise self.error(
                "writes into a list or dict that also holds samples, of which it is given the kept "
                "ones in a copy; return what it writes, or use mode='batch'"
            )

    def check_shape(self, shortcut: Tensor, v: Tensor) -> None:
        if v.dim() > shortcut.dim() or any(
            a != b and b != 1 for a, b in zip(shortcut.shape[::-1], v.shape[::-1], strict=False)
        ):
            raise ValueError(
                f"the output of {self.branch.name} has shape {tuple(v.shape)} and the shortcut "
                f"{tuple(shortcut.shape)}: a dropped branch would leave another shape than a kept "
                "one; project the shortcut to the output's shape"
            )


def slots(place: Place, samples: Tensor) -> Tensor:
    """The entries of ``place.dim`` that belong to ``samples``."""
    if place.fold == 1:
        return samples
    folded = torch.arange(place.fold, device=samples.device)
    return (samples[:, None] * place.fold + folded).flatten()


def norms_in(modules: list[nn.Module]) -> list[nn.Module]:
    """The batch normalisations in ``modules``."""
    return [m for module in modules for m in module.modules() if isinstance(m, NORMS)]
