"""Trace one block's forward into a graph, its children left as calls.

A wrapper around :class:`torch.fx.Tracer` that refuses where the plain tracer would record
something else than the block does: control flow on values, constants made on the way, random
numbers drawn or attributes changed while tracing, context managers.
"""

import inspect
import operator
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

__all__ = ["Call", "CaptureError", "capture", "no_fast_path", "read_call", "static_call"]


_NEW = object()  # what an attribute was that did not exist


class CaptureError(Exception):
    """A forward that cannot be traced faithfully; the message is the reason."""


@dataclass(frozen=True)
class Call:
    """How a forward is called: which arguments are values, and what the others are.

    ``constants`` holds every leaf of (args, kwargs), None standing in for the values.
    """

    structure: TreeSpec
    is_value: tuple[bool, ...]
    constants: tuple[Any, ...]

    @property
    def key(self) -> Hashable:
        """Equal for calls that one trace serves."""
        kinds = tuple((type(c), c) if _is_plain(c) else type(c) for c in self.constants)
        return self.structure, self.is_value, kinds


def _is_plain(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, bool | int | float | str | torch.dtype | torch.device)


def read_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, list[Any]]:
    """The form of a real call, and its values: tensors and everything that is no plain constant."""
    leaves, structure = tree_flatten((args, kwargs))
    is_value = tuple(not _is_plain(leaf) for leaf in leaves)
    constants = tuple(None if v else leaf for leaf, v in zip(leaves, is_value, strict=True))
    return Call(structure, is_value, constants), [x for x in leaves if not _is_plain(x)]


def static_call(module: nn.Module) -> Call:
    """The call that gives a value for each parameter without default and nothing else."""
    required = [
        p
        for p in list(inspect.signature(type(module).forward).parameters.values())[1:]
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    by_name = {p.name: object() for p in required if p.kind is p.KEYWORD_ONLY}
    return read_call(tuple(object() for _ in range(len(required) - len(by_name))), by_name)[0]


def capture(module: nn.Module, call: Call, training: bool) -> fx.Graph:
    """The graph of ``module.forward``, called as ``call``, with one placeholder a value.

    Raises:
        CaptureError: the forward cannot be traced faithfully.
    """
    forward = getattr(type(module), "forward", None)
    if not inspect.isfunction(forward):
        raise CaptureError("its forward is not a Python function")
    tracer = _Tracer(module, call)
    module_state = dict(module.__dict__)
    module.training = training
    traced_state = dict(module.__dict__)
    random_state = torch.get_rng_state()
    with no_fast_path(), _isinstance_knows_values(forward):
        try:
            graph = tracer.trace(module)
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(_first_line(error)) from error
        finally:
            drew = not torch.equal(random_state, torch.get_rng_state())
            torch.set_rng_state(random_state)
            changed = [k for k, v in module.__dict__.items() if traced_state.get(k, _NEW) is not v]
            module.__dict__.clear()
            module.__dict__.update(module_state)
    if drew:
        raise CaptureError("it draws random numbers that decide what it does")
    if changed:
        raise CaptureError(f"it changes its attribute {changed[0]!r} while it runs")
    graph.eliminate_dead_code(lambda node: not _is_pure(node))
    return graph


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _is_pure(node: fx.Node) -> bool:
    """Whether an unused node can go: look-ups only, since anything else may have an effect."""
    return node.op == "get_attr" or node.target in (operator.getitem, getattr)


class _Value(fx.Proxy):
    """A traced value. The plain proxy records ``x += y`` as ``x + y``; this one as in place."""


def _in_place(name: str) -> Callable[[_Value, Any], Any]:
    op = getattr(operator, name)

    def method(self: _Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", op, (self, other), {})

    return method


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

    def __init__(self, module: nn.Module, call: Call) -> None:
        super().__init__()
        self.call = call
        self.modes = _modes()
        self.names = dict[Tensor, str](
            (t, name) for name, t in [*module.named_parameters(), *module.named_buffers()]
        )

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Sequential(ReLU(inplace=True), ...) overwrites its input with something that it does
        # not return: the graph has to show it.
        if not _starts_in_place(m):
            return True
        if m._forward_hooks or m._forward_pre_hooks:
            raise CaptureError(f"hooks on {module_qualified_name!r} would not run")
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
        if _modes() != self.modes:
            raise CaptureError("it computes under a context manager (no_grad, autocast)")
        return super().create_node(kind, *args, **kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise CaptureError(f"what it does depends on a value ({obj.node.name})")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        raise CaptureError(f"it loops over a value ({obj.node.name})")

    def keys(self, obj: fx.Proxy) -> Any:
        raise CaptureError(f"it takes a value as keywords ({obj.node.name})")


def _starts_in_place(m: nn.Module) -> bool:
    first = next(m.children(), None)
    return (
        type(m) is nn.Sequential
        and first is not None
        and (getattr(first, "inplace", False) is True or _starts_in_place(first))
    )


def _modes() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled(), torch.is_autocast_enabled("cpu")


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Keep torch's transformer layers off their fused path, which is for evaluation only."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _isinstance_knows_values(forward: Callable[..., Any]) -> Iterator[None]:
    """Let the forward's ``isinstance(x, Tensor)`` hold for the block's inputs.

    A proxy that claims another ``__class__`` crashes the interpreter, so the name is shadowed
    in the globals of the forward instead. Of other values the type is not known.
    """
    namespace = inspect.unwrap(forward).__globals__
    shadowed = "isinstance" in namespace

    def knowing(obj: Any, types: Any) -> bool:
        if isinstance(obj, fx.Proxy) and not _names_proxy(types):
            if obj.node.op == "placeholder":
                return issubclass(Tensor, types)
            raise CaptureError(f"what it does depends on the type of a value ({obj.node.name})")
        return isinstance(obj, types)

    if not shadowed:
        namespace["isinstance"] = knowing
    try:
        yield
    finally:
        if not shadowed:
            del namespace["isinstance"]


def _names_proxy(types: Any) -> bool:
    given = types if isinstance(types, tuple) else (types,)
    return any(isinstance(t, type) and issubclass(t, fx.Proxy) for t in given)
