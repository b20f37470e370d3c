"""Trace one block's forward into a graph, its children left as calls.

A wrapper around :class:`torch.fx.Tracer` that refuses where the plain tracer would record
something else than the block does: control flow on data, constants made on the way, random
numbers drawn or attributes changed while tracing, context managers. Control flow on shapes and
types is decided from example values, and the trace says that it depends on them.
"""

import inspect
import operator
import random
import sys
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_structure, tree_unflatten

from .examples import Detail, Examples
from .existing import drop_functions
from .graphs import check_absent, is_shape, reads_types_only
from .slices import join_slices
from .spellings import spell_out_sums

__all__ = [
    "Call",
    "CaptureError",
    "Trace",
    "capture",
    "computing_modes",
    "is_plain",
    "no_fast_path",
    "read_call",
    "settings_of",
    "static_call",
]


_DEPENDS = "what it does depends on a value"
_NEW = object()  # what an attribute was that did not exist


class CaptureError(Exception):
    """A forward that cannot be traced faithfully; the message is the reason.

    ``detail`` is what of the example values it depends on that it cannot.
    """

    detail = Detail.NOTHING


@dataclass(frozen=True)
class Trace:
    """A traced forward, and what of the form of its tensors it holds for.

    ``inlined`` names the descendants whose own forward is a part of the graph, with what the
    trace depends on in them (:func:`settings_of`).
    """

    graph: fx.Graph
    detail: Detail
    examples: Examples | None
    inlined: dict[str, tuple[Any, ...]]
    objects: dict[fx.Node, str]  # arguments that are neither tensors nor constants, by their type


@dataclass(frozen=True)
class Call:
    """How a forward is called: which arguments are values, and what the others are.

    ``constants`` holds every leaf of (args, kwargs), None standing in for the values.
    ``key`` is equal for calls that one trace serves, where it does not depend on more.
    ``examples`` are such values, and ``row_dims`` the dimensions in which they have the rows of
    the batch (:mod:`.batches`); None where this is not known.
    """

    structure: TreeSpec
    is_value: tuple[bool, ...]
    constants: tuple[Any, ...]
    types: tuple[type, ...]  # of the values: Tensor, object where it is not known, or another
    key: Hashable
    examples: tuple[Any, ...] | None = field(default=None, compare=False)
    row_dims: tuple[int | None, ...] | None = None

    def like(self, values: Iterable[Any]) -> "Call":
        """The same call with ``values`` as its examples."""
        return replace(self, examples=tuple(values))


def is_plain(leaf: Any) -> bool:
    """Whether a part of a call's arguments is a constant of it."""
    return leaf is None or isinstance(leaf, bool | int | float | str | torch.dtype | torch.device)


def _is_value(kind: type) -> bool:
    return kind is object or issubclass(kind, Tensor)


def read_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, list[Any]]:
    """The form of a real call, and its values: tensors and everything that is no plain constant."""
    leaves, structure = tree_flatten((args, kwargs))
    is_value = tuple(not is_plain(leaf) for leaf in leaves)
    constants = tuple(None if v else leaf for leaf, v in zip(leaves, is_value, strict=True))
    values = [leaf for leaf, v in zip(leaves, is_value, strict=True) if v]
    types = tuple(Tensor if isinstance(x, Tensor) else type(x) for x in values)
    return Call(structure, is_value, constants, types, (_form(args), _form(kwargs))), values


def _form(x: Any) -> Any:
    """A call's key, without TreeSpecs as far as possible: torch.compile cannot hash them."""
    if isinstance(x, Tensor):
        return Tensor
    if is_plain(x):
        return type(x), x
    if type(x) in (tuple, list):
        return type(x), tuple(_form(item) for item in x)
    if isinstance(x, dict):
        return type(x), tuple((key, _form(item)) for key, item in x.items())
    structure = tree_structure(x)
    return type(x) if structure.is_leaf() else repr(structure)


def static_call(module: nn.Module) -> Call:
    """The call that gives a value for each parameter without default and nothing else."""
    required = [
        p
        for p in list(inspect.signature(type(module).forward).parameters.values())[1:]
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    by_name = {p.name: object() for p in required if p.kind is p.KEYWORD_ONLY}
    return read_call(tuple(object() for _ in range(len(required) - len(by_name))), by_name)[0]


def capture(module: nn.Module, call: Call, training: bool, inlined: Collection[str] = ()) -> Trace:
    """The graph of ``module.forward``, called as ``call``, with one placeholder a value.

    Args:
        module: the block.
        call: how it is called.
        training: whether it is in training mode.
        inlined: names of descendants that are traced too, where others are calls.

    Raises:
        CaptureError: the forward cannot be traced faithfully.
    """
    traced = [module, *map(module.get_submodule, inlined)]
    forwards: list[Any] = [getattr(type(m), "forward", None) for m in traced]
    if not all(map(inspect.isfunction, forwards)):
        raise CaptureError("its forward is not a Python function")
    tracer = _Tracer(module, call, inlined, forwards)
    alike = [m for m in module.modules() if m.training == module.training]
    was_training = module.training
    for m in alike:
        m.training = training
    states = [namespace for m in traced for namespace in (m.__dict__, m._buffers, m._parameters)]
    saved = [dict(namespace) for namespace in states]
    random_state = torch.get_rng_state()
    python_state = random.getstate()
    changed: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(no_fast_path())
        for name in ("_canonical_mask", "_none_or_dtype"):  # of torch's transformer layers
            stack.enter_context(tracer.records(torch.nn.functional, name))
        for forward in forwards:
            stack.enter_context(tracer.isinstance_knows_values(forward))
        try:
            graph = tracer.trace(module)
        except Exception as error:
            reason = error if isinstance(error, CaptureError) else CaptureError(_first_line(error))
            reason.detail = tracer.detail
            raise reason from error
        finally:
            drew = not torch.equal(random_state, torch.get_rng_state())
            drew |= random.getstate() != python_state
            torch.set_rng_state(random_state)
            random.setstate(python_state)
            for namespace, original in zip(states, saved, strict=True):
                changed += [k for k, v in namespace.items() if original.get(k, _NEW) is not v]
                namespace.clear()
                namespace.update(original)
            inlined_settings = {n: settings_of(module.get_submodule(n)) for n in tracer.entered}
            for m in alike:
                m.training = was_training
    if drew:
        raise CaptureError("it draws random numbers that decide what it does")
    if changed:
        raise CaptureError(f"it changes its attribute {changed[0]!r} while it runs")
    spell_out_sums(graph)
    if tracer.examples is not None:
        examples = tracer.examples
        try:
            if join_slices(graph, lambda node: torch.Size(examples.of(node).shape)):
                tracer.detail = Detail.SIZES
        except Exception as error:
            raise CaptureError("a shape is not known") from error
    graph.eliminate_dead_code(lambda node: not _is_pure(node))
    given = [node for node in graph.nodes if node.op == "placeholder"]
    objects = {n: t.__name__ for n, t in zip(given, call.types, strict=True) if not _is_value(t)}
    return Trace(graph, tracer.detail, tracer.examples, inlined_settings, objects)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _is_pure(node: fx.Node) -> bool:
    """Whether an unused node can go: look-ups only, since anything else may have an effect."""
    return node.op == "get_attr" or node.target in (operator.getitem, getattr) or is_shape(node)


class _Value(fx.Proxy):
    """A traced value. The plain proxy records ``x += y`` as ``x + y``; this one as in place."""

    @property
    def device(self) -> Any:
        """The device itself where it is known: x.to(y.device) is no use of y."""
        return self.tracer.device(self)  # type: ignore[attr-defined]

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)  # type: ignore[misc]
        return self.tracer.part(self.node, part)  # type: ignore[attr-defined]


def _in_place(name: str) -> Callable[[_Value, Any], Any]:
    op = getattr(operator, name)

    def method(self: _Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", op, (self, other), {})

    return method


def _known(convert: Callable[[Any], Any]) -> Callable[[_Value], Any]:
    def method(self: _Value) -> Any:
        return self.tracer.convert(self.node, convert)  # type: ignore[attr-defined]

    return method


# Functions that insist on a real number get one.
_NUMBERS: dict[str, Callable[[Any], Any]] = {
    "len": len,
    "int": int,
    "index": operator.index,
    "float": float,
}
for _name, _convert in _NUMBERS.items():
    setattr(_Value, f"__{_name}__", _known(_convert))

for _name in ("iadd", "isub", "imul", "itruediv", "imatmul", "ipow", "ifloordiv", "imod"):
    setattr(_Value, f"__{_name}__", _in_place(_name))


class _Attribute(_Value):
    """A parameter or buffer: its shape is known."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, tensor: Tensor) -> None:
        super().__init__(node, tracer)
        self.shape, self.ndim, self.dtype = tensor.shape, tensor.ndim, tensor.dtype
        self.dim, self.size, self.numel = tensor.dim, tensor.size, tensor.numel


class _Tracer(fx.Tracer):
    """Children are leaves, parameters and buffers are looked up when the program runs."""

    trace_asserts = True

    def __init__(
        self,
        module: nn.Module,
        call: Call,
        inlined: Collection[str],
        forwards: Collection[Callable[..., Any]],
    ) -> None:
        drops = tuple(f for forward in forwards for f in drop_functions(forward))
        super().__init__(autowrap_functions=drops)
        modules = (sys.modules.get(forward.__module__) for forward in forwards)
        self._autowrap_search += filter(None, modules)
        self.call = call
        self.inlined = inlined
        self.entered: dict[str, None] = {}
        self.modes = computing_modes()
        self.detail = Detail.NOTHING
        self.examples = None if call.examples is None else Examples(module, call.examples)
        self.names = dict[Tensor, str](
            (t, name) for name, t in [*module.named_parameters(), *module.named_buffers()]
        )

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Sequential(ReLU(inplace=True), ...) overwrites its input with something that it does
        # not return: the graph has to show it.
        if module_qualified_name not in self.inlined and not _starts_in_place(m):
            return True
        if m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__:
            raise CaptureError(f"hooks on {module_qualified_name!r} would not run")
        self.entered[module_qualified_name] = None
        return False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        leaves = [
            self.create_proxy("placeholder", f"value_{i}", (), {}) if is_value else constant
            for i, (is_value, constant) in enumerate(
                zip(self.call.is_value, self.call.constants, strict=True)
            )
        ]
        args, kwargs = tree_unflatten(leaves, self.call.structure)

        def run(*_: Any) -> Any:
            return root_fn(self.root, *args, **kwargs)

        return run, []

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and a not in self.names and a not in self.tensor_attrs:
            raise CaptureError("it makes a constant tensor on the way")
        if isinstance(a, dict) and type(a) is not dict:  # fx would make it a dict
            make: Any = type(a)
            if not is_dataclass(make):
                raise CaptureError(f"it makes a {make.__name__}")
            items = {key: self.create_arg(value) for key, value in a.items()}
            return self.create_node("call_function", make, (), items)
        return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if not isinstance(attr_val, Tensor) or attr_val not in self.names:
            return attr_val
        name = self.names[attr_val]
        if name not in parameter_proxy_cache:
            node = self.create_node("get_attr", name, (), {})
            parameter_proxy_cache[name] = _Attribute(node, self, attr_val)
        return parameter_proxy_cache[name]

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if computing_modes() != self.modes:
            raise CaptureError("it computes under a context manager (no_grad, autocast)")
        return super().create_node(kind, *args, **kwargs)

    def example(self, node: fx.Node, detail: Detail, question: str) -> Any:
        """The value of ``node``, on which the trace then depends."""
        if self.examples is None:
            raise CaptureError(f"{question} ({node.name}); example inputs may tell")
        self.detail = max(self.detail, detail)
        try:
            return self.examples.of(node)
        except Exception as error:
            raise CaptureError(f"{question} ({node.name})") from error

    def convert(
        self, node: fx.Node, convert: Callable[[Any], Any], question: str = _DEPENDS
    ) -> Any:
        """A traced value as a real number, or its length."""
        types_only = convert is len or reads_types_only(node)
        detail = Detail.TYPES if types_only else Detail.SIZES
        value = self.example(node, detail, question)
        if isinstance(value, Tensor):
            if convert is not len or value.dim() == 0:
                raise CaptureError(f"{question} ({node.name})")
            self.detail = Detail.SIZES
        return convert(value)

    def device(self, value: fx.Proxy) -> Any:
        """The device of a value, if it can be told."""
        if self.examples is not None and value.node.op != "placeholder":
            try:
                found = self.examples.of(value.node).device
            except Exception:  # of any kind: then it is looked up when the program runs
                found = None
            if isinstance(found, torch.device):
                self.detail = max(self.detail, Detail.TYPES)
                return found
        return fx.Proxy.__getattr__(value, "device")

    def part(self, whole: fx.Node, part: fx.Proxy) -> Any:
        """A part of what a module returns: None itself where it is None, for ``is None``."""
        if whole.op != "call_module" or self.examples is None:
            return part
        try:
            value = self.examples.of(part.node)
        except Exception:  # of any kind: then it is not known
            return part
        if value is not None:
            return part
        self.detail = max(self.detail, Detail.TYPES)
        self.create_node("call_function", check_absent, (part.node,), {})
        return None

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.convert(obj.node, bool))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        length = self.convert(obj.node, len, "it loops over a value")
        return iter([obj[i] for i in range(length)])  # type: ignore[index]

    def keys(self, obj: fx.Proxy) -> Any:
        value = self.example(obj.node, Detail.TYPES, "it takes a value as keywords")
        return value.keys()

    def is_instance(self, obj: fx.Proxy, types: Any) -> bool:
        question = "what it does depends on the type of a value"
        if obj.node.op != "placeholder":
            return isinstance(self.example(obj.node, Detail.TYPES, question), types)
        known = self.call.types[int(obj.node.name.removeprefix("value_"))]
        return issubclass(Tensor if known is object else known, types)

    @contextmanager
    def isinstance_knows_values(self, forward: Any) -> Iterator[None]:
        """Let the forward's ``isinstance`` see the types of values.

        A proxy that claims another ``__class__`` crashes the interpreter, so the name is
        shadowed in the globals of the forward instead.
        """
        namespace = inspect.unwrap(forward).__globals__
        shadowed = "isinstance" in namespace

        def knowing(obj: Any, types: Any) -> bool:
            if isinstance(obj, fx.Proxy) and not _names_proxy(types):
                return self.is_instance(obj, types)
            return isinstance(obj, types)

        if not shadowed:
            namespace["isinstance"] = knowing
        try:
            yield
        finally:
            if not shadowed:
                del namespace["isinstance"]

    @contextmanager
    def records(self, namespace: Any, name: str) -> Iterator[None]:
        """Record calls of a function that insists on tensors."""
        function = getattr(namespace, name)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(x, fx.Proxy) for x in (*args, *kwargs.values())):
                return self.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        setattr(namespace, name, recorded)
        try:
            yield
        finally:
            setattr(namespace, name, function)


def _starts_in_place(m: nn.Module) -> bool:
    first = next(m.children(), None)
    return (
        type(m) is nn.Sequential
        and first is not None
        and (getattr(first, "inplace", False) is True or _starts_in_place(first))
    )


def settings_of(module: nn.Module) -> tuple[Any, ...]:
    """What a trace through ``module`` may depend on beside its arguments."""
    settings = [x for x in module.__dict__.values() if isinstance(x, bool | int | float | str)]
    return type(module), *module._modules, *settings


def computing_modes() -> tuple[Any, ...]:
    """The modes that decide what a forward computes, beside its arguments."""
    return (
        torch.is_grad_enabled(),
        *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
        *(torch.get_autocast_dtype(device) for device in ("cpu", "cuda")),
    )


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Keep torch's transformer layers off their fused path, which is for evaluation only."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _names_proxy(types: Any) -> bool:
    given = types if isinstance(types, tuple) else (types,)
    return any(isinstance(t, type) and issubclass(t, fx.Proxy) for t in given)
