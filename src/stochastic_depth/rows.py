"""Take rows out of a batch and put them back, in the tensor's own memory layout.

``index_select`` and ``index_add`` return a row-major tensor whatever they are given, so on a
channels-last image they cost a layout conversion each way. Seen through a permutation that puts
the dimensions in the order of their strides, the same two operations keep the layout.
"""

from torch import Tensor

__all__ = ["add_rows", "put_rows", "take_rows"]


def _stride_order(x: Tensor) -> list[int]:
    """The dimensions of ``x`` from the largest stride to the smallest."""
    strides = x.stride()
    return sorted(range(x.dim()), key=lambda d: -strides[d])


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def take_rows(x: Tensor, rows: Tensor, dim: int = 0) -> Tensor:
    """The rows ``rows`` (1-d, int64) of ``x`` along ``dim``."""
    order = _stride_order(x)
    taken = x.permute(order).index_select(order.index(dim), rows)
    return taken.permute(_inverse(order))


def add_rows(x: Tensor, rows: Tensor, values: Tensor, weight: float, dim: int = 0) -> Tensor:
    """A new tensor: ``x`` with ``weight * values`` added to its rows ``rows`` along ``dim``."""
    order = _stride_order(x)
    added = x.permute(order).index_add(order.index(dim), rows, values.permute(order), alpha=weight)
    return added.permute(_inverse(order))


def put_rows(x: Tensor, rows: Tensor, values: Tensor, dim: int = 0) -> Tensor:
    """A new tensor: ``x`` with its rows ``rows`` along ``dim`` replaced by ``values``."""
    order = _stride_order(x)
    put = x.permute(order).index_copy(order.index(dim), rows, values.permute(order))
    return put.permute(_inverse(order))
