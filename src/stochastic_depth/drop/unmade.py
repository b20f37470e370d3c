"""An object that a call of a dropped branch would return."""

from collections.abc import Callable
from typing import Any

__all__ = ["Unmade"]


class Unmade:
    """Stands in for an object that a dropped call would return, made only to be looked into."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def __getattr__(self, name: str) -> Any:
        return getattr(self._make(), name)
