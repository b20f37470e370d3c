"""The ways to see a value as the sum of a shortcut and a branch."""

from collections.abc import Iterator

from .flow import Node
from .functions import ADD, SUBTRACT

__all__ = ["OF_STACKS", "sides", "stacked"]

OF_STACKS = {"sum", "mean"}
_WITH_FACTORS = {
    "addcmul", "addcmul_", "addmm", "addmm_", "baddbmm", "index_add", "index_add_", "scatter_add",
    "scatter_add_",
}  # fmt: skip


def sides(node: Node, nodes: list[Node]) -> Iterator[tuple[int, int]]:
    """The ways to see a node as a sum: the shortcut, and the other value."""
    parts = node.parts
    if node.op in ADD and len(parts) == 2:
        yield parts[0], parts[1]
        yield parts[1], parts[0]
    elif node.op in SUBTRACT | {"lerp", "lerp_"} and len(parts) > 1:
        yield parts[0], parts[1]
    elif node.op in _WITH_FACTORS:
        for part in reversed(parts[1:]):  # the later one is a layer's, the other its gate
            yield parts[0], part
    elif len(terms := stacked(node, nodes)) == 2:
        yield terms[0], terms[1]
        yield terms[1], terms[0]


def stacked(node: Node, nodes: list[Node]) -> tuple[int, ...]:
    """The terms of a sum, or of a mean, over a stack."""
    if node.op in OF_STACKS and node.sources and nodes[node.sources[0]].op == "stack":
        terms = nodes[node.sources[0]].sources
        return terms if nodes[terms[0]].shape == node.shape else ()
    return ()
