"""How ``example_inputs`` become a call of the model."""

from collections.abc import Mapping
from typing import Any

__all__ = ["call_of"]


def call_of(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments and keywords that a tensor, a tuple of arguments or a dict stands for."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}
