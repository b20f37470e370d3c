"""A value of a branch on its way through the block's forward, where it is no ordinary tensor.

Three kinds: *absent*, of a branch that is dropped; *compact*, the kept samples of a value;
*marked*, a whole value that has yet to be weighed in the branch's sum. A plain object with
``__torch_function__``: autograd and dispatch never see it, and torch.compile traces it.

Whatever is computed from an absent part is absent. What works on each element of a compact value
alone leaves it compact. Any other function is given the whole value, so user code never meets a
partial batch, and the part is whole from then on, as the function may change what it is given, or
keep it. A branch ends where finding saw its sum in the source: there, and only there, the part
joins its shortcut.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import is_given_to_hook, tensor_leaves, tree_leaves, tree_map
from ..find.functions import writes
from .instruction import is_applied, is_asked, unpacked
from .names import ACTIVATIONS, ADD, ASKS, IN_PLACE, OF_DEVICE, OPERATORS, SCALINGS, SUMS, VIEWS

__all__ = ["Part", "first_part", "form", "parts_in", "whole"]

_WRITTEN = (
    "a value of it is written into a tensor that is not its own: do that in a module that the "
    "branch calls"
)


class Part:
    """Stands in for a tensor of a branch.

    Args:
        run: the branch in this call.
        value: the tensor; None where absent.
        last: it comes from the last call of the branch, so it carries the branch's weight.
        place: where a compact value has its samples.
        make: makes a tensor of the absent value's form, on the meta device.
    """

    def __init__(
        self,
        run: Any,
        value: Tensor | None,
        last: bool,
        place: Any = None,
        make: Callable[[], Any] | None = None,
    ) -> None:
        self._run, self._value, self._last, self._place, self._make = run, value, last, place, make
        self._form: Any = None
        run.ended = run.ended or last

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """A tensor, to code of the user's that asks ``isinstance``, as einops does.

        Torch's own, and anything in C, would take it for one in memory, and crash.
        """
        frame = sys._getframe(1)
        if is_applied(frame) and self._has_gradient():
            raise self._run.error(
                "hands one of its values to a custom autograd.Function (reentrant checkpointing is "
                "one), which it did not when it was watched; checkpoint with use_reentrant=False, "
                "or have the function work in evaluation, too, before you call apply() again"
            )
        if is_given_to_hook(frame) and self._has_gradient():
            raise self._run.error(
                "hands one of its values to a module with a full backward hook; register that on "
                "the block, or on a module that the branch calls"
            )
        return Tensor if is_asked(frame) else Part

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name == "lerp":
            ends = _ends(*args, **kwargs)
            if type(ends[1]) is Part and _is_outside(ends[0]) and ends[1]._run.is_sum():
                return ends[1]._run.interpolate(*ends)
        if name in SUMS:
            two = _operands(args, kwargs)
            run = _met(*two) if len(two) == 2 else None
            if run and run.is_sum() and (sides := _sides(name, two, kwargs.get("alpha", 1))):
                total = run.merge(*sides)
                into_part = name in IN_PLACE and two[0] is sides[1]
                return run.written(total, sides[1]) if into_part else total
        parts = parts_in((*args, *kwargs.values()))
        run, last = parts[0]._run, any([part._last for part in parts])
        if func is Tensor.matmul and type(args[1]) is Part:
            run.check_order()
        if run.is_over():
            args, kwargs = tree_map(_outlived, (tuple(args), kwargs))
            return func(*args, **kwargs)
        if run.branch.joins and run.is_join():
            # What is stacked has one shape: nobody need be asked for the branch's.
            like = next(iter(tensor_leaves(args)), None) if name == "stack" else None
            args, kwargs = tree_map(partial(_joining, like), (tuple(args), kwargs))
            return func(*args, **kwargs)
        if run.dropped:
            writes_it = not torch.compiler.is_compiling() and writes(name)
            if writes_it and type(args[0]) is not Part:
                raise run.error(f"is dropped, and {_WRITTEN}")
            run.owe((args, kwargs))
            return Part(
                run,
                None,
                last,
                None,
                lambda: func(*tree_map(form, tuple(args)), **tree_map(form, kwargs)),
            )
        if _works_on_elements(name, args, kwargs, parts):
            args, kwargs = tree_map(_value, (tuple(args), kwargs))
            out = func(*args, **kwargs)
            same = next((part for part in parts if part._value is out), None)  # in place
            return Part(run, out, last, parts[0]._place) if same is None else same
        args, kwargs = tree_map(whole, (tuple(args), kwargs))
        out = func(*args, **kwargs)
        return run.mark(out) if last else out

    def __getattr__(self, name: str) -> Any:
        if self._value is None and name in OF_DEVICE:
            return getattr(torch.empty(0, device=self._run.device), name)
        if self._value is None and name in VIEWS:
            return self._derived(lambda: getattr(form(self), name))
        kind = getattr(Tensor, name)  # an AttributeError names the attribute
        if callable(kind):
            if name in ASKS:
                return getattr(form(self), name)
            if name.startswith("new_"):
                return partial(getattr(form(self), name), device=self._run.device)
            return lambda *args, **kwargs: Part.__torch_function__(kind, (), (self, *args), kwargs)
        known = getattr(whole(self) if name in VIEWS else form(self), name)
        return self._run.mark(known) if self._last and isinstance(known, Tensor) else known

    @property
    def data(self) -> Any:
        return self.__getattr__("data")

    @data.setter
    def data(self, value: Any) -> None:
        if self._value is not None:
            whole(self).data = whole(value)

    def _has_gradient(self) -> bool:
        """Whether what passes on the gradients of tensors only would lose one."""
        return self._value is not None and self._value.requires_grad and torch.is_grad_enabled()

    def _derived(self, make: Callable[[], Any]) -> "Part":
        return Part(self._run, None, self._last, None, make)

    def __getitem__(self, key: Any) -> Any:
        if self._value is None:  # of a tuple, perhaps
            return self._derived(lambda: form(self)[key])
        return Part.__torch_function__(Tensor.__getitem__, (), (self, key))

    def __setitem__(self, key: Any, value: Any) -> None:
        Part.__torch_function__(Tensor.__setitem__, (), (self, key, value))

    def __iter__(self) -> Iterator[Any]:
        n = None
        if self._value is None and not torch.compiler.is_compiling():
            n = unpacked(sys._getframe(1))
        return iter([self[i] for i in range(len(form(self)) if n is None else n)])

    def __len__(self) -> int:
        return len(form(self))

    def _number(self) -> Tensor:
        if self._value is None:
            raise self._run.error("is dropped, and the value of something that it computes is read")
        value: Tensor = whole(self)
        return value

    def __bool__(self) -> bool:
        return bool(self._number())

    def __float__(self) -> float:
        return float(self._number())

    def __int__(self) -> int:
        return int(self._number())

    def type(self, *args: Any, **kwargs: Any) -> Any:
        if not (args or kwargs):
            return form(self).type()
        return Part.__torch_function__(Tensor.type, (), (self, *args), kwargs)

    def item(self) -> Any:
        return self._number().item()

    def tolist(self) -> Any:
        return self._number().tolist()

    def __repr__(self) -> str:
        kind = "absent" if self._value is None else "compact" if self._place else "marked"
        return f"<{kind} value of the branch {self._run.branch.name}>"


def _operator(name: str) -> Callable[..., Any]:
    if name == "__rmatmul__":  # dynamo swaps the operands of the tensors' own
        return lambda self, other: Part.__torch_function__(torch.matmul, (), (other, self))
    kind = torch.matmul if name == "__matmul__" else getattr(Tensor, name)
    return lambda self, *args: Part.__torch_function__(kind, (), (self, *args))


for _name in OPERATORS:
    if hasattr(Tensor, _name):
        setattr(Part, _name, _operator(_name))
Part.__hash__ = object.__hash__  # type: ignore[method-assign]


def parts_in(values: Iterable[Any]) -> list[Part]:
    """The parts in ``values``, looking into containers."""
    found: list[Part] = []
    for x in values:
        if type(x) is Part:
            found.append(x)
        elif type(x) in (tuple, list):
            found += parts_in(x)
        elif type(x) is dict:
            found += parts_in(x.values())
        elif x is not None and not isinstance(x, Tensor | str | int | float | nn.Module):
            found += [leaf for leaf in tree_leaves(x) if type(leaf) is Part]
    return found


def first_part(values: Iterable[Any]) -> Part | None:
    """The first part in ``values``, for the usual arguments, made fast."""
    for x in values:
        kind = type(x)
        if kind is Part:
            return x  # type: ignore[no-any-return]
        if kind is tuple or kind is list:
            if (part := first_part(x)) is not None:
                return part
        elif kind is dict and (part := first_part(x.values())) is not None:
            return part
    return None


def whole(x: Any) -> Any:
    """The value of a part, which is in its full size from now on; anything else as it is."""
    if type(x) is not Part:
        return x
    if x._place is not None:
        x._value, x._place = x._run.spread(x._value, x._place), None
    return x._value


def _outlived(x: Any) -> Any:
    """A part that somebody kept until after the call of its block, as a tensor."""
    return x._number() if type(x) is Part else x


def _value(x: Any) -> Any:
    return x._value if type(x) is Part else x


def _works_on_elements(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], parts: list[Part]
) -> bool:
    """Whether a function makes of each element one, of compact values that have it in common.

    Other tensors may not have samples.
    """
    first = parts[0]
    if first._place is None or not (name in ACTIVATIONS or name in SCALINGS):
        return False
    dims = first._value.dim()  # type: ignore[union-attr]
    for x in (*args, *kwargs.values()):
        if type(x) is Part:
            same = x._run is first._run and x._place == first._place
            if not same or x._value.dim() != dims:  # type: ignore[union-attr]
                return False
        elif isinstance(x, Tensor):
            if name in ACTIVATIONS or x.dim() >= dims - first._place.dim:
                return False
        elif isinstance(x, tuple | list | dict):
            return False
    return True


def form(x: Any) -> Any:
    """A tensor of the same form: the value, or one on the meta device where it is absent."""
    if type(x) is not Part:
        return x.detach().to("meta") if isinstance(x, Tensor) else x
    if x._value is not None:
        return x._value if x._place is None else x._run.spread(x._value, x._place)
    if x._make is not None:
        with torch.no_grad():
            x._form, x._make = x._make(), None
    return x._form


def _joining(like: Tensor | None, x: Any) -> Any:
    """A part as it enters something that is linear in it: weighed, zeros where it is dropped."""
    if type(x) is not Part:
        return x
    if like is not None and x._value is None:
        return x._run.nothing(like, x._run.dtype)
    return x._run.joining(x)


def _operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The two that a sum is of."""
    if kwargs:
        args = (*args, *[kwargs[k] for k in ("input", "other") if k in kwargs])
    return args[:2]


def _met(a: Any, b: Any) -> Any:
    """The run of a last value that one other tensor is given with, as finding counts sums."""
    first, second = type(a) is Part and a._last, type(b) is Part and b._last
    part, other = (a, b) if first else (b, a)
    is_met = first is not second and (type(other) is Part or isinstance(other, Tensor))
    return part._run if is_met else None


def _sides(
    name: str, two: tuple[Any, ...], factor: float
) -> tuple[Tensor, Part, float, bool, bool] | None:
    """Where a part is added to a tensor: this, the part, its factor, in place, part first."""
    a, b = two if name != "__rsub__" else two[::-1]
    if _is_outside(a) and type(b) is Part:
        return a, b, factor if name in ADD else -factor, name in IN_PLACE, False
    if _is_outside(b) and type(a) is Part and name in ADD:
        return a._run.scaled(b, factor), a, 1, False, name != "__radd__"
    return None


def _ends(input: Any, end: Any, weight: Any) -> tuple[Any, Any, Any]:
    """The arguments of torch.lerp."""
    return input, end, weight


def _is_outside(x: Any) -> bool:
    """Whether it may be a shortcut: all that can be told of it inside of a compiled graph."""
    if type(x) is Tensor:
        return x.dim() > 0
    return isinstance(x, Tensor) and not isinstance(x, nn.Parameter) and x.dim() > 0
