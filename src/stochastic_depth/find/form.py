"""In which form a module is called."""

from typing import Any

from torch import Tensor, nn

from .plan import Form

__all__ = ["form_of"]


def form_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Form:
    """The types of the arguments, and the values of None, bool and str."""
    form = tuple([_kind(x) for x in args])
    if kwargs:
        form += tuple([(name, _kind(x)) for name, x in kwargs.items()])
    return form


def _kind(x: Any) -> Any:
    kind = type(x)
    if kind is Tensor or kind is nn.Parameter:
        return Tensor
    return x if x is None or kind is bool or kind is str else kind
