"""Sums with the first channels only, as RexNet's: ``cat([x[:, :k] + shortcut, x[:, k:]], 1)``.

Where the branch x is dropped, what is left is the shortcut with zeros for the channels that it does
not have. So this is ``x + pad(shortcut)``, a residual sum with a projection.
"""

import operator
from collections.abc import Callable

import torch
from torch import fx
from torch.nn.functional import pad

from .graphs import sum_of

__all__ = ["join_slices"]


def join_slices(graph: fx.Graph, shape: Callable[[fx.Node], torch.Size]) -> bool:
    """Write such sums in ``graph`` as sums of the whole; whether there were any.

    Args:
        graph: a traced forward.
        shape: asked for the shape of a value.
    """
    found = False
    for node in list(graph.nodes):
        match = _match(node)
        if match is None:
            continue
        x, shortcut, dim, k = match
        size = shape(x)
        with graph.inserting_before(node):
            missing = [0, 0] * (len(size) - 1 - dim) + [0, size[dim] - k]
            padded = graph.call_function(pad, (shortcut, missing))
            node.replace_all_uses_with(graph.call_function(operator.add, (x, padded)))
        first = node.args[0][0]
        graph.erase_node(node)
        if not first.users:
            graph.erase_node(first)
        found = True
    return found


def _match(node: fx.Node) -> tuple[fx.Node, fx.Node, int, int] | None:
    """The branch, the shortcut, the dimension of the channels, and how many the shortcut has."""
    if node.target is not torch.cat:
        return None
    parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if not (isinstance(parts, list | tuple) and len(parts) == 2 and isinstance(dim, int)):
        return None
    first, rest = parts
    sides = sum_of(first) if isinstance(first, fx.Node) else None
    cut = _sliced(rest, dim)
    if sides is None or sides[2] != 1 or cut is None or cut[2] is not None:
        return None
    x, k, _ = cut
    if k is None:
        return None
    for given, shortcut in (sides[:2], sides[1::-1]):
        if _sliced(given, dim) in ((x, None, k), (x, 0, k)):
            return x, shortcut, dim, k
    return None


def _sliced(node: object, dim: int) -> tuple[fx.Node, int | None, int | None] | None:
    """Of ``x[:, start:stop]``, sliced in ``dim``: x, start and stop."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem:
        return None
    x, key = node.args
    if not (isinstance(x, fx.Node) and isinstance(key, tuple) and len(key) == dim + 1):
        return None
    *before, cut = key
    if any(part != slice(None) for part in before) or not isinstance(cut, slice):
        return None
    return (x, cut.start, cut.stop) if cut.step is None else None
