"""Parameters that a forward writes to, put back afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._torch import is_flat_parameter, is_view_of_flat_parameter
from .functions import writes
from .ranks import is_sharded
from .tensors import memory_of, tensors_in

__all__ = ["Writes", "unwritten"]


@contextmanager
def unwritten(model: nn.Module, noted: bool = False) -> Iterator["Writes"]:
    """Put the parameters back that a forward writes to: a momentum encoder's, embeddings' norms.

    So are their gradients, and whether they need one. Those of FSDP come and go, and are let alone.
    Where it is ``noted``, somebody else tells what is called.
    """
    parameters = list(model.parameters())
    if any(map(is_sharded, model.modules())) or any(map(_is_of_fsdp, parameters)):
        yield Writes([])
        return
    writes = Writes(parameters)
    needs = [(p, p.requires_grad) for p in parameters]
    # One of another dtype could not be set again.
    like = [p for p in parameters if p.grad is None or p.grad.dtype == p.dtype]
    grads = [(p, p.grad) for p in like]
    _set("grad", [(p, None) for p in like])  # else a backward pass in it would add to that
    try:
        with nullcontext() if noted else writes:
            yield writes
    finally:
        for parameter, data, value in writes.before:
            parameter.data = data.copy_(value)
        _set("requires_grad", needs)
        _set("grad", grads)


def _set(name: str, values: list[tuple[nn.Parameter, Any]]) -> None:
    for p, value in values:
        if getattr(p, name) is not value:  # not all are leaves, where it may be set
            setattr(p, name, value)


def _is_of_fsdp(parameter: Tensor) -> bool:
    return is_flat_parameter(parameter) or is_view_of_flat_parameter(parameter)


class Writes(TorchFunctionMode):
    """Copies parameters when they are about to be written to."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.parameters = parameters
        self.own: dict[int, list[nn.Parameter]] = {}  # by memory, which several may have
        for parameter in parameters:
            self.own.setdefault(memory_of(parameter), []).append(parameter)
        self.before: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # and the data, and its value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note(getattr(func, "__name__", ""), args, kwargs)
        return func(*args, **(kwargs or {}))

    def any(self) -> bool:
        """Whether any has been written to, or has got a gradient."""
        return bool(self.before) or any(p.grad is not None for p in self.parameters)

    def note(self, name: str, args: Any, kwargs: Any) -> None:
        """A function of this name is about to be called."""
        into: Any = ()
        if kwargs and kwargs.get("max_norm") is not None:  # of an embedding
            into = args[1:2]
        elif name == "__set__" or writes(name):  # the former of its data
            into = args[:1]
        for t in tensors_in(into, []):
            for p in self.own.pop(memory_of(t), ()):
                self.before.append((p, p.data, p.detach().clone()))
