"""What the verbs are given, checked, and as they use it."""

import operator
from collections.abc import Mapping
from typing import Any

from .branch import Mode
from .find import Samples

__all__ = ["call_of", "samples_of", "seed_of"]


def call_of(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments and keywords that a tensor, a tuple of arguments or a dict stands for."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def samples_of(samples: Any, mode: Mode) -> Samples:
    """The argument of this name.

    Raises:
        ValueError: it is no such, or in "batch" mode.
    """
    if samples is None:
        return Samples()
    dim, rows = samples if isinstance(samples, tuple) and len(samples) == 2 else (samples, 1)
    if not (type(dim) is int and type(rows) is int and dim >= 0 and rows >= 1):
        raise ValueError(
            "samples must be a dimension of the inputs (0, 1, ...), or (dimension, rows of one "
            f"sample), got {samples!r}"
        )
    if mode == "batch":
        raise ValueError("samples is for mode='row' and 'subset': 'batch' drops whole batches")
    return Samples(dim, rows)


def seed_of(seed: Any) -> int:
    """The argument of this name.

    Raises:
        TypeError, ValueError: it is no integer, or none that torch takes.
    """
    try:
        if isinstance(seed, bool):
            raise TypeError
        number = operator.index(seed)
    except TypeError:
        raise TypeError(f"seed must be an integer or None, got {seed!r}") from None
    if not -(1 << 63) <= number < 1 << 64:
        raise ValueError(f"seed must be one that torch takes, of 64 bits, got {seed!r}")
    return number
