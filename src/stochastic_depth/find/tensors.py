"""Tensors in arguments and results, and what tells them apart."""

from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from .._torch import tree_leaves

__all__ = [
    "CALL",
    "CHECKPOINT",
    "function_around",
    "held_by",
    "is_function",
    "is_packed",
    "kind_of",
    "leaves_of",
    "may_hold",
    "memory_of",
    "objects_within",
    "tensors_in",
    "tensors_within",
    "version_of",
]

CALL = nn.Module._call_impl.__code__
CHECKPOINT = checkpoint.__file__


def tensors_in(x: Any, found: list[Tensor], depth: int = 3) -> list[Tensor]:
    """The tensors in arguments or results, looking into containers; appended to ``found``."""
    if isinstance(x, Tensor):
        found.append(x)
    elif isinstance(x, list | tuple):
        if depth:
            for item in x:
                if item is not None and type(item) is not int:
                    tensors_in(item, found, depth - 1)
    elif isinstance(x, dict):
        if depth:
            for item in x.values():
                tensors_in(item, found, depth - 1)
    elif isinstance(x, slice):
        tensors_in((x.start, x.stop, x.step), found, depth)
    return found


def leaves_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The leaves of (args, kwargs)."""
    if not kwargs and all(type(x) is Tensor for x in args):
        return list(args)
    return tree_leaves((args, kwargs))


def kind_of(x: Any) -> Literal["tensor", "none", "value", "object"]:
    """What a leaf is."""
    if isinstance(x, Tensor):
        return "tensor"
    if x is None:
        return "none"
    plain = isinstance(x, bool | int | float | complex | str | torch.dtype | torch.device)
    return "value" if plain else "object"


def tensors_within(x: Any, depth: int) -> Iterator[Tensor]:
    """The tensors in ``x``, looking into containers and plain objects."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, list | tuple | set | frozenset):
        for item in x:
            yield from tensors_within(item, depth)
    elif isinstance(x, dict):
        for item in x.values():
            yield from tensors_within(item, depth)
    elif depth and not callable(x) and not isinstance(x, nn.Module | type):
        state = getattr(x, "__dict__", None)
        if isinstance(state, dict):
            yield from tensors_within(state, depth - 1)


def objects_within(x: Any, depth: int) -> Iterator[Any]:
    """What in ``x`` can be written to, ``x`` included: containers and plain objects."""
    if isinstance(x, list | tuple | set | dict):
        if not isinstance(x, tuple):
            yield x
        items: Any = x.values() if isinstance(x, dict) else x
    else:
        state = getattr(x, "__dict__", None)
        if not depth or not may_hold(x) or isinstance(x, type) or not isinstance(state, dict):
            return
        yield x
        items, depth = state.values(), depth - 1
    for item in items:
        yield from objects_within(item, depth)


def version_of(t: Tensor) -> int:
    """How often a tensor has been written to."""
    return 0 if t.is_inference() else t._version


def is_packed(t: Tensor) -> bool:
    """Whether it has the form of a quantized layer's weights, which may be no parameter."""
    return t.dim() == 2 and t.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32)


def memory_of(t: Tensor) -> int:
    """A number for the memory that a tensor shares with its views."""
    try:
        return int(t.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse, or without memory of its own
        return -id(t)


def function_around(frame: FrameType | None, within: CodeType | None = CALL) -> str | None:
    """The file of the custom Function that runs ``frame`` within the innermost call of a module.

    Args:
        frame: where to begin.
        within: the code of what calls the module; None looks beyond it.
    """
    while frame is not None and frame.f_code is not within:
        code = frame.f_code
        if is_function(code):
            return code.co_filename
        frame = frame.f_back
    return None


def is_function(code: CodeType) -> bool:
    """Whether it is the forward of a custom Function."""
    return _is_forward(code, code.co_filename)


@lru_cache(4096)
def _is_forward(code: CodeType, file: str) -> bool:
    """Whether it is the forward of a custom Function: ``apply`` itself may be no code of Python.

    Args:
        code: of a function.
        file: where it is; code of two files may be equal.
    """
    classes = torch.autograd.Function.__subclasses__()
    for cls in classes:  # which grows
        classes += cls.__subclasses__()
    return any(getattr(cls.forward, "__code__", None) is code for cls in classes)


def may_hold(x: Any) -> bool:
    """Whether an argument may be something that tensors are put into."""
    return not (x is None or callable(x) or isinstance(x, Tensor | str | int | float))


def held_by(x: Any) -> list[int]:
    """The tensors in it, by id."""
    return [id(t) for t in tensors_within(x, 4)]
