"""One branch in one call of its block: one decision and three verbs, call, merge, leave out."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .._torch import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten
from ..branch import Branch, Place
from ..find.plan import Gate, Leaf
from ..find.spot import spot
from ..find.state import NORMS
from .decide import choose_samples, draw_mask, draw_subset
from .gradients import left_out
from .part import Part, Unmade, form, whole
from .replay import is_recomputing, may_be_recomputed
from .rows import add_rows, split_rows, take_rows

__all__ = ["Owner", "Run", "pools_samples", "slots"]


class Owner(Protocol):
    """What a run asks about its branch."""

    def modules_of(self, branch: Branch) -> list[nn.Module]:
        """The modules that it calls."""

    def parameters_of(self, branch: Branch) -> list[Tensor]:
        """The parameters that it reads besides those of its modules."""


class Run:
    """A branch in one call: what is decided, what of a value goes in, how the result joins the sum.

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
        self.kept: Tensor | None = None
        self.computed: Tensor | None = None
        self.mask: Tensor | None = None
        self.size = 0
        self.seed = None if isinstance(decision, bool) else decision
        self.decided = isinstance(decision, bool)
        self.in_graph = decision is None
        # Found out here, as a graph that asks for names would be one of this block alone.
        self.norms = _norms(owner.modules_of(branch)) if self.in_graph else []
        self.compiling = torch.compiler.is_compiling() if compiling is None else compiling
        if self.in_graph and branch.decides_calls and torch.compiler.is_compiling():
            self.choose(1)
        # Whether its values have to be told apart up to their sum.
        self.is_weighed = not self.decided or self.mask is not None or not _is_one(weight)
        self.sums = 0  # that its values have met
        self.counts = True  # in training, where nobody decided by hand
        self.apart = False  # reentrant checkpointing makes the call of now
        self.is_late = False  # it had been computed when its samples were chosen, and will be again
        self.slot: Tensor | None = None  # of each sample, that of a computed one
        self.split: tuple[Tensor, Tensor] | None = None

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
        self.kept, self.weight = choose_samples(branch, self.seed, size, self.device)
        self.dropped = size > 0 and len(self.kept) == 0
        self.count(size, size - len(self.kept))
        if len(self.kept) == size:
            self.kept = None

    def count(self, size: int, dropped: int | None = None) -> None:
        if self.counts and not (self.compiling or is_recomputing()):
            self.branch.decided += size
            self.branch.dropped += size * self.dropped if dropped is None else dropped

    def error(self, what: str) -> RuntimeError:
        return RuntimeError(f"stochastic depth: the branch {self.branch.name} {what}")

    # A call of the branch.

    def call(
        self,
        gate: Gate,
        run: Callable[..., Any],
        args: Any,
        kwargs: Any,
        parts: bool,
        make: Callable[[], Any],
    ) -> Any:
        """What a call of the branch returns in place of ``run(*args, **kwargs)``.

        Args:
            gate: which call it is.
            run: makes the call itself.
            args: what it is given.
            kwargs: the same.
            parts: whether parts are among that.
            make: makes what it would return, in form only.
        """
        if not self.decided and self.branch.place is not None:
            self._choose_by(gate, args, kwargs)
        if self.dropped and not self.is_late:
            return self._absent(gate, args, kwargs, make)
        if self.computed is not None:
            entered = self._entered(gate, args, kwargs)
            if entered is not None:
                return self._each(gate, run(*entered[0], **entered[1]), self._leave)
        if parts:
            args, kwargs = tree_map_only(Part, whole, (args, kwargs))
        if self.mask is None:
            out = run(*args, **kwargs)
        else:
            out = self.call_masked(lambda: run(*args, **kwargs))
        if gate.last and self.is_weighed:
            return self._each(gate, out, self._whole_leave)
        return out

    def _absent(self, gate: Gate, args: Any, kwargs: Any, make: Callable[[], Any]) -> Any:
        if gate.structure is None:
            return Part(self, None, gate.last, None, make)
        given, _ = tree_flatten((args, kwargs)) if _hands_on(gate) else ([], None)
        made: list[Any] = []

        def leaf(i: int) -> Any:
            if not made:
                made.extend(tree_flatten(make())[0])
            return made[i]

        leaves: list[Any] = []
        for i, returned in enumerate(gate.returned):
            if returned.kind == "argument":
                leaves.append(given[returned.argument])
            elif returned.kind == "none":
                leaves.append(None)
            elif returned.kind == "value":
                leaves.append(leaf(i))
            elif returned.kind == "object":
                leaves.append(Unmade(partial(leaf, i)))
            else:
                leaves.append(Part(self, None, gate.last, None, partial(leaf, i)))
        return tree_map(lambda i: leaves[i], gate.structure)

    def _choose_by(self, gate: Gate, args: Any, kwargs: Any) -> None:
        """Choose by the first tensor that enters with samples."""
        for x, place in _entries(gate, args, kwargs):
            if place is not None and isinstance(x, Tensor) and x.dim() > place.dim:
                self.choose(x.shape[place.dim] // place.fold)
                break
        else:
            return  # decided at the sum
        if self.kept is None or self.dropped or self.mask is not None:
            return
        self.computed = self.kept
        if len(self.kept) == 1 and self._pools_samples():
            # Statistics need more than one sample: another goes along, and does not count.
            pair = torch.cat([self.kept, (self.kept + 1) % self.size])
            self.computed = pair if self.size > 2 else None

    def _pools_samples(self) -> bool:
        known = self.norms if self.in_graph else self.owner.modules_of(self.branch)
        return any(map(pools_samples, known))

    def _entered(self, gate: Gate, args: Any, kwargs: Any) -> Any:
        """The arguments with the computed samples only; None where these cannot be told."""
        leaves, structure = tree_flatten((args, kwargs))
        places = gate.given
        if len(places) != len(leaves):
            return None
        for x, place in zip(leaves, places, strict=True):
            if not self._is_as_watched(x, place):
                return None
        taken = [self._taken(x, place) for x, place in zip(leaves, places, strict=True)]
        return tree_unflatten(taken, structure)

    def _is_as_watched(self, x: Any, place: Place | None) -> bool:
        if type(x) is Part:
            return x._place is None or x._place == place
        if not isinstance(x, Tensor) or place is None:
            return True
        if place.dim < 0:  # it was no tensor when it was watched
            return x.dim() == 0
        return x.dim() <= place.dim or x.shape[place.dim] in (1, self.size * place.fold)

    def _taken(self, x: Any, place: Place | None) -> Any:
        if type(x) is Part:
            if x._place is not None:
                return x._value
            x = x._value
        if not isinstance(x, Tensor) or place is None or x.dim() <= place.dim or place.dim < 0:
            return x
        if x.shape[place.dim] == 1 and self.size * place.fold != 1:
            return x  # broadcast over the samples
        assert self.computed is not None
        at = slots(place, self.computed)
        if self.split is None and not (self.compiling or may_be_recomputed()):
            taken, back = split_rows(x, at, place.dim)  # the gradients of both meet there
            self.split = x, back
            return taken
        return _select(x, at, place.dim)

    def _each(
        self, gate: Gate, out: Any, change: Callable[[Gate, Tensor, Place | None], Any]
    ) -> Any:
        """``out`` with the branch's tensors in it changed."""
        if isinstance(out, Tensor):
            place = gate.returned[0].place if gate.returned else None
            return change(gate, out, place)
        leaves, structure = tree_flatten(out)
        known = gate.returned if len(gate.returned) == len(leaves) else (_BRANCH,) * len(leaves)
        changed = [
            change(gate, x, leaf.place)
            if isinstance(x, Tensor) and leaf.kind in ("branch", "none")
            else x
            for x, leaf in zip(leaves, known, strict=True)
        ]
        return tree_unflatten(changed, structure)

    def _leave(self, gate: Gate, x: Tensor, place: Place | None) -> Any:
        """A result that has the computed samples only."""
        assert self.computed is not None
        if place is None or place.dim < 0 or x.dim() <= place.dim:
            return x  # the same for all samples
        if x.shape[place.dim] != len(self.computed) * place.fold:
            raise self.error(
                f"returns {x.shape[place.dim]} entries in dimension {place.dim} for "
                f"{len(self.computed)} samples, which is not as it was watched; give apply() "
                "example_inputs like those of training"
            )
        if self._is_met_at_sum():
            return self.spread(x, place)
        part = Part(self, x, gate.last, place)
        if not gate.last:
            return self.spread(x, place) if self.apart else part
        return self.joining(part) if self._must_be_real() else part

    def _whole_leave(self, gate: Gate, x: Tensor, place: Place | None) -> Any:
        """A whole result of a last call, to be weighed in the sum."""
        if self._is_met_at_sum():
            return x
        part = Part(self, x, True)
        return self.joining(part) if self._must_be_real() else part

    def _is_met_at_sum(self) -> bool:
        """Whether its values are ordinary tensors up to its sum, where a mode meets them.

        A custom autograd.Function passes on the gradients of tensors only.
        """
        return self.branch.in_function and not self.compiling

    def _must_be_real(self) -> bool:
        """Whether what a last call returns is weighed at once, since no stand-in may carry it.

        Reentrant checkpointing is a custom Function, too: in its forward the grad mode is another
        than where the block was called, and what it repeats has to return the same.
        """
        if not (self.branch.in_function if self.compiling else self.apart):
            return False
        if not self.branch.linear:
            raise self.error(
                "leaves reentrant checkpointing through a function that is not linear in it; use "
                "checkpoint(..., use_reentrant=False)"
            )
        return True

    def beside(self, shortcut: Any, call: Callable[[], Any]) -> Any:
        """``call()``, which has to leave the shortcut as it is.

        Raises:
            RuntimeError: it overwrote the shortcut.
        """
        if torch.compiler.is_compiling():
            return call()
        tensors = [t for t in tree_leaves(shortcut) if isinstance(t, Tensor)]
        tensors = [t for t in tensors if not t.is_inference()]
        versions = [t._version for t in tensors]
        out = call()
        if versions != [t._version for t in tensors]:
            raise self.error(
                "overwrites its shortcut in place, so a dropped call would leave another shortcut "
                "than a kept one; make the first operation of the branch out of place, or leave it "
                "out of stochastic depth"
            )
        return out

    def call_masked(self, run: Callable[[], Any]) -> Any:
        """In a compiled graph all is computed; statistics are kept where the decision says so."""
        assert self.mask is not None
        statistics = [
            (m, name, buffer) for m in self.norms for name, buffer in m.named_buffers(recurse=False)
        ]
        for m, name, buffer in statistics:
            setattr(m, name, buffer.clone())
        out = run()
        for m, name, buffer in statistics:
            updated = getattr(m, name)
            setattr(m, name, buffer)
            with torch.no_grad():
                buffer.copy_(torch.where(self.mask.any(), updated, buffer))
        return out

    # What user code does with what a call returned.

    def mark(self, out: Any) -> Any:
        """Values that carry their branch along to its sum."""
        if isinstance(out, Tensor):
            return Part(self, out, True)
        if isinstance(out, tuple | list):
            return tree_map_only(Tensor, lambda x: Part(self, x, True), out)
        return out

    def spread(self, x: Tensor, place: Place) -> Tensor:
        """In full size, with some computed sample in the place of each dropped one."""
        assert self.computed is not None
        if self.slot is None:
            slot = torch.zeros(self.size, dtype=torch.long, device=self.computed.device)
            numbers = torch.arange(len(self.computed), device=self.computed.device)
            self.slot = slot.index_copy_(0, self.computed, numbers)
        return _select(x, slots(place, self.slot), place.dim)

    def is_sum(self) -> bool:
        """Whether user code adds, just now, where finding saw the branch's sum."""
        if self.compiling:  # which cannot tell where it is
            self.sums += 1
            return self.sums > self.branch.turn
        return spot() in self.branch.sums

    def is_join(self) -> bool:
        return self.compiling or spot() in self.branch.joins

    def joining(self, part: Part) -> Tensor:
        """The part as a tensor of full size, weighed, with zeros for what is dropped."""
        x, place = part._value, part._place
        if x is None:
            known = form(part)
            return torch.zeros(known.shape, dtype=known.dtype, device=self.device)
        at = place or self._place_of_sum()
        if place is not None:
            assert self.kept is not None
            shape = list(x.shape)
            shape[at.dim] = self.size * at.fold
            counted = self._counted(x, at)
            return add_rows(x.new_zeros(shape), slots(at, self.kept), counted, self.weight, at.dim)
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
        at_kept = slots(at, self.kept)
        return add_rows(
            torch.zeros_like(x), at_kept, take_rows(x, at_kept, at.dim), self.weight, at.dim
        )

    def _place_of_sum(self) -> Place:
        return self.branch.place or self.branch.mask

    def _counted(self, x: Tensor, place: Place) -> Tensor:
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

    def merge(
        self,
        shortcut: Tensor,
        part: Part,
        factor: float = 1,
        in_place: bool = False,
        first: bool = False,
    ) -> Tensor:
        """``shortcut + factor * part``, as decided; ``first`` keeps the layout of the part."""
        v, place = part._value, part._place
        at = place or self._place_of_sum()
        self._decide_by(shortcut, at)
        if self.dropped:
            return self.leave_out(shortcut, in_place)
        assert v is not None
        alpha = factor * self.weight
        if place is None and self.kept is None:
            if self.mask is not None:
                mask = self.mask_for(shortcut, *at)
                return torch.where(mask, shortcut + v * alpha, shortcut)
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
        fold, rest = divmod(shortcut.shape[at.dim], self.size)
        if rest or fold != at.fold:
            raise self.error(
                f"has a sum of {shortcut.shape[at.dim]} entries in dimension {at.dim} for "
                f"{self.size} samples, which is not as it was watched"
            )
        chosen = slots(at, self.kept)
        v = take_rows(v, chosen, at.dim) if place is None else self._counted(v, at)
        if in_place:
            return shortcut.index_add_(at.dim, chosen, v.to(shortcut.dtype), alpha=alpha)
        if self.split is not None and self.split[0] is shortcut:
            shortcut = self.split[1]
        dtype = torch.promote_types(shortcut.dtype, v.dtype)
        shape = list(shortcut.shape)
        shape[at.dim] = len(chosen)
        return add_rows(shortcut.to(dtype), chosen, v.to(dtype).expand(shape), alpha, at.dim)

    def interpolate(self, shortcut: Tensor, part: Part, weight: Any) -> Tensor:
        """``shortcut.lerp(part, weight)``, as decided."""
        self._decide_by(shortcut, part._place or self._place_of_sum())
        if self.dropped:
            return self.leave_out(shortcut)
        v = whole(part)
        if self.kept is None and self.mask is None:
            return torch.lerp(shortcut, v, weight * self.weight)
        return self.merge(shortcut, Part(self, (v - shortcut) * weight, True))

    def _decide_by(self, shortcut: Tensor, at: Place) -> None:
        """Count, and choose, the samples of a sum."""
        if not self.branch.decides_calls and self.size == 0 and self.decided:  # p is 0 or 1
            self.count(shortcut.shape[at.dim] // at.fold if shortcut.dim() > at.dim else 1)
        if not self.decided:
            self.choose(shortcut.shape[at.dim] // at.fold if shortcut.dim() > at.dim else 0)

    def leave_out(self, shortcut: Tensor, in_place: bool = False) -> Tensor:
        """The sum where the branch is dropped."""
        if self.dtype is not None and not in_place:  # what a kept branch makes of it
            shortcut = shortcut.to(torch.promote_types(shortcut.dtype, self.dtype))
        return left_out(shortcut, self.branch, self.owner, in_place)

    def check_shape(self, shortcut: Tensor, v: Tensor) -> None:
        if v.dim() > shortcut.dim() or any(
            a != b and b != 1 for a, b in zip(shortcut.shape[::-1], v.shape[::-1], strict=False)
        ):
            raise ValueError(
                f"the output of {self.branch.name} has shape {tuple(v.shape)} and the shortcut "
                f"{tuple(shortcut.shape)}: a dropped branch would leave another shape than a kept "
                "one; project the shortcut to the output's shape"
            )


_BRANCH = Leaf("branch")


def _is_one(weight: Any) -> bool:
    return isinstance(weight, float) and weight == 1.0


def slots(place: Place, samples: Tensor) -> Tensor:
    """The entries of ``place.dim`` that belong to ``samples``."""
    if place.fold == 1:
        return samples
    folded = torch.arange(place.fold, device=samples.device)
    return (samples[:, None] * place.fold + folded).flatten()


def _norms(modules: list[nn.Module]) -> list[nn.Module]:
    return [m for module in modules for m in module.modules() if isinstance(m, NORMS)]


def pools_samples(module: nn.Module) -> bool:
    """Whether a module computes statistics over the samples of its batch."""
    return any(m.training for m in _norms([module]))


def _entries(gate: Gate, args: Any, kwargs: Any) -> list[tuple[Any, Place | None]]:
    leaves, _ = tree_flatten((args, kwargs))
    if len(gate.given) != len(leaves):
        return []
    return list(zip(leaves, gate.given, strict=True))


def _hands_on(gate: Gate) -> bool:
    return any(leaf.kind == "argument" for leaf in gate.returned)


def _select(x: Tensor, at: Tensor, dim: int) -> Tensor:
    return x.index_select(dim, at) if x.is_contiguous() else take_rows(x, at, dim)
