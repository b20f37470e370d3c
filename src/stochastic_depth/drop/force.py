"""Decide otherwise on this thread for a while: by hand, not at all, or in evaluation, too."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from ..branch import Branch
from .slot import here

__all__ = ["forced", "plain", "sampled"]


@contextmanager
def forced(decisions: Mapping[Branch, tuple[int, float]]) -> Iterator[None]:
    """Drop branches, or keep them with a weight, in training and in evaluation.

    Args:
        decisions: by branch, whether it is dropped (or a number to choose its samples by), and
            its weight where it is kept. Others decide as always. A nested ``with`` adds to those
            around it.
    """
    before = here.forced
    here.forced = {**(before or {}), **decisions}
    try:
        yield
    finally:
        here.forced = before


@contextmanager
def plain() -> Iterator[None]:
    """Run the model as it is without stochastic depth, on this thread."""
    before, here.forced = here.forced, {}
    try:
        yield
    finally:
        here.forced = before


@contextmanager
def sampled(branches: Iterable[Branch]) -> Iterator[None]:
    """Draw decisions for these branches in evaluation as in training, on this thread."""
    before = here.sampled
    here.sampled = before | frozenset(branches)
    try:
        yield
    finally:
        here.sampled = before
