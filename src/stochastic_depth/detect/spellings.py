"""Other ways to write a sum, brought into the form ``add(a, b)`` that the analysis knows.

``torch.add(a, b, alpha=2)``, ``torch.stack([a, b]).sum(0)``, ``torch.addcmul(a, gate, b)``.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["ScaledSum", "spell_out_sums"]


@dataclass(frozen=True)
class ScaledSum:
    """``a + factor * b``, as one operation of torch."""

    factor: float

    @property
    def __name__(self) -> str:
        """What generated code calls it: another name for another factor."""
        return "scaled_sum_" + "".join(c if c.isalnum() else "_" for c in self.factor.hex())

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.add(a, b, alpha=self.factor)


def spell_out_sums(graph: fx.Graph) -> None:
    """Rewrite such sums in ``graph``; what it computes stays the same up to rounding."""
    for node in list(graph.nodes):
        parts = _scaled(node) or _stacked(node) or _addcmul(node)
        if parts is None:
            continue
        a, b, target = parts
        with graph.inserting_before(node):
            if isinstance(b, tuple):  # the factors of a product
                first, second, value = b
                b = graph.call_function(operator.mul, (first, second))
                b = b if value == 1 else graph.call_function(operator.mul, (b, value))
            node.replace_all_uses_with(graph.call_function(target, (a, b)))
        inner = node.all_input_nodes[0]
        graph.erase_node(node)
        if inner.target is torch.stack and not inner.users:
            graph.erase_node(inner)


Parts = tuple[Any, Any, Any] | None


def _arguments(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any] | None:
    """The arguments of a call by name, if it has no others."""
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return given if len(node.args) <= len(names) and given.keys() <= set(names) else None


def _is(node: fx.Node, *names: str) -> bool:
    functions = [getattr(torch, name) for name in names]
    return (node.op == "call_function" and node.target in functions) or (
        node.op == "call_method" and node.target in names
    )


def _scaled(node: fx.Node) -> Parts:
    """``torch.add(a, b, alpha=2)``, and calls by keyword."""
    if not _is(node, "add", "sub", "subtract") or not node.kwargs:
        return None
    given = _arguments(node, ("input", "other"))
    alpha = node.kwargs.get("alpha", 1)
    if given is None:
        given = _arguments(node, ("input", "other", "alpha"))
    if given is None or not isinstance(alpha, int | float):
        return None
    a, b = given.get("input"), given.get("other")
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return None
    factor = alpha if node.target in (torch.add, "add") else -alpha
    return a, b, torch.add if factor == 1 else ScaledSum(float(factor))


def _stacked(node: fx.Node) -> Parts:
    """``torch.stack([a, b]).sum(0)``."""
    given = _arguments(node, ("input", "dim")) if _is(node, "sum") else None
    if given is None or given.get("dim") not in (0, [0], (0,)):
        return None
    stack = given["input"]
    if not (isinstance(stack, fx.Node) and _is(stack, "stack")):
        return None
    inner = _arguments(stack, ("tensors", "dim"))
    if inner is None or inner.get("dim", 0) != 0 or len(stack.users) > 1:
        return None
    tensors = inner["tensors"]
    return (*tensors, torch.add) if len(tensors) == 2 else None


def _addcmul(node: fx.Node) -> Parts:
    """``torch.addcmul(a, gate, b)``, which rounds once less than product and sum."""
    if not _is(node, "addcmul"):
        return None
    given = _arguments(node, ("input", "tensor1", "tensor2", "value"))
    if given is None:
        return None
    product = given["tensor1"], given["tensor2"], given.get("value", 1)
    return given["input"], product, torch.add
