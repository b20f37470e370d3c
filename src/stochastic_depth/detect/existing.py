"""Stochastic depth that a model already has: DropPath modules and functions, and layerdrop."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import fx, nn

__all__ = ["drop_functions", "existing_rate", "is_drop_call", "is_drop_module", "layerdrop"]

_MODULES = {"StochasticDepth", "DropPath"}
_FUNCTIONS = {"stochastic_depth", "drop_path"}


def is_drop_module(module: nn.Module) -> bool:
    """Whether a module masks a branch's output at random, going by its type's name.

    Every code base has its own class (torchvision, timm, transformers: over fifty copies), all
    of them named alike, with one input and a rate.
    """
    named = type(module).__name__.endswith(tuple(_MODULES))
    return named and next(module.children(), None) is None and existing_rate(module) is not None


def existing_rate(module: nn.Module) -> float | None:
    """The drop probability of such a module."""
    for name in ("p", "drop_prob", "drop_path_prob", "prob"):
        rate: Any = getattr(module, name, None)
        if isinstance(rate, int | float):
            return float(rate)
    return None


def drop_functions(forward: Callable[..., Any]) -> list[Callable[..., Any]]:
    """The functions of that kind that ``forward`` may call: those that its module knows."""
    known = inspect.unwrap(forward).__globals__.values()
    return [f for f in known if inspect.isfunction(f) and f.__name__ in _FUNCTIONS]


def layerdrop(module: nn.Module) -> float:
    """The rate at which a module leaves out whole layers by itself, as those of transformers do."""
    holds_layers = any(isinstance(child, nn.ModuleList) for child in module.children())
    rate: Any = getattr(module, "layerdrop", None)
    if rate is None and holds_layers:
        rate = getattr(getattr(module, "config", None), "layerdrop", None)
    return float(rate) if isinstance(rate, int | float) else 0.0


def is_drop_call(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node of ``root``'s graph is a call of such a module or function."""
    if node.op == "call_module":
        return is_drop_module(root.get_submodule(str(node.target)))
    return node.op == "call_function" and getattr(node.target, "__name__", "") in _FUNCTIONS
