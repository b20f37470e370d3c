"""Where calls of modules are met: in an attribute of the instance that ``nn.Module`` looks up.

``nn.Module.__call__`` calls what stands there; a slot decides whether the class's own call runs.
The block's forward, its ``self`` and all children are the user's. Hooks of a child whose branch is
dropped do not run: they are a part of that call. torch.compile follows the slot, too, and
``module.compile()`` compiles what is in it.

What a slot does depends on ``here.frame``, the call of a block that is in progress on this thread:
None outside of blocks, INSIDE while a child runs, whose calls are its own affair.
"""

import copy
import threading
import warnings
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch
from torch import nn

from .._torch import (
    CALL,
    COMPILED_CALL,
    CONTENTS,
    REPLICATE,
    class_replicate,
    graph_task,
    is_compiled_around,
    starts_graphs,
    tell_apart,
)
from .repeats import Repeats

__all__ = [
    "INSIDE",
    "Inside",
    "Slot",
    "here",
    "keep_slots",
    "met_first",
    "outer_slot",
    "put",
    "slot_of",
    "take_out",
]


class Inside:
    """Stands for the frame while a child runs; ``task`` is a backward pass that repeats nothing."""

    def __init__(self, task: int = -2) -> None:  # of no backward pass
        self.slots: dict[str, Slot] = {}
        self.task = task
        self.site = None


class _Here(threading.local):
    def __init__(self) -> None:  # dynamo's guards want the attribute on every thread
        self.frame: Any = None
        self.entering: Any = None  # that of the newest call of a block with hooks
        self.layers: list[Any] = []  # of each with that is open, what the next three come from
        # Decisions that were made by hand; an empty dict stops all sites.
        self.forced: dict[Any, tuple[int, float]] | None = None
        self.sizes: dict[Any, int] | None = None  # of how many samples branches choose
        self.joined: set[Any] = set()  # those whose sum has been met since
        # The branches that are dropped in evaluation, too.
        self.sampled: frozenset[Any] = frozenset()
        # Whether these two hold for users, whose backward passes may come after them.
        self.is_for_users = False


here, INSIDE = _Here(), Inside()
_GETSTATE = "__getstate__"
_COPY = "__deepcopy__"
_COMPILE = "compile"
_SCRIPT = "__prepare_scriptable__"  # which torch.jit.script calls
_OURS = {REPLICATE, _GETSTATE, _COPY, _COMPILE, _SCRIPT}  # what stands in a module beside the slot


class Slot:
    """Meets the calls of one module.

    Attributes:
        module: whose slot it is.
        site: what the module's own calls run through, where it is a block with branches.
        inner: what runs in place of the class's call: compiled code.
        names: by which frames may know it: its module's names below their blocks.
        repeats: the calls that checkpointing inside of a block may repeat.
    """

    def __init__(self, module: nn.Module) -> None:
        self.__setstate__({"module": module, "site": None})

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "site": self.site}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.module: nn.Module = state["module"]
        self.site: Any = state["site"]
        self.inner: Any = None
        self.names: tuple[str, ...] = ()
        self.repeats: Repeats | None = None
        self.module.__dict__[REPLICATE] = self.replicate
        self.module.__dict__[_GETSTATE] = self.state_of_module
        self.module.__dict__[_SCRIPT] = self.prepare_scriptable
        if hasattr(type(self.module), _COPY):
            self.module.__dict__[_COPY] = self.copy_of_module
        if getattr(type(self.site), "decides_outside", False):  # a copy of a block
            self.decide_outside()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        frame = here.frame
        if self.repeats is not None and self._is_repeated(frame):
            again = self.repeats.find()
            return again.frame.call(again.path, self, args, kwargs, again)
        if frame is not None:
            for name in self.names:
                if frame.slots.get(name) is self:
                    return frame.call(name, self, args, kwargs)
        site = self.site
        if site is not None and site.is_active():
            if site.is_root and is_compiled_around():
                return _traced(self, args, kwargs)
            return site.run(self, args, kwargs)
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        module = self.module  # the usual one, without a detour
        return type(module)._call_impl(module, *args, **kwargs)  # type: ignore[no-untyped-call]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The call itself, through the module's own site where it has one."""
        site = self.site
        if site is not None and site.is_active():
            return site.run(self, args, kwargs)
        return self.through(*args, **kwargs)

    def through(self, *args: Any, **kwargs: Any) -> Any:
        """The call of the class, hooks and forward, or what it was compiled to."""
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        module = self.module
        return type(module)._call_impl(module, *args, **kwargs)  # type: ignore[no-untyped-call]

    def decide_outside(self) -> None:
        """Have the module's decisions made outside of what ``module.compile()`` compiles."""
        if type(self.module).compile is nn.Module.compile:  # else it means something else
            self.module.__dict__[_COMPILE] = self.compile

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """``module.compile()`` for a block."""
        call = MethodType(type(self.module)._call_impl, self.module)
        self.module.__dict__[COMPILED_CALL] = torch.compile(call, *args, **kwargs)
        put(self.module)

    def _is_repeated(self, frame: Any) -> bool:
        """Whether a backward pass makes this call again, when its frame is gone."""
        task = graph_task()
        return task != -1 and (frame is None or frame.task != task)

    def state_of_module(self) -> Any:
        """What copies and pickles of the module hold: of a child no trace of us, of a block all."""
        module = self.module
        state = type(module).__getstate__(module)  # type: ignore[no-untyped-call]
        if isinstance(state, dict):
            ours = _OURS
            slot = slot_of(module)  # None in a copy that its class has made without
            alone = slot is None or slot.site is None
            if alone:
                ours = {CALL, *_OURS}
            state = {name: value for name, value in state.items() if name not in ours}
            if alone:
                tell_apart(state)
        return state

    def copy_of_module(self, memo: dict[int, Any]) -> nn.Module:
        """What the class makes itself, as ``torch.fx.GraphModule`` does, has no slot."""
        module: Any = self.module
        copied: nn.Module = type(module).__deepcopy__(module, memo)
        memo[id(module)] = copied
        if self.site is not None and slot_of(copied) is None:
            put(copied).site = copy.deepcopy(self.site, memo)
        return copied

    def prepare_scriptable(self) -> nn.Module:
        """What torch.jit.script compiles: the module without us."""
        if self.site is not None and self.site.is_active():
            warnings.warn(_SCRIPTED, stacklevel=2)
        own = getattr(type(self.module), _SCRIPT, lambda module: module)
        return own(self.module)  # type: ignore[no-any-return]

    def replicate(self) -> nn.Module:
        """DataParallel's replicas share the ``__dict__``; their slots have to be their own.

        Raises:
            RuntimeError: what is asked for on this thread would not hold on those of the replicas,
                or there is nothing yet that a replica could have.
        """
        if self.site is not None and not hasattr(self.site, "of_replica"):
            raise RuntimeError(_REPLICAS)
        check_replicas(getattr(self.site, "branches", ()))
        replica = class_replicate(self.module)
        replica.__dict__.pop(COMPILED_CALL, None)
        slot = replica.__dict__[CALL] = Slot(replica)
        if self.site is not None:
            slot.site = self.site.of_replica(replica)
        return replica


_SCRIPTED = (
    "stochastic depth: torch.jit.script compiles the model's own code, and what it makes neither "
    "drops branches nor weighs them: call model.eval() before, and with scale='eval' take "
    "torch.export or torch.jit.trace"
)
_REPLICAS = (
    "stochastic depth: nn.DataParallel runs replicas of the model on other threads: give apply() "
    "example_inputs, as branches cannot be found there, and use skip() and sampling() on the model "
    "without it"
)


def check_replicas(branches: Iterable[Any]) -> None:
    """Raise where a user asks on this thread for something of these branches."""
    if here.is_for_users and not here.sampled.union(here.forced or ()).isdisjoint(branches):
        raise RuntimeError(_REPLICAS)


@starts_graphs
def _traced(slot: Slot, args: Any, kwargs: Any) -> Any:
    """A call of a whole model that is compiled: one graph, unless it breaks in it."""
    return slot.run(*args, **kwargs)


def slot_of(module: nn.Module) -> Any:
    """The slot of ``module``, or None."""
    slot = module.__dict__.get(CALL)
    return slot if isinstance(slot, Slot) and slot.module is module else None


def outer_slot(module: nn.Module) -> Any:
    """What calls of ``module`` meet first, if it is a slot."""
    slot = met_first(module)
    return slot if type(slot) is Slot and slot.module is module else None


def met_first(module: nn.Module) -> Any:
    """What stands where calls of ``module`` come first, or None."""
    own = module.__dict__
    return own.get(COMPILED_CALL) or own.get(CALL)


def put(module: nn.Module) -> Slot:
    """The slot that calls of ``module`` meet first, also where the module is compiled."""
    own = module.__dict__
    slot: Slot | None = slot_of(module)
    if slot is None:
        slot = own[CALL] = Slot(module)
        tell_apart(own)
    compiled: Any = own.get(COMPILED_CALL)
    if compiled is None:
        return slot
    if isinstance(compiled, Slot):
        return compiled
    outer = own[COMPILED_CALL] = Slot(module)
    outer.inner, outer.site = compiled, slot.site
    return outer


def keep_slots(model: nn.Module) -> Callable[[], None]:
    """What puts all slots of ``model`` back as they are now."""
    names = {CALL, COMPILED_CALL, *_OURS, *CONTENTS}
    before = [
        (m, {name: x for name, x in m.__dict__.items() if name in names}) for m in model.modules()
    ]
    slots = [x for _, held in before for x in held.values() if isinstance(x, Slot)]
    sites = [slot.site for slot in slots]

    def put_back() -> None:
        for module, held in before:
            for name in names.difference(CONTENTS) & module.__dict__.keys():
                del module.__dict__[name]
            module.__dict__.update(held)
        for slot, site in zip(slots, sites, strict=True):
            slot.site = site

    return put_back


def take_out(module: nn.Module) -> None:
    """Leave the module as if it had never had a slot."""
    own = module.__dict__
    slot = own.get(CALL)
    if isinstance(slot, Slot):
        slot.site = None  # what ``module.compile()`` has made may hold it
        for name in (CALL, *_OURS):
            own.pop(name, None)
        tell_apart(own)
    if isinstance(compiled := own.get(COMPILED_CALL), Slot):
        own[COMPILED_CALL] = compiled.inner
