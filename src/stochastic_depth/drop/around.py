"""A module that computes shortcut and branch together: dropped, its shortcut takes its place.

That is a block that is dropped as a whole (LayerDrop), and the wrapper layer. A kept one moves its
shortcut s to ``s + weight * (output - s)``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._torch import tensor_leaves, tree_flatten, tree_unflatten
from ..branch import Place
from .merging import slots
from .rows import put_rows, take_rows
from .run import Run

__all__ = ["Take", "around", "describe"]


Take = Callable[[Tensor, Place], Tensor] | None


def around(
    run: Run,
    shortcut: Any,
    call: Callable[[Take], Any],
    select: bool,
    place: Place,
) -> Any:
    """The module's output, its shortcut where it is dropped, or a mixture, as ``run`` decides.

    Args:
        run: the decision.
        shortcut: a tensor, or a structure of tensors like the output.
        call: calls the module; it is given a function that takes the computed samples of a tensor,
            or None where all are computed.
        select: whether samples can be selected.
        place: where the shortcut's tensors have the samples.

    Raises:
        ValueError: a dropped call would return something else than a kept one.
    """
    if not run.decided:
        run.choose(tensor_leaves(shortcut)[0].shape[place.dim] // place.fold)
    if run.dropped:
        leaves, structure = tree_flatten(shortcut)
        first = next(i for i, x in enumerate(leaves) if isinstance(x, Tensor))
        for i, x in enumerate(leaves):
            if isinstance(x, Tensor):
                leaves[i] = run.leave_out(x) if i == first else x.clone()
        return tree_unflatten(leaves, structure)
    kept = run.kept
    if kept is None:
        if run.mask is None:
            out = run.beside(shortcut, lambda: call(None))
        else:
            out = run.call_masked(lambda: call(None))
        return _merged(shortcut, out, lambda s, x: _moved(s, x, run, place))
    if select:
        run.select()
    computed, rows = run.computed, slots(place, kept)
    if computed is None:
        out = run.beside(shortcut, lambda: call(None))
    else:
        out = call(lambda x, at: take_rows(x, slots(at, computed), at.dim))

    def put(s: Tensor, x: Tensor) -> Tensor:
        x = take_rows(x, rows, place.dim) if computed is None else run.counted(x, place)
        x = _lerp(take_rows(s, rows, place.dim), x, run.weight)
        return put_rows(s.to(x.dtype), rows, x, place.dim)

    return _merged(shortcut, out, put)


def _moved(s: Tensor, x: Tensor, run: Run, place: Place) -> Tensor:
    x = _lerp(s, x, run.weight)
    return x if run.mask is None else torch.where(run.mask_for(x, *place), x, s)


def _lerp(s: Tensor, x: Tensor, weight: Any) -> Tensor:
    if s.shape != x.shape:
        raise ValueError(_APART.format(out=describe(x), shortcut=describe(s)))
    real = x.is_floating_point() or x.is_complex()
    if not real or (isinstance(weight, float) and weight == 1.0):
        return x
    dtype = torch.promote_types(s.dtype, x.dtype)
    s, x = s.to(dtype), x.to(dtype)
    return s + weight * (x - s) if isinstance(weight, Tensor) else torch.lerp(s, x, weight)


def _merged(shortcut: Any, out: Any, merge: Callable[[Tensor, Tensor], Tensor]) -> Any:
    shortcuts, structure = tree_flatten(shortcut)
    outputs, output_structure = tree_flatten(out)
    if structure != output_structure:
        raise ValueError(
            f"the module returned {describe(out)} but its shortcut is {describe(shortcut)}: "
            "a dropped call would return another structure than a kept one; give a projection "
            "that maps the input to the structure of the output"
        )
    for i, (s, x) in enumerate(zip(shortcuts, outputs, strict=True)):
        if isinstance(s, Tensor) is not isinstance(x, Tensor):
            raise ValueError(_APART.format(out=describe(x), shortcut=describe(s)))
        if isinstance(x, Tensor):
            outputs[i] = merge(s, x)
    return tree_unflatten(outputs, structure)


_APART = (
    "the module returned {out} but its shortcut is {shortcut}; give projection='new', 'copy' or "
    "'tied', or a module that maps the input to the output's shape"
)


def describe(value: Any) -> str:
    """``value`` in an error's words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
