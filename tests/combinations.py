"""Which combinations of settings run each time, and which are long sweeps."""

from itertools import combinations, product
from typing import Any

import pytest

__all__ = ["in_pairs"]


def in_pairs(*axes: list[Any]) -> list[Any]:
    """All combinations of the ``axes``, of which enough run each time that any two values meet."""
    every = list(product(*map(range, map(len, axes))))
    missing = {pair for row in every for pair in _pairs(row)}
    chosen = set()
    while missing:
        row = max(every, key=lambda row: len(missing.intersection(_pairs(row))))
        chosen.add(row)
        missing.difference_update(_pairs(row))
    return [
        pytest.param(
            *[axis[i] for axis, i in zip(axes, row, strict=True)],
            marks=[] if row in chosen else pytest.mark.zoo,
        )
        for row in every
    ]


def _pairs(row: tuple[int, ...]) -> list[Any]:
    return list(combinations(enumerate(row), 2))
