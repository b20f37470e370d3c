"""Which dimension of the inputs has the samples: ways to see it, and inputs of fewer samples."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch import tree_map_only
from .tensors import tensors_within

__all__ = ["Batch", "Samples", "first_samples", "mapped", "ways_to_batch"]

_TRIES = 4  # ways to take a dimension of the inputs for the batch's


class Samples(NamedTuple):
    """What is known of where the inputs have their samples.

    Attributes:
        dim: the dimension; None where it is to be found.
        rows: how many neighbouring entries of it are one sample.
    """

    dim: int | None = None
    rows: int = 1


@dataclass
class Batch:
    """One way to see the inputs.

    Attributes:
        size: how many samples.
        dims: by the id of a tensor, the dimension in which it has them.
        rows: how many entries of a dimension are one sample.
    """

    size: int
    dims: dict[int, int]
    rows: int = 1


def ways_to_batch(x: Any, known: Samples) -> Iterator[Batch]:
    """The ways to take a dimension for the samples', the likeliest first."""
    given = tensors_within(x, 0)
    shaped = [t for t in given if t.layout == torch.strided and not t.is_nested and t.dim()]
    tried: list[dict[int, int]] = []
    for dim in range(max((t.dim() for t in shaped), default=0)):
        if known.dim not in (None, dim):
            continue
        size = next(t for t in shaped if t.dim() > dim).shape[dim]
        if size % known.rows:
            continue
        for anywhere in (False, True):
            dims = {}
            for t in shaped:
                at = [d for d in (dim, *range(t.dim())) if d < t.dim() and t.shape[d] == size]
                if at and (anywhere or at[0] == dim):
                    dims[id(t)] = at[0]
            if size and dims and dims not in tried and len(tried) < _TRIES:
                tried.append(dims)
                yield Batch(size // known.rows, dims, known.rows)


def mapped(x: Any, batch: Batch, change: Callable[[Tensor, int], Tensor]) -> Any:
    """``x`` with ``change(tensor, dim)`` in the place of each tensor that has samples."""

    def changed(t: Tensor) -> Tensor:
        return change(t.detach(), batch.dims[id(t)]) if id(t) in batch.dims else t

    return tree_map_only(Tensor, changed, x)


def first_samples(x: Any, n: int) -> Any:
    """``x`` with its first ``n`` samples alone, in the likeliest way to see it, if it has more."""
    batch = next(ways_to_batch(x, Samples()), None)
    if batch is None or batch.size <= n:
        return None
    return mapped(x, batch, lambda t, dim: t.narrow(dim, 0, n))
