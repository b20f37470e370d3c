"""Decide otherwise on this thread for a while: by hand, not at all, or in evaluation, too."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor

from .._torch import tree_leaves
from ..branch import Branch
from ..find.tensors import is_function
from .slot import here

__all__ = ["check_repeats", "forced", "left_out", "noting_sizes", "plain", "sampled"]


@contextmanager
def forced(decisions: Mapping[Branch, tuple[int, float]]) -> Iterator[None]:
    """Drop branches, or keep them with a weight, in training and in evaluation.

    Args:
        decisions: by branch, whether it is dropped (or a number to choose its samples by), and
            its weight where it is kept. Others decide as always. A nested ``with`` adds to those
            around it.
    """
    with _standing(_Layer(decisions)):
        yield


@contextmanager
def left_out(branches: Iterable[Branch]) -> Iterator[None]:
    """Drop branches for a user."""
    with _standing(_Layer(dict.fromkeys(branches, (True, 1.0)), is_for_users=True)):
        yield


@contextmanager
def plain() -> Iterator[None]:
    """Run the model as it is without stochastic depth, on this thread."""
    with _standing(_Layer({}, is_plain=True)):
        yield


@contextmanager
def sampled(branches: Iterable[Branch]) -> Iterator[None]:
    """Draw decisions for these branches in evaluation as in training, on this thread."""
    with _standing(_Layer(sampled=frozenset(branches), is_for_users=True)):
        yield


@contextmanager
def noting_sizes() -> Iterator[dict[Branch, int]]:
    """By branch that chooses samples meanwhile, of how many."""
    before, here.sizes = here.sizes, {}
    try:
        yield here.sizes
    finally:
        here.sizes = before


@dataclass(frozen=True, eq=False)
class _Layer:
    """What one ``with`` asks for; ``is_plain`` hides the decisions of those around it."""

    forced: Mapping[Branch, tuple[int, float]] | None = None
    sampled: frozenset[Branch] = frozenset()
    is_plain: bool = False
    is_for_users: bool = False


@contextmanager
def _standing(layer: _Layer) -> Iterator[None]:
    """Have a layer count, above those that are there; they may end in any order, as generators."""
    _set([*here.layers, layer])
    try:
        yield
    finally:
        _set([other for other in here.layers if other is not layer])


def _set(layers: list[_Layer]) -> None:
    here.layers, forced = layers, None
    for layer in layers:
        if layer.forced is not None:
            forced = {**({} if layer.is_plain else forced or {}), **layer.forced}
    here.forced = forced
    here.sampled = frozenset().union(*[layer.sampled for layer in layers])
    here.is_for_users = any(layer.is_for_users for layer in layers)


def check_repeats(branches: Iterable[Branch], training: bool) -> None:
    """Raise where reentrant checkpointing would repeat a call as it is after the ``with``.

    Decisions that are drawn in training are on record, and found again.
    """
    if not here.is_for_users or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return
    here_only = {*(here.forced or {}), *(() if training else here.sampled)}
    if not here_only.isdisjoint(branches) and _is_repeated_later(sys._getframe(1)):
        raise RuntimeError(
            "skip() and sampling() do not hold where reentrant checkpointing repeats a call in the "
            "backward pass, so gradients would be wrong; use checkpoint(..., use_reentrant=False)"
        )


def _is_repeated_later(frame: FrameType | None) -> bool:
    """Whether it runs in a custom Function that is given something which needs a gradient."""
    while frame is not None:
        if is_function(frame.f_code):
            given = tree_leaves(list(frame.f_locals.values()))
            return any(isinstance(x, Tensor) and x.requires_grad for x in given)
        frame = frame.f_back
    return False
