"""A branch in one call of its block: what its own calls return, with what is dropped left out."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten
from ..branch import Place
from ..find.plan import Gate, Leaf
from ..find.tensors import version_of
from .arguments import copies, each_once, fits, hand_on, has_samples, same_objects
from .merging import Merging, norms_in, slots
from .part import Part, form, whole
from .replay import may_be_recomputed
from .rows import put_rows, split_rows, take_rows
from .unmade import Unmade

__all__ = ["Run"]


class Run(Merging):
    """A branch in one call: what of each value goes into its own calls, and what they return."""

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

        ``parts`` says whether there are parts among what it is given, and ``make`` makes what it
        would return, in form only.
        """
        if not self.decided and self.branch.place is not None:
            self._choose_by(gate, args, kwargs)
        if self.dropped and not self.is_late:
            return self._absent(gate, args, kwargs, make)
        if self.computed is not None:
            entered = self._entered(gate, args, kwargs)
            if entered is not None:
                copied = copies((args, kwargs), entered)
                out = run(*entered[0], **entered[1])
                self.check_copies(copied, copies((args, kwargs), entered))
                self.check_returned(gate, out)
                left = self._each(gate, out, self._leave)
                return self._handed_on(gate, left, (args, kwargs), entered)
        if parts:
            made = tree_map_only(Part, whole, (args, kwargs))
            args, kwargs = same_objects((args, kwargs), made)
        if self.mask is None:
            out = run(*args, **kwargs)
        else:
            out = self.call_masked(lambda: run(*args, **kwargs))
        if gate.last and self.is_weighed:
            return self._each(gate, out, self._whole_leave)
        return out

    def _absent(self, gate: Gate, args: Any, kwargs: Any, make: Callable[[], Any]) -> Any:
        self.owe((args, kwargs))
        if gate.structure is None:
            return self._stand_in(gate, gate.returned[0] if gate.returned else _BRANCH, make)
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
            elif returned.kind in ("none", "unread"):
                leaves.append(None)
            elif returned.kind == "value":
                leaves.append(leaf(i))
            elif returned.kind == "object":
                leaves.append(Unmade(partial(leaf, i)))
            else:
                leaves.append(self._stand_in(gate, returned, partial(leaf, i)))
        return tree_map(lambda i: leaves[i], gate.structure)

    def _stand_in(self, gate: Gate, leaf: Leaf, make: Callable[[], Any]) -> Any:
        dtype = leaf.dtype
        own = make if dtype is None else lambda: make().to(dtype)
        part = Part(self, None, gate.last, None, own)
        if self.in_checkpoint:
            return part
        return self.nothing(form(part))  # to be worked on in the Function's own backward, too

    def _choose_by(self, gate: Gate, args: Any, kwargs: Any) -> None:
        """Choose by the first tensor that enters with samples."""
        leaves, _ = tree_flatten((args, kwargs))
        if len(leaves) != len(gate.given):
            return
        sizes = [
            x.shape[place.dim] // place.fold
            for x, place in zip(leaves, gate.given, strict=True)
            if place is not None and isinstance(x, Tensor) and 0 <= place.dim < x.dim()
        ]
        if not sizes:
            return  # decided at the sum
        self.choose(next((size for size in sizes if size != 1), 1))  # one may be for all of them
        self.select()

    def select(self) -> None:
        """Have the kept samples computed only, once they are chosen."""
        self.computed = self.kept
        if self.kept is None or len(self.kept) != 1 or self.size == 1:
            return
        known = self.norms if self.in_graph else self.owner.modules_of(self.branch)
        if any(map(_needs_company, known)):  # another sample goes along, and does not count
            self.computed = torch.cat([self.kept, (self.kept + 1) % self.size])

    def _entered(self, gate: Gate, args: Any, kwargs: Any) -> Any:
        """The arguments with the computed samples only; None where these cannot be told."""
        leaves, structure = tree_flatten((args, kwargs))
        leaves = [x._value if type(x) is Part and x._place is None else x for x in leaves]
        if not fits(gate, leaves, self.size):
            return None
        for x, place in zip(leaves, gate.given, strict=True):
            if type(x) is Part and x._place != place:
                return None
        made = tree_unflatten(each_once(self._taken, leaves, gate.given), structure)
        return same_objects((args, kwargs), made)

    def _taken(self, x: Any, place: Place | None) -> Any:
        if type(x) is Part:
            return x._value
        if place is None or not has_samples(x, place, self.size):
            return x
        assert self.computed is not None
        at = slots(place, self.computed)
        if self.split is None and not (self.compiling or may_be_recomputed()):
            taken, back = split_rows(x, at, place.dim)  # the gradients of both meet there
            self.split = x, back, version_of(x)
            return taken
        return _select(x, at, place.dim)

    def _each(self, gate: Gate, out: Any, change: Callable[[Gate, Tensor, Leaf], Any]) -> Any:
        """``out`` with the branch's tensors in it changed."""
        if isinstance(out, Tensor):
            return change(gate, out, gate.returned[0] if gate.returned else _BRANCH)
        leaves, structure = tree_flatten(out)
        known = gate.returned if len(gate.returned) == len(leaves) else (_BRANCH,) * len(leaves)
        changed = [
            change(gate, x, leaf)
            if isinstance(x, Tensor) and leaf.kind in ("branch", "unread", "none")
            else x
            for x, leaf in zip(leaves, known, strict=True)
        ]
        return tree_unflatten(changed, structure)

    def _handed_on(self, gate: Gate, out: Any, given: Any, entered: Any) -> Any:
        """``out`` with what it hands on of the arguments, all samples of it."""
        if not _hands_on(gate):
            return out
        leaves, structure = tree_flatten(out)
        own, taken = tree_flatten(given)[0], tree_flatten(entered)[0]
        hand_on(gate, own, taken, leaves, self.put_back)
        return tree_unflatten(leaves, structure)

    def put_back(self, own: Any, x: Any, place: Place | None) -> Any:
        """``own``, an argument that a call hands on, with what it made of the kept samples."""
        if place is None or not has_samples(own, place, self.size):
            return x
        assert self.kept is not None
        rows = slots(place, self.kept)
        if not isinstance(x, Tensor) or x.dim() != own.dim() or x.shape[place.dim] < len(rows):
            raise self.changed()
        x = x.narrow(place.dim, 0, len(rows))
        return put_rows(own.to(x.dtype), rows, x, place.dim)

    def _leave(self, gate: Gate, x: Tensor, leaf: Leaf) -> Any:
        """A result that has the computed samples only."""
        assert self.computed is not None
        if leaf.kind == "none":
            return self.unknown()
        place = leaf.place
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
            return part if self.function is None else self.spread(x, place)
        return self.joining(part) if self._must_be_real() else part

    def _whole_leave(self, gate: Gate, x: Tensor, leaf: Leaf) -> Any:
        """A whole result of a last call, to be weighed in the sum."""
        if self._is_met_at_sum():
            return x
        part = Part(self, x, True)
        return self.joining(part) if self._must_be_real() else part

    def check_returned(self, gate: Gate, out: Any) -> None:
        """What a call returns has to consist of what it did when it was watched.

        Raises:
            RuntimeError: it does not, so that nothing is known of what is in it.
        """
        if isinstance(out, Tensor) and gate.structure is None:
            return
        leaves, structure = tree_flatten(out)
        same = len(leaves) == len(gate.returned)
        if same and gate.structure is not None and len(leaves) > 1:
            same = structure == tree_flatten(gate.structure)[1]
        if not same:
            raise self.changed()

    def changed(self) -> RuntimeError:
        return self.error(
            "has a call that returns something else than when it was watched; call apply() again "
            "after a change of what modules return"
        )

    def unknown(self) -> Unmade:
        """Stands in for a tensor where there was None when it was watched, and may not be read."""

        def fail() -> Any:
            raise self.changed()

        return Unmade(fail)

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
        in_graph = self.compiling and torch.compiler.is_compiling()
        if not (self.branch.in_function if in_graph else self.function is not None):
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
        if not torch.is_grad_enabled():  # a forward may look at it there; it is added outside
            with torch.inference_mode(False), torch.enable_grad():
                return self.spread(x, place)
        assert self.computed is not None
        if self.slot is None:
            slot = torch.zeros(self.size, dtype=torch.long, device=self.computed.device)
            numbers = torch.arange(len(self.computed), device=self.computed.device)
            self.slot = slot.index_copy_(0, self.computed, numbers)
        return _select(x, slots(place, self.slot), place.dim)


_BRANCH = Leaf("branch")
_OF_IMAGES = (
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)


def _needs_company(module: nn.Module) -> bool:
    """Whether a module should not be given one sample alone.

    Statistics over the samples of a batch need several. And for a single image, torch's backward of
    batch and instance normalisation is wrong where the gradient is laid out channels-last with a
    short stride between samples, as that of an attention is (torch 2.13 and 2.14, on the CPU).
    """
    return any(m.training for m in norms_in([module])) or any(
        isinstance(m, _OF_IMAGES) for m in module.modules()
    )


def _hands_on(gate: Gate) -> bool:
    return any(leaf.kind == "argument" for leaf in gate.returned)


def _select(x: Tensor, at: Tensor, dim: int) -> Tensor:
    return x.index_select(dim, at) if x.is_contiguous() else take_rows(x, at, dim)
