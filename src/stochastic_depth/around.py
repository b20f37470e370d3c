"""How a module that computes shortcut and branch together joins its shortcut."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from .rows import put_rows, take_rows

__all__ = ["AROUND", "Around", "describe"]


class Around:
    """The module's output, moved away from its shortcut: ``s + weight * (output - s)``.

    Holds for every floating-point tensor in the two structures; anything else is the module's.
    """

    def __call__(self, shortcut: Any, output: Any, weight: float) -> Any:
        _check_alike(shortcut, output)

        def merge(s: Any, out: Any) -> Any:
            if weight == 1.0 or not (isinstance(out, Tensor) and out.is_floating_point()):
                return out
            dtype = torch.promote_types(s.dtype, out.dtype)
            return torch.lerp(s.to(dtype), out.to(dtype), weight)

        return tree_map(merge, shortcut, output)

    def rows(self, shortcut: Any, output: Any, weight: float, rows: Tensor, dim: int) -> Any:
        kept = tree_map_only(Tensor, lambda s: take_rows(s, rows, dim), shortcut)
        merged = self(kept, output, weight)

        def put(s: Any, out: Any) -> Any:
            return put_rows(s.to(out.dtype), rows, out, dim) if isinstance(out, Tensor) else out

        return tree_map(put, shortcut, merged)


AROUND = Around()


def _check_alike(shortcut: Any, output: Any) -> None:
    """Raise a ValueError where a dropped call would return something else than a kept one."""
    shortcuts, structure = tree_flatten(shortcut)
    outputs, output_structure = tree_flatten(output)
    if structure != output_structure:
        raise ValueError(
            f"the module returned {describe(output)} but its shortcut is {describe(shortcut)}: "
            "a dropped call would return another structure than a kept one; give a projection "
            "that maps the input to the structure of the output"
        )
    for s, out in zip(shortcuts, outputs, strict=True):
        if getattr(s, "shape", None) != getattr(out, "shape", None):
            raise ValueError(
                f"the module returned {describe(out)} but its shortcut is {describe(s)}; give "
                "projection='new', 'copy' or 'shared', or a module that maps the input to the "
                "output's shape"
            )


def describe(value: Any) -> str:
    """``value`` in an error's words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
