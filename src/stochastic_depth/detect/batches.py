"""Which tensors have the rows of the batch, and in which dimension.

Told from a model's calls with two numbers of rows: what grows with the batch has its rows. A size
that merely equals the batch's (that of a T x T mask, where T = B) says nothing.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from .capture import Call
from .examples import Examples, Outline, outline

__all__ = ["UNKNOWN", "Rows", "batch_dim", "row_dim", "row_dims", "rows_agree"]

UNKNOWN = -1


def batch_dim(block: nn.Module) -> int:
    """The dimension of the rows: 0, or 1 where a layer in the block takes the time first."""
    layers = nn.MultiheadAttention | nn.RNNBase
    return int(any(isinstance(m, layers) and not m.batch_first for m in block.modules()))


def row_dim(value: Any, larger: Any) -> int | None:
    """The dimension in which ``larger`` has one row more; None where both are alike.

    Args:
        value: a tensor, or the outline of one.
        larger: the same in a call with one row more.

    Raises:
        LookupError: this cannot be told.
    """
    sizes = [x.shape if isinstance(x, Tensor | Outline) else None for x in (value, larger)]
    if sizes[0] is None or sizes[1] is None or len(sizes[0]) != len(sizes[1]):
        raise LookupError
    apart = [(d, b - a) for d, (a, b) in enumerate(zip(*sizes, strict=True)) if a != b]
    if not apart:
        return None
    if len(apart) == 1 and apart[0][1] == 1:
        return apart[0][0]
    raise LookupError


def row_dims(values: Sequence[Any], larger: Sequence[Any]) -> tuple[int | None, ...]:
    """:func:`row_dim` of each value of a call; ``UNKNOWN`` where it cannot be told."""

    def of(value: Any, more: Any) -> int | None:
        try:
            return row_dim(value, more)
        except LookupError:
            return UNKNOWN

    return tuple(map(of, values, larger))


class Rows:
    """Where the nodes of a traced block have the rows of the batch.

    Args:
        block: the block.
        call: how it is called, with examples and ``row_dims``.
        examples: the values of the nodes in that call.
    """

    def __init__(self, block: nn.Module, call: Call, examples: Examples) -> None:
        assert call.examples is not None
        assert call.row_dims is not None
        self.examples = examples
        self.larger = Examples(block, _enlarged(call.examples, call.row_dims))
        self.dims = call.row_dims
        self.known: dict[fx.Node, bool] = {}

    def of(self, node: fx.Node) -> int | None:
        """The dimension of the rows of ``node``; None where it has none.

        Raises:
            Exception: of any kind, where that cannot be told.
        """
        if not self._is_known(node):
            raise LookupError
        return row_dim(self.examples.of(node), self.larger.of(node))

    def _is_known(self, node: fx.Node) -> bool:
        """Whether ``node`` is computed from what is known."""
        if not self.known:
            given = iter(self.dims)
            for n in node.graph.nodes:
                sources = all(self.known[s] for s in n.all_input_nodes)
                self.known[n] = sources and (n.op != "placeholder" or next(given) != UNKNOWN)
        return self.known[node]


def _enlarged(values: Sequence[Any], dims: Sequence[int | None]) -> list[Any]:
    """The outlines of ``values`` with one row more."""
    outlines = map(outline, values)
    return [
        x if dim is None or dim == UNKNOWN else x.with_one_more(dim)
        for x, dim in zip(outlines, dims, strict=True)
    ]


def rows_agree(values: Sequence[Any], dims: Sequence[int | None], rows: int, dim: int) -> bool:
    """Whether values can have their rows where ``dims`` says.

    A tensor that is said to have none, and is of the batch's size all the same, might have.
    """
    for x, own in zip(values, dims, strict=True):
        if not isinstance(x, Tensor):
            continue
        if own is not None and (x.dim() <= own or x.shape[own] != rows):
            return False
        if own is None and any(x.dim() > d and x.shape[d] == rows for d in {0, dim}):
            return False
    return True
