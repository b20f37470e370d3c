"""In which form a module is called."""

from typing import Any

import torch
from torch import Tensor, nn

from .._torch import is_any_autocast_on
from .plan import Form, Precision

__all__ = ["form_of", "precision_of"]


def form_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Form:
    """The types of the arguments, dimensions of tensors (~n for n), values of None, bool, str."""
    form = tuple([_kind(x) for x in args])
    if kwargs:
        form += tuple([(name, _kind(x)) for name, x in kwargs.items()])
    return form


def _kind(x: Any) -> Any:
    kind = type(x)
    if kind is Tensor or kind is nn.Parameter:
        return ~x.dim()
    if kind is tuple or kind is list or kind is dict:
        values = x.values() if kind is dict else x
        return kind, tuple([(type(v), v.dim() if isinstance(v, Tensor) else 0) for v in values])
    return x if x is None or kind is bool or kind is str else kind


def precision_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Precision:
    """The dtype of the first tensor, and with it what autocast computes in, where that is on."""
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor):
            return _precision(x) if is_any_autocast_on() else x.dtype
    return None


def _precision(x: Tensor) -> Precision:
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return x.dtype
    return x.dtype, torch.get_autocast_dtype(kind)
