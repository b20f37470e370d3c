"""The arguments of a call: whether their samples are where they were, and what is handed on."""

import operator
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from .._torch import tree_leaves
from ..branch import Place
from ..find.plan import Gate

__all__ = ["copies", "each_once", "fits", "hand_on", "has_samples", "same_objects"]


def fits(gate: Gate, leaves: Sequence[Any], size: int) -> bool:
    """Whether the leaves of (args, kwargs) have the samples, ``size`` of them, where they had them.

    Or one for all samples; but what was one for all may not have become one for each.
    """
    if len(leaves) != len(gate.given):
        return False
    for i, dim in gate.single:
        if getattr(leaves[i], "shape", ())[dim : dim + 1] not in ((), (1,)):
            return False
    return all(map(_is_as_watched, leaves, gate.given, repeat(size)))


def _is_as_watched(x: Any, place: Place | None, size: int) -> bool:
    if not isinstance(x, Tensor) or place is None:
        return True
    if place.dim < 0:  # it was no tensor when it was watched
        return x.dim() == 0
    return x.dim() <= place.dim or x.shape[place.dim] in (1, size * place.fold)


def has_samples(x: Any, place: Place, size: int) -> bool:
    """Whether ``x``, which fits, has samples to select: it may be one for all of them."""
    if not isinstance(x, Tensor) or x.dim() <= place.dim or place.dim < 0:
        return False
    return x.shape[place.dim] != 1 or size * place.fold == 1


def each_once(
    change: Callable[[Any, Place | None], Any],
    leaves: Sequence[Any],
    places: Sequence[Place | None],
) -> list[Any]:
    """``change(leaf, place)`` of all; what is given twice, as to an attention, stays the same."""
    if torch.compiler.is_compiling():  # where an id is a guard, and the graph knows
        return list(map(change, leaves, places))
    made: dict[Any, Any] = {}
    for x, place in zip(leaves, places, strict=True):
        if (id(x), place) not in made:
            made[id(x), place] = change(x, place)
    return [made[id(x), place] for x, place in zip(leaves, places, strict=True)]


def same_objects(given: tuple[Any, Any], made: tuple[Any, Any]) -> tuple[Any, Any]:
    """``made`` of (args, kwargs), with those of which nothing is another as they were ``given``.

    These may be written to: a list of losses, a dict with a count.
    """
    if torch.compiler.is_compiling():
        return made
    (args, kwargs), (new, named) = given, made
    return tuple(map(_same, args, new)), {n: _same(kwargs[n], x) for n, x in named.items()}


def copies(given: tuple[Any, Any], made: tuple[Any, Any]) -> list[Any]:
    """What is in ``made`` of the containers of (args, kwargs) that are others than ``given``.

    But for tensors, which finding has followed.
    """
    if torch.compiler.is_compiling():
        return []
    (args, kwargs), (new, named) = given, made
    pairs = [*zip(args, new, strict=True), *((kwargs[n], x) for n, x in named.items())]
    others = [x for old, x in pairs if old is not x and not isinstance(x, Tensor)]
    return [x for x in tree_leaves(others) if not isinstance(x, Tensor)] if others else []


def _same(old: Any, new: Any) -> Any:
    if old is new or isinstance(new, Tensor):
        return new
    a, b = tree_leaves(old), tree_leaves(new)
    return old if len(a) == len(b) and all(map(operator.is_, a, b)) else new


def hand_on(
    gate: Gate,
    given: Sequence[Any],
    taken: Sequence[Any],
    leaves: list[Any],
    put_back: Callable[[Any, Any, Place | None], Any],
) -> None:
    """Put what a call hands on of its arguments, with all their samples, into what it returned.

    Args:
        gate: which call it is.
        given: its arguments.
        taken: the same as they went into it, perhaps with the kept samples only.
        leaves: what it returned, None where it was not made; changed.
        put_back: puts the kept samples of an argument, which it changed, back among the others.
    """
    for i, leaf in enumerate(gate.returned):
        if leaf.kind == "argument":
            own, x = given[leaf.argument], taken[leaf.argument]
            if leaves[i] is None or leaves[i] is x:
                leaves[i] = own
            elif x is not own:
                leaves[i] = put_back(own, leaves[i], gate.given[leaf.argument])
