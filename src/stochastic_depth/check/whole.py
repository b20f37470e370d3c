"""The plain model with a block that counts as often as one says: what ``verify`` compares with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .._torch import tensor_leaves, tree_flatten, tree_unflatten
from ..drop.layer import StochasticDepth
from ..drop.site import Site

__all__ = ["weighed_block"]


@contextmanager
def weighed_block(owner: Site | StochasticDepth, weight: float) -> Iterator[None]:
    """Move what a block returns away from its shortcut, ``weight`` times as far as it is."""
    block = owner.block if isinstance(owner, Site) else owner

    def moved(module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        if isinstance(owner, Site):  # a block has one shortcut, the first tensor that fits
            shortcuts = [x for x in tensor_leaves((args, kwargs)) if x.is_floating_point()][:1]
        else:
            project = owner.projection
            shortcuts = tensor_leaves(args[0] if project is None else project(args[0]))
        leaves, structure = tree_flatten(out)
        places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        for i, shortcut in zip(places, shortcuts, strict=False):
            if weight == 0:
                leaves[i] = shortcut.clone()
            elif leaves[i].is_floating_point():
                leaves[i] = shortcut + weight * (leaves[i] - shortcut)
        return tree_unflatten(leaves, structure)

    with block.register_forward_hook(moved, with_kwargs=True):
        yield
