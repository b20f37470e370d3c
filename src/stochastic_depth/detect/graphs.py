"""What kind of node a node is: questions that capture, regions and program all ask."""

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from .existing import is_drop_module
from .spellings import ScaledSum

__all__ = ["check_absent", "is_effect", "is_shape", "may_hold_sums", "reads_types_only", "sum_of"]

_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_SUBTRACT = {operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_"}
_SHAPE_METHODS = {"size", "dim", "ndimension", "numel", "nelement", "stride", "is_floating_point"}
_SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad"}
_TYPE_READS = {"dim", "ndimension", "is_floating_point", "ndim", "dtype", "device", "is_cuda"}


def is_shape(node: fx.Node) -> bool:
    """Whether a node reads sizes or types only: no values, and no row depends on another."""
    if node.op == "call_method" and node.target in _SHAPE_METHODS:
        return True
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _SHAPE_ATTRIBUTES
    if node.op == "call_function" and node.all_input_nodes:
        return all(is_shape(n) for n in node.all_input_nodes) and (
            getattr(node.target, "__module__", None) in ("_operator", "builtins", "math")
        )
    return False


def is_effect(node: fx.Node) -> bool:
    """Whether a node is an assertion: it is computed for nobody and nobody waits for it."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") in (
        "_assert",
        "assert_fn",
        "check_absent",
    )


def check_absent(extra: Any, expected: Any = None) -> None:
    """Raise where a module returns more than it did when its block was traced."""
    leaves = tree_leaves(extra)
    if extra is expected or all(x is None for x in leaves):
        return
    if any(isinstance(x, torch.Tensor) for x in leaves) or extra != expected:
        raise RuntimeError(
            "a block with droppable branches gets something from one of its modules (attention "
            "weights, a cache) that was None when it was called like this before. Call "
            "stochastic_depth.apply again after changing the model's configuration, or do not "
            "ask for it in training"
        )


def reads_types_only(node: fx.Node) -> bool:
    """Whether ``node`` depends on types and numbers of dimensions only, not on sizes."""
    if not is_shape(node):
        return False
    if node.op == "call_method":
        return node.target in _TYPE_READS
    if node.target is getattr:
        return node.args[1] in _TYPE_READS
    return all(map(reads_types_only, node.all_input_nodes))


def sum_of(node: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """The two sides of a sum or difference, and the factor of the second."""
    if node.op not in ("call_function", "call_method") or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or a is b:
        return None
    if node.target in _ADD:
        return a, b, 1
    if node.target in _SUBTRACT:
        return a, b, -1
    if isinstance(node.target, ScaledSum):
        return a, b, node.target.factor
    return None


def may_hold_sums(module: nn.Module) -> bool:
    """Whether a module's forward may hold a residual sum.

    Torch's own layers and containers have none, its transformer layers apart.
    """
    home = type(module).__module__
    if home.startswith("torch.nn.modules.") or is_drop_module(module):
        return home == "torch.nn.modules.transformer"
    return True
