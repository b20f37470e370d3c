"""One call of a block: its decisions, and what becomes of the calls that its forward makes."""

import sys
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import (
    forward_hooks,
    graph_task,
    has_hooks,
    outside_graphs,
    saved_tensors_hooks,
    tensor_leaves,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
)
from ..branch import Branch
from ..find.plan import Gate, Plan
from ..find.spot import NOT_THE_USERS
from ..find.tensors import CHECKPOINT, function_around
from .decide import is_left_out, kept_weight
from .part import Part, first_part, form, parts_in, whole
from .repeats import Repeat, Repeats
from .run import Run
from .slot import INSIDE, Slot, here

__all__ = ["Frame", "fences_around"]


class Frame:
    """A call of a block in progress; ``outer``: compiled code makes it, and we decide out here."""

    def __init__(self, site: Any, plan: Plan, args: Any, kwargs: Any, outer: bool = False) -> None:
        self.site, self.plan, self.outer = site, plan, outer
        self.counts: dict[str, int] = {}
        self.gradients = torch.is_grad_enabled()
        self.hooks: Any = None
        self.task = -1
        self.graph: Callable[[], Any] = _gone  # what lives as long as the graph behind it
        self.around: str | None = None  # the file of the custom Function that calls the block
        self.compiling = torch.compiler.is_compiling()  # by whom this frame is opened
        self.slots = site.reach(self.compiling)
        if not self.compiling:
            self.hooks, self.task = saved_tensors_hooks(), graph_task()
            if not self.gradients and site.block.training:
                self.around = function_around(sys._getframe(1), None)
        self.runs: list[Run] = self._open(_device(args, kwargs))

    def _open(self, device: torch.device) -> list[Run]:
        """Decide for every branch, before anything of the block runs."""
        branches, site, forced = self.plan.branches, self.site, here.forced
        self.is_plain = forced is not None and not forced
        training = not self.is_plain and site.is_training()
        if not training:
            decisions: list[Any] = [not self.is_plain and is_left_out(b) for b in branches]
        elif self.compiling:
            decisions = [b.is_always if b.is_certain else None for b in branches]
        else:
            decisions = self._decide(branches)
            if self.outer:  # samples are masked in the graph, whose shapes stay the same
                decisions = [d if isinstance(d, bool) else None for d in decisions]
        for branch, decision in zip(branches, decisions, strict=True):
            if decision is None:
                site.draws.check_graph(branch, site.modules_of(branch))
        runs: list[Run] = []
        counts_any = site.block.training and not self.is_plain
        in_graph, dtypes = self.compiling or self.outer, self.plan.dtypes
        weight: Any
        for i, branch in enumerate(branches):
            decision, weight, counts = decisions[i], 1.0, counts_any
            if forced and branch in forced:
                decision, weight = forced[branch]
                counts = False
            elif decision is not None and not self.is_plain:
                weight = kept_weight(branch, training)
            if self.outer and weight != 1.0:  # one graph for any rate
                weight = torch.tensor(weight, dtype=torch.float64, device="cpu")
            run = Run(branch, decision, weight, device, site, dtypes.get(i), in_graph)
            runs.append(run)
            run.counts = counts
            is_counted = counts and not self.compiling and self.task == -1
            if is_counted and decision is not None and branch.decides_calls:
                branch.decided += 1
                branch.dropped += decision
        return runs

    def _decide(self, branches: list[Branch]) -> list[Any]:
        """Draw for the branches that are not decided by hand: for these nobody's numbers change."""
        site, forced = self.site, here.forced
        if not forced:
            return site.draws.decide(branches, site.block)  # type: ignore[no-any-return]
        open_ones = [branch for branch in branches if branch not in forced]
        drawn = dict(zip(open_ones, site.draws.decide(open_ones, site.block), strict=True))
        return [drawn.get(branch, False) for branch in branches]

    def call(
        self, path: str, slot: Slot, args: Any, kwargs: Any, again: Repeat | None = None
    ) -> Any:
        """A call that the block's forward makes of what is at ``path`` below it.

        Or checkpointing repeats it: the call that has ``again`` on record.
        """
        apart = torch.is_grad_enabled() is not self.gradients  # in a Function, perhaps
        if apart and self.outer and torch.compiler.is_compiling():
            return self._call_outside(path, slot, args, kwargs, again)
        gates, index, gate = self.plan.gates.get(path), 0, _OTHER
        if gates is not None:
            index = self.counts.get(path, 0) if again is None else again.turn
            self.counts[path] = index + 1
            gate = gates[index] if index < len(gates) else self._one_more(path, gates)
        part = first_part(args)
        if part is None and kwargs:
            part = first_part(kwargs.values())
        if gates is None and part is None and path not in self.plan.others:
            self._tell_new(path, slot.module)
        run, kind = None, type(slot.module)
        is_drop = gate.drops == kind.__qualname__  # and nothing that has taken its place
        if getattr(kind, "takes_parts", False):  # of a branch that was pruned
            gate = _OTHER
        elif part is not None:
            run = part._run
            own = None if gate.branch is None else self.runs[gate.branch]
            # What checkpointing within checkpointing repeats comes from the first of two frames.
            known = own is run or (
                again is not None and own is not None and own.branch is run.branch
            )
            if not known or (gate.drops and not is_drop):  # not as it was watched
                last = any([p._last for p in parts_in((*args, *kwargs.values()))])
                gate = Gate(self.runs.index(run) if run in self.runs else None, last)
        elif gate.branch is not None:
            run = self.runs[gate.branch]
        function = None if again is None else again.function
        if again is None and apart:
            function = self._function()
        if again is None and run is not None and self._may_be_repeated(function):
            slot.repeats = slot.repeats or Repeats()
            slot.repeats.add(Repeat(self, path, index, function or self.around))
            self.site.is_repeated = True
        if run is not None:
            run.called = True
        drops = self.site.replaces and not self.is_plain
        if run is not None and is_drop and (run.dropped or drops):
            return next(iter((*args, *kwargs.values())))
        if run is not None and not (self.outer and torch.compiler.is_compiling()):
            run.function = function
        before, here.frame = here.frame, INSIDE
        try:
            if run is None:
                return slot.run(*args, **kwargs)
            return run.call(
                gate,
                slot.run,
                args,
                kwargs,
                part is not None,
                lambda: self.site.form_of(slot.module, args, kwargs),
            )
        finally:
            here.frame = before

    @outside_graphs  # in which neither the Function is seen, nor what it repeats later
    def _call_outside(self, *call: Any) -> Any:
        return self.call(*call)

    def _function(self) -> str | None:
        """The file of the custom autograd.Function that makes this call, if one does."""
        if torch.compiler.is_compiling():
            return CHECKPOINT
        return function_around(sys._getframe(1), _BLOCK)

    def _may_be_repeated(self, function: str | None) -> bool:
        """Whether a backward pass may repeat what is called now, without this frame."""
        if self.compiling or torch.compiler.is_compiling():
            return False
        inverse = self.around not in (None, CHECKPOINT)  # may be computed in its backward pass
        return inverse or function is not None or saved_tensors_hooks() != self.hooks

    def decisions(self) -> Any:
        return [(run.dropped, run.seed) for run in self.runs]

    def _watch_backward(self, out: Any) -> None:
        """Know when its calls need not be repeated any more: the graph is gone, or gone through."""
        for x in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(x, Tensor) and x.grad_fn is not None:
                metadata: Any = x.grad_fn.metadata
                alive = metadata[_Alive] = _Alive()
                self.graph = weakref.ref(alive)
                x.register_hook(lambda grad: self.done())  # type: ignore[no-untyped-call]
                return

    def done(self) -> None:
        """A backward pass has come back to it."""
        self.graph = _gone

    def close(self, out: Any) -> Any:
        """What the block returns.

        Raises:
            RuntimeError: a value of a branch is in it, or has not come to its sum, which was not so
                when it was watched.
        """
        known = (out,) if type(out) in (Tensor, Part, tuple, list, dict) else tree_leaves(out)
        if first_part(known) is not None:
            leaves, structure = tree_flatten(out)
            for i in self.plan.dead:
                if i < len(leaves) and type(leaves[i]) is Part:
                    leaves[i] = _settled(leaves[i])
            for part in leaves:
                if type(part) is Part:
                    raise part._run.error(
                        "returns one of its values from its block, or reaches another sum than the "
                        "one that was found; give apply() example_inputs like those of training, "
                        "and call it again if the code of the model has changed since"
                    )
            out = tree_unflatten(leaves, structure)
        if here.forced:
            here.joined |= {run.branch for run in self.runs if run.joined}
        for run in self.runs:
            run.split, run.owed, run.closed = None, [], True  # on record it keeps no tensors
            if not (run.joined or self.compiling or self.outer or self.is_plain):
                self._check_way(run)
        self.hooks = None  # which hold what is checkpointed
        if self.site.is_repeated:
            self._watch_backward(out)
        return out

    def _one_more(self, path: str, gates: tuple[Gate, ...]) -> Gate:
        """The gate of a call more than were watched: the last, where it is known to be such a one.

        Raises:
            RuntimeError: what the call belongs to cannot be told.
        """
        last, block = gates[-1], type(self.site.block).__name__
        known = {gate.branch for gate in gates}
        if len(known) == 1 and last.branch is not None and not self.runs[last.branch].joined:
            return last  # one more part of the same branch
        alike = {replace(gate, branch=None) for gate in gates} == {replace(last, branch=None)}
        if not alike or 1 < len(known) < len(gates):
            raise RuntimeError(
                f"stochastic depth: {block} calls {path} more often than when it was watched, and "
                "which branch that belongs to cannot be told; give apply() example_inputs like "
                "those of training, or exclude its branches"
            )
        self._tell(
            f"{block} calls {path} more often than when it was watched, and the further calls are "
            "dropped when the last one is"
        )
        return last

    def _tell_new(self, path: str, module: nn.Module) -> None:
        if any(True for _ in module.parameters()):
            self._tell(
                f"{type(self.site.block).__name__} calls {path}, which it did not when it was "
                "watched; if that is a residual branch, it is not dropped"
            )

    def tell_hooks(self) -> None:
        """Warn, once, of a user's hooks on a block that is dropped as a whole."""
        block = self.site.block
        hooks = forward_hooks(block) if self.runs[0].branch.is_active else []
        if any(not (getattr(h, "__module__", None) or "").startswith(NOT_THE_USERS) for h in hooks):
            self._tell(
                f"{type(block).__name__} has forward hooks, which do not run where it is dropped "
                "and see just the kept samples: what they collect, as for "
                "output_hidden_states=True, is not whole",
                "hooks",
            )

    def _tell(self, what: str, kind: str = "way") -> None:
        """Warn, once, of a call that goes another way than when it was watched."""
        site, in_graph = self.site, self.compiling or torch.compiler.is_compiling()
        if not (in_graph or kind in site.told or here.forced is not None) and site.block.training:
            site.told.add(kind)
            warnings.warn(
                f"stochastic depth: {what}; give apply() example_inputs like those of training",
                stacklevel=2,
            )

    def _check_way(self, run: Run) -> None:
        """Say so where a branch has gone another way than when it was watched."""
        weighed, alone = run.is_weighed and not run.dropped, not run.branch.modules
        one = alone and any([r.joined and r.branch is run.branch for r in self.runs])  # for all
        if one or (not weighed and (run.called or (alone and not run.dropped))):
            return
        chosen = run.decided and (run.kept is not None or run.weight != 1.0)
        if run.called and chosen and not run.ended:  # else it is not weighed
            raise run.error(
                "is computed and does not come to the sum that was found, where it would be "
                "weighed; call apply() again after a change of the model"
            )
        if run.branch.is_active and not self.site.findings.unused:
            what = "does not come to the sum that was found, and is not dropped"
            if not (run.called or alone):
                what = "was not called in a call of its block; what is in its place is not dropped"
            self._tell(f"{run.branch.name} {what}")


def fences_around(block: nn.Module, frame: Frame) -> list[Any]:
    """Around a block's forward, where it has hooks of its own: these are no part of it."""
    if frame.compiling or not has_hooks(block):
        return []
    here.frame, here.entering = INSIDE, frame

    def enter(block: nn.Module, args: Any) -> None:
        if here.entering is frame and here.frame is INSIDE:  # and in no call within this one
            here.frame = frame

    def leave(block: nn.Module, args: Any, out: Any) -> None:
        if here.frame is frame:
            here.frame = INSIDE

    return [
        block.register_forward_pre_hook(enter),
        block.register_forward_hook(leave, prepend=True),
    ]


class _Alive:
    """Lives in the graph behind a block."""


def _gone() -> None:
    """There is no graph."""


_OTHER = Gate(None)
_BLOCK = Slot.through.__code__  # by which the block's own call is made; modules in it may have none


def _settled(part: Part) -> Any:
    """A value of the branch that nobody read when it was watched: zeros where it is dropped."""
    if part._value is not None:
        return whole(part)
    known = form(part)
    return torch.zeros((), dtype=known.dtype, device=part._run.device).expand(known.shape)


def _device(args: Any, kwargs: Any) -> torch.device:
    for x in args:
        if isinstance(x, Tensor):
            return x.device
    tensors = tensor_leaves((args, kwargs))
    return tensors[0].device if tensors else torch.device("cpu")
