"""Garbage collections are few while a model is looked at."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["few_collections"]

_OBJECTS = 50_000  # between two collections of the young ones
_lock = threading.Lock()
_at_work = 0
_usual = (0, 0, 0)


@contextmanager
def few_collections() -> Iterator[None]:
    """Collect young objects seldom and old ones not at all for as long.

    A run that is recorded makes many objects, and lets go of them when it has been read. Meanwhile
    Python would look through them again and again, take them for lasting ones, and in the next
    training step look at all objects there are, which in a process with torch takes longer than
    looking at the model did.
    """
    global _at_work, _usual
    with _lock:
        if not _at_work:
            _usual = gc.get_threshold()
            if _usual[0]:  # else they are switched off
                gc.set_threshold(max(_usual[0], _OBJECTS), _usual[1], 1_000_000)
        _at_work += 1
    try:
        yield
    finally:
        with _lock:
            _at_work -= 1
            if not _at_work:
                gc.set_threshold(*_usual)
