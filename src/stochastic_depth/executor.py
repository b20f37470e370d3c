"""What stands in for a block's forward: in training, the forward with droppable branches."""

import copy
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_unflatten

from .coins import Coins
from .detect import CaptureError, Found, NotResidual, make_program
from .detect.batches import rows_agree
from .detect.capture import Call, computing_modes, read_call, settings_of
from .detect.examples import Detail
from .detect.program import Program
from .detect.programs import Programs
from .functional import Droppable, DroppedGrad, combine
from .replay import is_recomputing, saves_through_hooks
from .sampling import Keep, Mode, Scale, decide

__all__ = ["BranchState", "ResidualForward", "installed", "observe", "slot"]

Observer = Callable[["BranchState", Callable[..., Any], tuple[Any, ...]], Any]
_observer: Observer | None = None


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Have every branch run as ``observer(state, run, inputs) -> output``, and count as kept.

    How the report and the benchmarks measure branches; for one thread.
    """
    global _observer
    _observer, before = observer, _observer
    try:
        yield
    finally:
        _observer = before


def slot(block: nn.Module) -> str:
    """Where in the ``__dict__`` of ``block`` a forward of its own stands.

    accelerate's hooks (``cpu_offload``, ``dispatch_model``) replace the forward and keep the one
    before, which they call: ours if it was applied first, and there ours goes if they were.
    """
    return "_old_forward" if "_old_forward" in block.__dict__ else "forward"


def installed(block: nn.Module) -> "ResidualForward | None":
    """What stands in for the forward of ``block``, if it is ours."""
    own = block.__dict__.get(slot(block))
    return own if isinstance(own, ResidualForward) else None


@dataclass
class BranchState:
    """One residual branch of a model: what was found, how it is dropped, what happened so far."""

    found: Found
    p: float
    mode: Mode
    scale: Scale
    dropped_grad: DroppedGrad
    target: float | None = None  # where a RateSchedule leads p, if one does
    compile_options: dict[str, Any] | None = None  # set where the branch is compiled by itself
    decided: int = 0  # calls, or rows where rows are chosen, since applied
    dropped: int = 0


class ResidualForward:
    """A callable that is put in ``block.__dict__["forward"]``, or behind accelerate's hook there.

    In evaluation, and where every rate is 0, it calls the forward of the block's class, so the
    result is that of the plain model by construction. Otherwise it runs the block's program, in
    which every branch asks for its coin. Programs are made for each form of call when first
    needed and are no part of the pickled or copied state.
    """

    def __init__(
        self,
        block: nn.Module,
        states: list[BranchState],
        known: set[str],
        coins: Coins,
        call: Call,
    ) -> None:
        self.block = block
        self.known = known  # the labels of all residual sums that were seen when applied
        self.states = {state.found.label: state for state in states}
        self.coins = coins
        # By the key of a call, in which dimensions its values have the rows of the batch.
        self.row_dims = {call.key: call.row_dims}
        # A drop module inside a branch is replaced by our coin, also where our rate is 0.
        self.replaces = any(state.found.replaces for state in states)
        self._programs = Programs()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._active():
            program, values = self._program(args, kwargs)
            if program is not None and not self._hooked(program):
                return program.run(self.block, _Runner(self, program), *values)
        return type(self.block).forward(self.block, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_programs": Programs()}

    def __deepcopy__(self, memo: dict[int, Any]) -> "ResidualForward":
        # Programs hold no modules, so copies share them; they cannot be pickled.
        copied = object.__new__(ResidualForward)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        copied._programs = self._programs.copy()
        return copied

    def install(self) -> None:
        """Stand in for the block's forward from now on."""
        self.block.__dict__[slot(self.block)] = self
        # DataParallel's replicas copy the __dict__; their forward has to be about themselves.
        self.block.__dict__["_replicate_for_data_parallel"] = self._replicate
        for drop in self._drops_inside():
            drop.__dict__["forward"] = _pass_on

    def uninstall(self) -> None:
        """Give the block its own forward back."""
        del self.block.__dict__["_replicate_for_data_parallel"]
        if slot(self.block) == "forward":
            del self.block.__dict__["forward"]
        else:  # accelerate's hook calls what is there
            self.block.__dict__["_old_forward"] = MethodType(type(self.block).forward, self.block)
        for drop in self._drops_inside():
            drop.__dict__.pop("forward", None)

    def _drops_inside(self) -> list[nn.Module]:
        """The drop modules inside of what the branches run, where no program can leave them out."""
        founds = [state.found for state in self.states.values()]
        return [
            self.block.get_submodule(n) for f in founds for n in f.existing if n not in f.modules
        ]

    def _replicate(self) -> nn.Module:
        replica: nn.Module = type(self.block)._replicate_for_data_parallel(self.block)  # type: ignore[no-untyped-call]
        forward = copy.copy(self)
        forward.block, forward._programs = replica, self._programs
        forward.install()
        return replica

    def prepare(self, call: Call) -> None:
        """Make the program for training calls like ``call`` now: torch.compile cannot do it."""
        args, kwargs = tree_unflatten(list(call.is_value), call.structure)
        key = call.key if kwargs or not all(arg is True for arg in args) else len(args)
        self._programs.latest[key, True] = self._make_program(call, training=True)[0]

    def compile(self, label: str, options: dict[str, Any]) -> None:
        """Compile a branch by itself from now on."""
        self.states[label].compile_options = options
        self._programs = Programs()

    def _active(self) -> bool:
        if _observer is not None:
            return True
        if self.block.training:
            return self.replaces or any(state.p > 0.0 for state in self.states.values())
        return any(state.p > 0.0 and state.scale == "eval" for state in self.states.values())

    def _program(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Program | None, Sequence[Any]]:
        """The program for a call like this, and the values it runs on."""
        key: Hashable
        values: Sequence[Any]
        if not kwargs and all(type(arg) is Tensor for arg in args):  # the usual call, made fast
            key, values = len(args), args
        else:
            call, values = read_call(args, kwargs)
            key = call.key
        key = key, self.block.training
        if torch.compiler.is_compiling() and key in self._programs.latest:
            return self._programs.latest[key], values

        def make() -> tuple[Program | None, Detail]:
            call, values = read_call(args, kwargs)
            return self._make_program(call.like(values), self.block.training)

        state = (*settings_of(self.block), *computing_modes())
        program = self._programs.get(key, state, values, make)
        if program is not None and self._outdated(program):
            self._programs = Programs()
            program = self._programs.get(key, state, values, make)
        return program, values

    def _outdated(self, program: Program) -> bool:
        """Whether a module that the program does not call has been replaced or set otherwise."""
        modules = [(self.block.get_submodule(name), was) for name, was in program.inlined.items()]
        return any(settings_of(module) != was for module, was in modules)

    def _make_program(self, call: Call, training: bool) -> tuple[Program | None, Detail]:
        call = replace(call, row_dims=self.row_dims.get(call.key))
        try:
            with _own_saved_tensors():
                made = make_program(self.block, call, training, set(self.states))
        except (CaptureError, NotResidual) as error:
            self._report(set(self.states), set(), str(error))
            return None, error.detail
        for label in self.states.keys() - made.labels:
            self._report({label}, set(), made.refused.get(label, "not found"))
        self._report(set(), made.labels - self.known, "")
        self._report_masking(made.program)
        return self._compiled(made.program), made.program.detail

    def _hooked(self, program: Program) -> bool:
        """Whether a module that the program does not call has hooks, which would not run."""
        for name in program.inlined:
            module = self.block.get_submodule(name)
            if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
                self._report(set(self.states), set(), f"hooks on {name!r} would not run")
                return True
        return False

    def _compiled(self, program: Program) -> Program:
        """``program`` with those branches compiled that ask for it."""
        branches = list(program.branches)
        for i, branch in enumerate(branches):
            options = self.states[branch.label].compile_options
            if options is not None:
                branches[i] = replace(branch, run=torch.compile(branch.run, **options))
        return replace(program, branches=tuple(branches))

    def _report_masking(self, program: Program) -> None:
        """Warn of branches whose rows cannot be told apart in this call, as apply() does."""
        masked = [
            branch.label
            for branch in program.branches
            for state in [self.states[branch.label]]
            if state.mode != "batch" and state.found.rows_known and branch.rows is None
        ]
        if masked:
            self.warn_of_masking(masked)

    def warn_of_masking(self, labels: list[str]) -> None:
        """Say that the rows of these branches cannot be told apart."""
        name = next(iter(self.states.values())).found.block
        warnings.warn(
            f"stochastic depth: {name!r} ({type(self.block).__name__}), called with these "
            "arguments: it cannot be told which of the tensors that enter these branches have "
            f"the batch's rows, so all are computed and the dropped left out: {labels}",
            stacklevel=2,
        )

    def _report(self, missing: set[str], new: set[str], reason: str) -> None:
        name = next(iter(self.states.values())).found.block
        kind = type(self.block).__name__
        called = f"stochastic depth: {name!r} ({kind}), called with these arguments,"
        if missing:
            warnings.warn(f"{called} never drops {sorted(missing)}: {reason}", stacklevel=2)
        if new:
            warnings.warn(
                f"{called} has residual branches that apply() did not see and that are never "
                f"dropped: {sorted(new)}. Give apply() example_inputs like those of training.",
                stacklevel=2,
            )


def _pass_on(x: Tensor) -> Tensor:
    return x


def _own_saved_tensors() -> AbstractContextManager[None]:
    """Keep what a trace saves from the hooks for what the model saves.

    Checkpointing counts that, and a trace is not made a second time when it recomputes.
    """
    if torch.compiler.is_compiling() or not saves_through_hooks():
        return nullcontext()  # under torch.func, which has none, they cannot be set either
    return saved_tensors_hooks(_as_it_is, _as_it_is)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class _Runner:
    """Runs the branches of one call of a block."""

    forward: ResidualForward
    program: Program

    def __call__(self, i: int, shortcut: Tensor, *inputs: Any) -> Any:
        branch = self.program.branches[i]
        state = self.forward.states[branch.label]
        block = self.forward.block

        run = partial(branch.run, block)

        if _observer is not None:
            return branch.sum(shortcut, _observer(state, run, inputs), 1.0)
        dim = state.found.batch_dim
        rows = 1 if state.mode == "batch" else shortcut.shape[dim]

        def modules() -> list[nn.Module]:
            return [block.get_submodule(name) for name in branch.modules]

        name = f"the branch {state.found.block}:{branch.label}"
        tossed = block.training and 0.0 < state.p < 1.0
        keep = decide(
            state.p,
            training=block.training,
            mode=state.mode,
            scale=state.scale,
            batch=rows,
            device=shortcut.device,
            generator=self.forward.coins.of(state.mode, modules, block, name) if tossed else None,
        )
        compiling = torch.compiler.is_compiling()
        if block.training and not compiling and not is_recomputing():
            # Not in a compiled graph, nor when checkpointing computes it a second time.
            state.decided += rows
            state.dropped += rows - _kept_rows(keep, rows)
        select = False
        if keep.rows is not None and branch.rows is not None:
            select = rows_agree(inputs, branch.rows, rows, dim)
            if not (select or compiling):
                self.forward.warn_of_masking([branch.label])
        droppable = Droppable(
            run=run,
            merge=branch.sum,
            modules=modules,
            parameters=lambda: [attrgetter(name)(block) for name in branch.parameters],
            batch_dim=dim,
            input_dims=branch.rows or (),
            select=select,
            dropped_grad=state.dropped_grad,
            name=name,
        )
        return combine(shortcut, inputs, keep, droppable)


def _kept_rows(keep: Keep, rows: int) -> int:
    if keep.weight == 0.0:
        return 0
    return rows if keep.rows is None else len(keep.rows)
