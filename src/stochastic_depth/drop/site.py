"""A block with branches: what is known of its calls, and the slots of the modules that it calls."""

import copy
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode

from .._torch import (
    graph_task,
    is_compiled_around,
    outside_graphs,
    tree_map_only,
)
from ..branch import Branch
from ..find.form import form_of, precision_of
from ..find.plan import Findings, Form, Plan
from .collectives import existing_of, modules_of
from .draws import Draws
from .force import check_repeats
from .forms import Forms
from .frame import Frame, fences_around
from .part import Part, form
from .pass_on import PassOn, may_be_fused
from .reads import Reads
from .slot import Inside, Slot, here, met_first, outer_slot, put, slot_of, take_out

__all__ = ["Site"]

Watch = Callable[["Site", Any, Any, "Plan | None"], "Plan | None"]


class Site:
    """What the slot of a block asks when the block is called.

    Args:
        block: the block.
        branches: those that can be dropped, in the order of execution.
        plans: by the form of the call, what is known of it.
        draws: makes the decisions.
        watch: finds the plan of a call in a form that has not been seen; or, given the plan of one
            in this form, that in the precision of now.
        findings: of the whole model, for reports.
    """

    decides_outside = True

    def __init__(
        self,
        block: nn.Module,
        branches: list[Branch],
        plans: dict[Form, Plan],
        draws: Draws,
        watch: Watch,
        findings: Findings,
    ) -> None:
        self.block, self.branches, self.plans = block, branches, plans
        self.draws, self.watch, self.findings = draws, watch, findings
        self.is_repeated = False  # checkpointing in the block has repeated calls of its children
        self.is_root = any(branch.name.startswith(":") for branch in branches)
        self.told: set[str] = set()  # what has been warned of
        self.takes_new = False  # branches that only a new form of call has
        self.replaces = any(branch.existing for branch in branches)
        self.others: dict[Any, Plan] = {}  # of calls in another precision, by form and precision
        self.forms = Forms()
        self.slots: dict[str, Slot] = {}
        self.seen: list[tuple[nn.Module, list[Any], list[tuple[nn.Module, Any]]]] = []
        self.all_slots: WeakSet[Slot] = WeakSet()  # that it has put into children

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "others": {}, "slots": {}, "seen": []}
        del state["all_slots"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.all_slots = WeakSet()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Site":
        """A copy with slots in place: torch.compile, which may come next, cannot put them there.

        The block's children have been copied before its slot, which was added after them.
        """
        site = memo[id(self)] = object.__new__(type(self))
        site.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        for name, slot in self.slots.items():
            child = memo.get(id(slot.module))
            if child is not None:
                site.slots[name] = put(child)
                site.slots[name].names = slot.names
                site.all_slots.add(site.slots[name])
        return site

    def is_active(self) -> bool:
        """Whether a call of the block now may drop or weigh anything."""
        if self.is_repeated:
            return True
        forced = here.forced
        if forced is not None and (not forced or any([b in forced for b in self.branches])):
            return bool(forced)
        if self.is_training():
            if not torch.compiler.is_compiling() and self.draws.tape.tickets:
                self._check_rates()
            return self.replaces or any([b.is_active for b in self.branches])
        return any([b.scale == "eval" and b.is_active for b in self.branches])

    def _check_rates(self) -> None:
        """Raise where what is repeated now was drawn by rates that leave nothing to draw by now."""
        if all(branch.is_certain for branch in self.branches):
            self.draws.tape.check_rates([branch.name for branch in self.branches])

    def is_training(self) -> bool:
        """Whether decisions are drawn: in training, and in evaluation while it is sampled."""
        if self.block.training:
            return True
        sampled = here.sampled
        return bool(sampled) and any([b in sampled for b in self.branches])

    # The slots of the modules that the block's forward calls.

    def install(self) -> None:
        put(self.block).site = self
        inner = slot_of(self.block)
        inner.site = self  # where what is compiled goes
        inner.decide_outside()
        self._renew()
        for module in self._existing():
            put(module).site = PassOn(module)

    def _existing(self) -> list[nn.Module]:
        """The drop modules inside of what the branches call, where no frame meets their calls."""
        called = {path for plan in self.plans.values() for path in plan.gates}
        named = [existing_of(branch, self.block) for branch in self.branches]
        return [module for found in named for name, module in found if name not in called]

    def uninstall(self) -> None:
        for module in self._existing():
            if (slot := slot_of(module)) is not None:
                slot.site = None
                take_out(module)
        for slot in list(self.all_slots):
            if slot.site is None:
                take_out(slot.module)
        if (slot := outer_slot(self.block)) is not None:
            slot.site = None
        take_out(self.block)

    def reach(self, compiling: bool) -> dict[str, Slot]:
        """The slots of the modules that the frame can call, by name; all are in place."""
        if not (compiling and self.slots) and not self._is_as_seen():
            self._renew()
        return self.slots

    def _renew(self) -> None:
        called: dict[str, None] = {}
        opened: set[str] = set()
        for plan in self.plans.values():
            called |= dict.fromkeys(plan.gates)
            opened |= plan.opened
        # A module that hangs in several places goes by the name that the plan has for it.
        names = {id(self._below(name)): name for name in called}
        inner = {id(self._below(name)) for name in opened}
        ways = {path for name in (*called, *opened) for path in _above(name)}
        self.slots, self.seen = {}, []
        parents = [("", self.block)]
        for path, parent in parents:
            for name, child in parent._modules.items():
                below = f"{path}.{name}" if path else name
                if child is None:
                    continue
                if below in ways or id(child) in inner:
                    parents.append((below, child))
                if id(child) not in inner and (below not in ways or id(child) in names):
                    slot, known = put(child), names.get(id(child), below)
                    self.slots[known] = slot
                    self.all_slots.add(slot)
                    if known not in slot.names:
                        slot.names += (known,)
            children = list(parent._modules.values())
            met = [(child, met_first(child)) for child in children if child is not None]
            self.seen.append((parent, children, met))

    def _below(self, name: str) -> nn.Module | None:
        try:
            return self.block.get_submodule(name)
        except AttributeError:  # it has been taken out since
            return None

    def _is_as_seen(self) -> bool:
        for parent, children, met in self.seen:
            if list(parent._modules.values()) != children:
                return False
            for child, known in met:
                if met_first(child) is not known:
                    return False
        return bool(self.seen)

    # A call.

    def plan_of(self, args: Any, kwargs: Any, compiling: bool) -> Plan | None:
        """What is known of a call in this form; it is watched where nothing is."""
        key = form_of(args, kwargs)
        if key not in self.plans:
            if compiling:
                return next(iter(self.plans.values()), None)
            plan = self.watch(self, args, kwargs, None)
            self.seen = []
            if plan is None:
                return None
            self.plans[key] = plan
        plan = self.plans[key]
        if not plan.branches or compiling:
            return plan
        precision = precision_of(args, kwargs)
        if plan.precision == precision:
            return plan
        if (key, precision) not in self.others:
            self.others[key, precision] = self.watch(self, args, kwargs, plan) or plan
        return self.others[key, precision]

    def run(self, slot: Slot, args: Any, kwargs: Any) -> Any:
        """A call of the block with branches that may be dropped."""
        if here.is_for_users:
            check_repeats(self.branches, self.block.training)
        frame, compiling = here.frame, torch.compiler.is_compiling()
        if frame is not None and frame.site is self and frame.outer and not self.is_outer(slot):
            return slot.through(*args, **kwargs)  # decided outside of the compiled code
        plan = self.plan_of(args, kwargs, compiling)
        if plan is not None and here.forced:
            self._check_forced(plan)
        if plan is None:
            out = slot.through(*args, **kwargs)
            if not compiling:  # it works, and could not be watched
                self.plans.setdefault(form_of(args, kwargs), Plan())
            return out
        if not plan.branches:
            return slot.through(*args, **kwargs)
        if compiling and self._is_encoder_layer():
            return self._run_outside(plan, slot, args, kwargs)
        return self.run_plan(plan, slot, args, kwargs)

    def _is_encoder_layer(self) -> bool:
        return isinstance(self.block, nn.TransformerEncoderLayer) and may_be_fused(self.block)

    @outside_graphs  # in which no mode keeps that kernel out
    def _run_outside(self, plan: Plan, slot: Slot, args: Any, kwargs: Any) -> Any:
        return self.run_plan(plan, slot, args, kwargs)

    def is_outer(self, slot: Slot) -> bool:
        """Whether compiled code makes the call, and its decisions are made out here."""
        compiled = slot.inner is not None or slot.module is not self.block or is_compiled_around()
        return compiled and not torch.compiler.is_compiling()

    def _check_forced(self, plan: Plan) -> None:
        """Raise where a branch is to be left out by hand that a call of this form needs."""
        forced = here.forced or {}
        for branch in self.branches:
            if forced.get(branch, (False,))[0] and branch not in plan.branches:
                raise RuntimeError(
                    f"stochastic depth: the branch {branch.name} cannot be left out of a call in "
                    "this form, in which something else reads what it computes or keeps, as a "
                    "cache; call the model without one (use_cache=False), or prune it"
                )

    def run_plan(self, plan: Plan, slot: Slot, args: Any, kwargs: Any) -> Any:
        before, entering = here.frame, here.entering
        frame = here.frame = Frame(self, plan, args, kwargs, self.is_outer(slot))
        fences = fences_around(self.block, frame)
        try:
            mode = self._mode(frame)
            if mode is not None:
                with mode:
                    out = slot.through(*args, **kwargs)
            else:
                out = slot.through(*args, **kwargs)
            return frame.close(out)
        finally:
            here.frame, here.entering = before, entering
            for fence in fences:
                fence.remove()

    def _mode(self, frame: Frame) -> TorchFunctionMode | None:
        """What has to see the operations of the block's forward, if anything."""
        if any([b.parameters or b.in_function for b in frame.plan.branches]):
            return Reads(frame)
        if self._is_encoder_layer():
            return BaseTorchFunctionMode()  # which keeps the kernel out
        return None

    # What a run asks.

    def modules_of(self, branch: Branch) -> list[nn.Module]:
        return modules_of(branch, self.block)

    def parameters_of(self, branch: Branch) -> list[Tensor]:
        return [_attribute(self.block, name) for name in branch.weights]

    def form_of(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """What a call that is not made would return, on the meta device."""
        given = tree_map_only(Part, form, (args, kwargs))
        before, here.frame = here.frame, Inside(graph_task())
        try:
            return self.forms.of(module, *given)
        finally:
            here.frame = before

    def of_replica(self, replica: nn.Module) -> "Site":
        site = copy.copy(self)
        site.block, site.slots, site.seen = replica, {}, []
        return site


def _above(name: str) -> list[str]:
    """The names of the modules that the one of this name is in."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _attribute(block: nn.Module, name: str) -> Any:
    path, _, last = name.rpartition(".")
    return getattr(block.get_submodule(path), last)
