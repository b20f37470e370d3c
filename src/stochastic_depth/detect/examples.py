"""What a traced value is, from example arguments: its shape and type, never its data.

A forward that asks for the length, the truth or the type of a value gets the answer by running
what the value is computed from on fake tensors. The answer holds for calls whose tensors are
alike, as far as :class:`Detail` says.
"""

import enum
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import _symbolic_trace
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

__all__ = ["Detail", "Examples", "Outline", "describe", "fake_values", "no_side_effects", "outline"]


class Detail(enum.IntEnum):
    """What of its tensors' form a trace depends on."""

    NOTHING = 0
    TYPES = 1  # dtypes, numbers of dimensions
    SIZES = 2


def describe(values: Sequence[Any], detail: Detail) -> tuple[Any, ...]:
    """The form of ``values``: equal for calls that a trace of this detail serves."""
    tensors = [x for x in values if isinstance(x, Tensor)]
    if detail is Detail.NOTHING:
        return ()
    if detail is Detail.TYPES:
        return tuple((x.dtype, x.dim(), x.device, x.requires_grad) for x in tensors)
    return tuple((x.dtype, x.shape, x.stride(), x.device, x.requires_grad) for x in tensors)


@dataclass(frozen=True)
class Outline:
    """The form of a tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    def tensor(self) -> Tensor:
        return torch.empty_strided(
            self.shape,
            self.stride,
            dtype=self.dtype,
            device=self.device,
            requires_grad=self.requires_grad,
        )

    def with_one_more(self, dim: int) -> "Outline":
        """The same with one row more along ``dim``, dense where it was."""
        shape, strides, step = list(self.shape), [0] * len(self.shape), 1
        shape[dim] += 1
        for d in sorted(range(len(shape)), key=lambda d: self.stride[d]):
            if self.stride[d] != 0:
                strides[d] = step
                step *= shape[d]
        return replace(self, shape=torch.Size(shape), stride=tuple(strides))


def outline(value: Any) -> Any:
    """What :class:`Examples` needs of a value, to keep without its data."""
    if not isinstance(value, Tensor):
        return value
    return Outline(value.shape, value.stride(), value.dtype, value.device, value.requires_grad)


class Examples:
    """Values of the nodes of a graph that is being traced, computed when they are asked for."""

    def __init__(self, root: nn.Module, values: Sequence[Any]) -> None:
        self.root = root
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.values = _fake(self.mode, values)
        self.known: dict[fx.Node, Any] = {}

    def of(self, node: fx.Node) -> Any:
        """The value of ``node``, its tensors fake.

        Raises:
            Exception: of any kind, where it cannot be computed without data.
        """
        needed: dict[fx.Node, None] = {}
        asked = [node]
        while asked:
            n = asked.pop()
            if n not in self.known and n not in needed:
                needed[n] = None
                asked += n.all_input_nodes
        if not needed:
            return self.known[node]
        # Nobody who counts operations is to count these.
        with _disable_current_modes(), self.mode, _not_traced():
            for n in node.graph.nodes:
                if n in needed:
                    self.known[n] = self._run(n)
        return self.known[node]

    def _run(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.values[[n for n in node.graph.nodes if n.op == "placeholder"].index(node)]
        if node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            return self.mode.from_tensor(getattr(self.root.get_submodule(path), name))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.known.__getitem__)
        for leaf in tree_leaves((args, kwargs)):
            if not isinstance(leaf, FakeTensor | int | float | str | type(None)) and not _is_inert(
                leaf
            ):
                # Running on it could change it: a key-value cache, say.
                raise TypeError(f"it depends on a {type(leaf).__name__}")
        if node.op == "call_module":
            child = self.root.get_submodule(str(node.target))
            with _unchanged(child):
                return child(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _fake(mode: FakeTensorMode, values: Sequence[Any]) -> list[Any]:
    with mode:
        outlines = map(outline, values)
        return [x.tensor() if isinstance(x, Outline) else x for x in outlines]


@contextmanager
def fake_values(module: nn.Module, values: Sequence[Any]) -> Iterator[list[Any]]:
    """Values without data, like those given, to run ``module`` on, which stays as it is."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = _fake(mode, values)
    with _disable_current_modes(), mode, _not_traced(), _unchanged(module):
        yield fakes


@contextmanager
def no_side_effects(module: nn.Module) -> Iterator[None]:
    """Run ``module`` as in evaluation, its state and that of the random numbers put back after."""
    buffers = [(x, x.clone()) for x in module.buffers()]
    modes = {m: m.training for m in module.modules()}
    with torch.no_grad(), torch.random.fork_rng():
        module.eval()
        try:
            yield
        finally:
            for m, training in modes.items():
                m.training = training
            for x, before in buffers:
                x.copy_(before)


def _is_inert(leaf: Any) -> bool:
    return isinstance(
        leaf,
        torch.dtype
        | torch.device
        | torch.layout
        | torch.memory_format
        | slice
        | type(Ellipsis)
        | torch.Size
        | complex,
    )


@contextmanager
def _not_traced() -> Iterator[None]:
    """Call modules as outside of a trace, and draw no random numbers."""
    call, look_up = nn.Module.__call__, nn.Module.__getattr__
    random_state = torch.get_rng_state()
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True  # what cannot be computed is refused, not logged
    nn.Module.__call__ = _symbolic_trace._orig_module_call  # type: ignore[method-assign]
    nn.Module.__getattr__ = _symbolic_trace._orig_module_getattr  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = call  # type: ignore[method-assign]
        nn.Module.__getattr__ = look_up  # type: ignore[method-assign]
        log.disabled = disabled
        torch.set_rng_state(random_state)


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Run ``module`` without a trace of it, on fake tensors that are enabled.

    None may stay behind in its attributes, and no buffer may be counted up. Hooks and replaced
    forwards (ours, for one) are out of the way meanwhile.
    """
    saved = []
    for m in module.modules():
        saved.append((m, dict(m.__dict__), dict(m._buffers), dict(m._parameters)))
        m.__dict__.pop("forward", None)
        m._forward_hooks, m._forward_pre_hooks = OrderedDict(), OrderedDict()
        m._buffers.update(
            {k: x if x is None else outline(x).tensor() for k, x in m._buffers.items()}
        )
    try:
        yield
    finally:
        for m, attributes, buffers, parameters in saved:
            m.__dict__.clear()
            m.__dict__.update(attributes)
            m._buffers.clear()
            m._buffers.update(buffers)
            m._parameters.clear()
            m._parameters.update(parameters)
