"""Take samples out of a batch and put them back, in the tensor's own memory layout.

``index_select`` and ``index_add`` return a row-major tensor whatever they are given, so on a
channels-last image they cost a layout conversion each way. Seen through a permutation that puts
the dimensions in the order of their strides, the same two operations keep the layout.

The results are no views of such a permutation: autograd copies the whole gradient where something
works in place on a view, as the ReLU after a residual sum often does.
"""

from typing import Any

import torch
from torch import Tensor

from .._torch import is_transformed

__all__ = ["add_rows", "put_rows", "split_rows", "take_rows"]


def take_rows(x: Tensor, rows: Tensor, dim: int = 0) -> Tensor:
    """The rows ``rows`` (1-d, int64) of ``x`` along ``dim``."""
    if is_transformed():
        return _plainly_taken(x, rows, dim)
    return split_rows(x, rows, dim)[0] if _is_recorded(x) else _taken(x, rows, dim)


def split_rows(x: Tensor, rows: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """``(take_rows(x, rows, dim), x)``, for an ``x`` that is a shortcut too.

    The gradients of both meet here: those of the rows are added to those of the whole, where
    autograd by itself would spread them over a tensor of zeros first.
    """
    if is_transformed() or not _is_recorded(x):
        return take_rows(x, rows, dim), x
    taken, whole = _Split.apply(x, rows, dim)  # type: ignore[no-untyped-call]
    return taken, whole


def add_rows(x: Tensor, rows: Tensor, values: Tensor, weight: float, dim: int = 0) -> Tensor:
    """A new tensor: ``x`` with ``weight * values`` added to its rows ``rows`` along ``dim``."""
    if is_transformed():
        return _plainly_added(x, rows, values, weight, dim)
    if _is_recorded(x) or _is_recorded(values):
        recorded: Tensor = _Add.apply(x, rows, values, weight, dim)  # type: ignore[no-untyped-call]
        return recorded
    return _added(x, rows, values, weight, dim)


def put_rows(x: Tensor, rows: Tensor, values: Tensor, dim: int = 0) -> Tensor:
    """A new tensor: ``x`` with its rows ``rows`` along ``dim`` replaced by ``values``."""
    order = _stride_order(x)
    put = x.permute(order).index_copy(order.index(dim), rows, values.permute(order))
    return put.permute(_inverse(order))


def _stride_order(x: Tensor) -> list[int]:
    """The dimensions of ``x`` from the largest stride to the smallest.

    Those of one entry, whose stride may be any, come first. In a graph, where strides may be
    symbols and the layout is the compiler's, they are in their own order.
    """
    if torch.compiler.is_compiling():
        return list(range(x.dim()))
    strides, shape = x.stride(), x.shape
    return sorted(range(x.dim()), key=lambda d: (shape[d] != 1, -strides[d]))


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _is_recorded(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _empty(x: Tensor, shape: list[int], order: list[int]) -> Tensor:
    """A dense tensor of ``shape`` with dimensions in ``order`` by their strides."""
    strides, stride = [0] * len(shape), 1
    for d in reversed(order):
        strides[d] = stride
        stride *= shape[d]
    return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)


# In operations that all kinds of vmap have rules for, that of ``is_grads_batched`` included.
def _plainly_taken(x: Tensor, rows: Tensor, dim: int) -> Tensor:
    order = _stride_order(x)
    return x.permute(order).index_select(order.index(dim), rows).permute(_inverse(order))


def _plainly_added(x: Tensor, rows: Tensor, values: Tensor, weight: float, dim: int) -> Tensor:
    order = _stride_order(x)
    index, given = order.index(dim), values.permute(order)
    added = x.permute(order).index_add(index, rows, given, alpha=weight)
    return added.permute(_inverse(order))


def _taken(x: Tensor, rows: Tensor, dim: int) -> Tensor:
    order, shape = _stride_order(x), list(x.shape)
    shape[dim] = len(rows)
    out = _empty(x, shape, order)
    with torch.no_grad():
        torch.index_select(x.permute(order), order.index(dim), rows, out=out.permute(order))
    return out


def _added(x: Tensor, rows: Tensor, values: Tensor, weight: float, dim: int) -> Tensor:
    order = _stride_order(x)
    out = _empty(x, list(x.shape), order).copy_(x)
    out.permute(order).index_add_(order.index(dim), rows, values.permute(order), alpha=weight)
    return out


class _Split(torch.autograd.Function):
    """``(take_rows(x, rows, dim), x)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows)
        ctx.dim, ctx.shape, ctx.order = dim, x.shape, _stride_order(x)
        ctx.set_materialize_grads(False)
        return _taken(x, rows, dim), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, taken: Tensor | None, whole: Tensor | None) -> Any:
        (rows,) = ctx.saved_tensors
        if taken is None:
            return whole, None, None
        if whole is None:
            whole = _empty(taken, list(ctx.shape), ctx.order).zero_()
        return _plainly_added(whole, rows, taken, 1.0, ctx.dim), None, None


class _Add(torch.autograd.Function):
    """``add_rows(x, rows, values, weight, dim)``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor, values: Tensor, weight: float, dim: int
    ) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.weight, ctx.dim, ctx.order = weight, dim, _stride_order(values)
        return _added(x, rows, values, weight, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        of_values = None
        if ctx.needs_input_grad[2]:
            of_values = _plainly_taken(grad, rows, ctx.dim)
            of_values = of_values * ctx.weight if grad.requires_grad else of_values.mul_(ctx.weight)
            if _stride_order(of_values) != ctx.order:
                # In the layout of the values: torch's instance_norm makes a wrong gradient of one
                # for a single sample that is channels-last.
                of_values = of_values.permute(ctx.order).contiguous().permute(_inverse(ctx.order))
        return grad, None, of_values, None, None
