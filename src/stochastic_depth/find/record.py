"""Record one real run of a model: every torch function, by the module's call that it is part of.

Nothing stands in for a tensor, so the model sees what it always sees. Tensors are told apart by
identity and held weakly; what overwrites one is told by its version.
"""

import sys
import threading
import weakref
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._torch import tree_flatten, tree_unflatten
from .flow import Call, Flow, Function, Key, Node
from .form import form_of, precision_of
from .functions import FROM_PYTHON, LOOKS, MAY_ADD, OVERWRITES, RANDOM
from .ranks import held, is_between_ranks, is_distributed, is_sharded
from .spot import spot
from .state import attributes
from .tensors import (
    CHECKPOINT,
    function_around,
    is_packed,
    kind_of,
    leaves_of,
    memory_of,
    tensors_in,
    tensors_within,
    version_of,
)
from .unwritten import Writes
from .written import Written

__all__ = ["Recorder"]


class Recorder(TorchFunctionMode):
    """Records what runs inside of it, on the thread that entered it."""

    def __init__(self, model: nn.Module, constants: list[Tensor]) -> None:
        super().__init__()
        self.flow = Flow()
        self.model = model
        self.thread = threading.get_ident()
        self.sharded = any(is_sharded(m) for m in model.modules())
        self.names: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(id(module), []).append(name)
        self.own = {id(t): (t, f"buffer:{name}") for name, t in model.named_buffers()}
        self.own |= {id(t): (t, f"parameter:{name}") for name, t in model.named_parameters()}
        self.own |= {id(t): (t, "constant:") for t in constants}
        self.stack: list[int] = []
        self.known: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.memory: dict[int, list[weakref.ref[Tensor]]] = {}
        self.counts: dict[tuple[int, str], int] = {}
        self.paused = self.keeps_unknown = False
        self.writes = Writes([])  # to parameters
        self.written = Written(self.flow)
        self.looked: dict[int, list[int]] = {}  # by call, what Python looked at in it

    def inputs(self, args: Any, kwargs: Any) -> None:
        """Name what the model is given, caches' and other objects' tensors too."""
        for t in tensors_within((args, kwargs), 4):
            if self.node(t) is None:
                self._name(t, self._add(Node("input", -1, (), varies=True), t))

    # Calls of modules.

    @property
    def now(self) -> int:
        """The innermost call in progress, -1 outside of all."""
        return self.stack[-1] if self.stack else -1

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> int:
        """A call begins."""
        parent = self.now
        leaves = leaves_of(args, kwargs)
        given = [self._given(x) if isinstance(x, Tensor) else None for x in leaves]
        name = self._called(module, parent)
        number = len(self.flow.calls)
        start = len(self.flow.nodes)
        key = hash(self.key(f".{name}", parent, count=True))
        form = form_of(args, kwargs)
        call = Call(name, module, parent, start, form, given, key=key)
        call.function = _function(sys._getframe(2))
        call.precision = precision_of(args, kwargs)
        self.flow.calls.append(call)
        self.written.enter(number, args, kwargs)
        self.stack.append(number)
        return number

    def _given(self, t: Tensor) -> int | None:
        """The node of an argument; one that was not seen being made comes from the caller."""
        if id(t) in self.own or isinstance(t, nn.Parameter):
            return self.node(t)
        return self.source(t)

    def leave(self, number: int, result: Any) -> None:
        """It has returned ``result``."""
        call = self.flow.calls[number]
        if isinstance(result, Tensor):
            leaves: list[Any] = [result]
        else:
            leaves, spec = tree_flatten(result)
            try:
                call.structure = tree_unflatten(list(range(len(leaves))), spec)
            except Exception:  # of any kind: one that checks what it is made of, a PackedSequence
                leaves = [object()]
        call.kinds = [kind_of(x) for x in leaves]
        unseen = [t for t in tensors_within(result, 2) if self.node(t) is None]
        for t in unseen:
            if id(t) in self.own:
                self.source(t)
            elif not self._linked(t):
                self._unseen(t, number)
        call.made = [self.node(x) if isinstance(x, Tensor) else None for x in leaves]
        self.written.leave(number, result, self.node)
        del self.stack[self.stack.index(number) :]
        call.end = len(self.flow.nodes)

    def _unseen(self, t: Tensor, number: int) -> None:
        """What a script or compiled code returns depends on all that it was given."""
        call = self.flow.calls[number]
        sources = [n for n in call.given if n is not None]
        sources += [self.source(p) for p in call.module.parameters()]
        self._name(t, self._add(Node("opaque", number, tuple(sources)), t))

    def _called(self, module: nn.Module, parent: int) -> str:
        """Its name; of a shared module's, the one below the call that it is part of."""
        names = self.names[id(module)]
        if len(names) > 1:
            for call in self.flow.around(parent):
                prefix = self.flow.calls[call].name
                for name in names:
                    if not prefix or name.startswith(f"{prefix}."):
                        return name
        return names[0]

    def key(self, what: str, call: int, count: bool = False) -> Key:
        """The key of the next value that a function makes in a call, or of the next call."""
        where = self.flow.calls[call].key if call >= 0 else 0
        n = self.counts.get((where, what), 0)
        if count:
            self.counts[where, what] = n + 1
        return where, what, n

    # Values.

    def node(self, t: Tensor) -> int | None:
        """The node that a tensor is now."""
        entry = self.known.get(id(t))
        return entry[1] if entry is not None and entry[0]() is t else None

    def source(self, t: Tensor) -> int:
        """The same, of a tensor that is read: one that was not seen being made is named now."""
        if (known := self.node(t)) is not None:
            return known
        if id(t) in self.own or self._is_swapped_in(t):
            kind, _, name = self.own[id(t)][1].partition(":")
            weights = kind == "parameter" or isinstance(t, nn.Parameter) or is_packed(t)
            node = self._add(Node(kind, -1, (), weights=weights, name=name), t)
        elif isinstance(t, nn.Parameter):  # of a module that is not registered
            node = self._add(Node("constant", -1, (), weights=True), t)
        elif (alias := self._linked(t)) is not None:
            return alias
        else:
            if self.keeps_unknown:
                self.flow.unknown.append(t)
            call = self.now
            given = self.flow.calls[call].given if call >= 0 else []
            sources = tuple(n for n in given if n is not None)
            node = self._add(Node("opaque", call, sources, function="custom"), t)
        self._name(t, node)
        return node

    def _is_swapped_in(self, t: Tensor) -> bool:
        """Whether a module has it as a parameter for the time of its call only."""
        for c in self.flow.around(self.now):
            call = self.flow.calls[c]
            for name, own in call.module._parameters.items() if type(t) is nn.Parameter else ():
                if own is t:
                    self.own[id(t)] = t, f"parameter:{call.name}.{name}".replace(":.", ":")
                    return True
        return False

    def _linked(self, t: Tensor) -> int | None:
        """Name a tensor that has the memory of a known one, as a custom Function hands them out."""
        for ref in self.memory.get(memory_of(t), ()):
            other = ref()
            if other is None or other is t or memory_of(other) != memory_of(t):  # moved since
                continue
            if (node := self.node(other)) is not None:
                alias = self._add(Node("alias", self.now, (node,), function="custom"), t)
                self._name(t, alias)
                return alias
        return None

    def _name(self, t: Tensor, node: int) -> None:
        ref = weakref.ref(t)
        self.known[id(t)] = ref, node
        memory = memory_of(t)
        refs = self.memory.get(memory)
        if refs is None or refs[-1]() is None:
            self.memory[memory] = [r for r in refs or () if r() is not None] + [ref]
        elif refs[-1]() is not t:
            refs.append(ref)

    def _add(self, node: Node, t: Tensor | None) -> int:
        nodes = self.flow.nodes
        if node.sources:
            for source in node.sources:
                if nodes[source].varies:
                    node.varies = True
                    break
            else:
                node.weights = any(nodes[s].weights for s in node.sources)
                node.random = any(nodes[s].random for s in node.sources)
        if t is not None:
            node.shape, node.dtype = tuple(t.shape), t.dtype
        node.key = self.key(node.op, node.call, count=True)
        nodes.append(node)
        return len(nodes) - 1

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused or (self.sharded and is_between_ranks(sys._getframe(1))):
            return func(*args, **kwargs)
        name: str = getattr(func, "__name__", "") or str(func)
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", name)
            result = func(*args, **kwargs)
            if not isinstance(result, Tensor) or result is args[0] or name == "grad":
                return result
            self._record(name, args, kwargs, list(args[:1]), [], [result])
            return result
        self.writes.note(name, args, kwargs)
        given = tensors_in(args, [])
        if kwargs:
            tensors_in(kwargs, given)
        versions = [version_of(t) for t in given]
        if name in MAY_ADD:
            args, kwargs = self.before(name, args, kwargs, given)
        result = func(*args, **kwargs)
        changed = [
            t
            for t, v in zip(given, versions, strict=True)
            if v != version_of(t) and id(t) not in self.own
        ]
        fresh = [t for t in tensors_in(result, []) if not any(t is g for g in given)]
        if name in LOOKS and given and not fresh:
            self._look(given)
        if changed or fresh:
            self._record(name, args, kwargs, given, changed, fresh)
        return result

    def before(self, name: str, args: Any, kwargs: Any, given: Any) -> tuple[Any, Any]:
        """Change what a function that may be a sum is given, before it runs."""
        return args, kwargs

    def after(self, name: str, given: list[Tensor], made: list[Tensor], number: int) -> None:
        """What a function made has been recorded, as the value of this number."""

    def _look(self, given: list[Tensor]) -> None:
        call = self.now
        for t in given:
            if (node := self.node(t)) is not None and self.flow.nodes[node].varies:
                self.flow.looks.append((node, call))
                self.looked.setdefault(call, []).append(node)

    def _record(
        self, name: str, args: Any, kwargs: Any, given: list[Tensor], changed: list[Tensor],
        fresh: list[Tensor],
    ) -> None:  # fmt: skip
        sources, call = tuple([self.source(t) for t in given]), self.now
        if name.endswith("_as") or name == "to":  # of the second, the shape or the dtype alone
            sources = sources[:1]
        elif name in FROM_PYTHON and call in self.looked:
            sources += tuple(self.looked[call])
        outputs = [*changed, *fresh]
        several = len(outputs) > 1 and not changed
        node = Node(name, call, sources)
        index = self._add(node, None if several else outputs[0])
        if name.endswith("_like") or name.startswith("new_"):  # of its argument, the shape alone
            node.varies = node.weights = False
        if name in RANDOM:
            node.random = not node.varies or name in OVERWRITES
            node.varies = node.varies and name == "bernoulli"
        elif name in ("zero_", "fill_") and len(given) == 1:
            node.varies = False
        if len(given) > 1:
            node.parts = sources
        if name in MAY_ADD:
            positional = tuple(self.source(a) for a in args if isinstance(a, Tensor))
            if len(given) > 1 and len(positional) > (1 if kwargs else 0):  # else some are keywords
                node.parts = positional
            node.spot = spot(3)
            alpha = kwargs.get("alpha", 1)
            node.factor = float(alpha) if isinstance(alpha, int | float) else 1.0
        # An input that a custom Function returns is handed on as a view of itself, by its apply().
        handed_on = name == "view_as" and len(args) == 2 and args[0] is args[1]
        node.function = "custom" if handed_on else _function(sys._getframe(2))
        for t in outputs:
            self._name(t, self._add(Node("item", call, (index,)), t) if several else index)
        for t in changed:
            self._spread(t, index)
        self.after(name, given, outputs, index)

    def _spread(self, written: Tensor, op: int) -> None:
        """Other tensors with the memory of one that was overwritten have changed with it."""
        for ref in list(self.memory.get(memory_of(written), ())):
            t = ref()
            if t is None or t is written or memory_of(t) != memory_of(written):
                continue
            node = self.node(t)
            if node is not None and node != op:
                self._name(t, self._add(Node("alias", self.now, (node, op)), t))

    def finish(self, result: Any) -> Flow:
        """The flow of a run that returned ``result``."""
        flow = self.flow
        flow.result = result
        returned = list(tensors_within(result, 4))
        # With := the last of them would stay in a variable of this function, which then holds it.
        alive = [t for t in [ref() for ref, _ in self.known.values()] if t is not None]
        if is_distributed():
            # A collective's thread lets go of a tensor when it comes to it, which is by chance.
            alive = [*held(alive), *returned]
        kept = {node for t in alive if (node := self.node(t)) is not None}
        given_back = {self.node(t) for t in returned}
        for name, module in self.model.named_modules():
            for t in tensors_within(attributes(module), 2):
                node = self.node(t)
                if node is not None and node not in given_back:
                    flow.held[node] = name
        flow.kept = {n for n in kept if flow.nodes[n].varies and n not in flow.held}
        for call in flow.calls:
            call.end = len(flow.nodes) if call.end < 0 else call.end
        flow.index()
        return flow


def _function(frame: FrameType) -> Function:
    """In what custom Function it runs, within the innermost call of a module."""
    file = function_around(frame)
    return "" if file is None else "checkpoint" if file == CHECKPOINT else "custom"
