"""What a module returns beside its output where its branch is dropped: exceptions, by type.

A branch whose module returns something else that is used cannot be dropped, unless a handler says
what stands in for it. The built-in handlers came in through the same door as a user's.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn

__all__ = ["Handler", "further_output", "register_handler"]

Handler = Callable[[nn.Module, Mapping[str, Any]], Mapping[int, Any]]

_handlers: dict[type[nn.Module] | str, Handler] = {}


def register_handler(kind: type[nn.Module] | str, handler: Handler) -> None:
    """Say what modules of a type return beside their output where they are not run.

    Args:
        kind: the type, or its qualified name ("package.module.Class") where it should not be
            imported. Subclasses are not meant.
        handler: called with the module and its arguments by name; tensors are stand-ins that can
            only be passed on. Returns, by position, the further outputs that may be replaced, and
            by what: None, one of the arguments, or a constant that follows from them. It is also
            what they are replaced by where the branch is kept. A branch with other further
            outputs that are used is kept.

    Raises:
        TypeError: ``kind`` is no module type or name, or ``handler`` is no function.

    Example:
        >>> import torch, stochastic_depth as sd
        >>> class Attention(torch.nn.Module):  # returns its output, a bias and weights
        ...     pass
        >>> sd.register_handler(Attention, lambda module, given: {1: given["bias"], 2: None})
    """
    if not isinstance(kind, str) and not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"kind must be a module type or its qualified name, got {kind!r}")
    if not callable(handler):
        raise TypeError(f"handler must be a function of (module, arguments), got {handler!r}")
    _handlers[kind] = handler


def further_output(module: nn.Module, part: fx.Node, length: Callable[[], int]) -> Any:
    """What stands in for ``part``, a part of what a call of ``module`` returns.

    Args:
        module: the module.
        part: a look-up in the result of a traced call.
        length: asked for the number of the module's outputs.

    Raises:
        LookupError: no handler says so.
    """
    kind = type(module)
    handler = _handlers.get(kind) or _handlers[f"{kind.__module__}.{kind.__qualname__}"]
    call, key = part.args
    assert isinstance(call, fx.Node)
    bound = inspect.signature(kind.forward).bind(module, *call.args, **call.kwargs)
    bound.apply_defaults()
    outputs = handler(module, bound.arguments | bound.arguments.get("kwargs", {}))
    if isinstance(key, slice):
        return tuple(outputs[i] for i in range(length())[key])
    return outputs[key]  # type: ignore[index]


from . import timm as _timm  # noqa: E402, F401  # registers the built-in ones
from . import transformers as _transformers  # noqa: E402, F401
