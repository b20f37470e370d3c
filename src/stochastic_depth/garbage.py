"""Full garbage collections wait while a model is looked at."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["no_full_collections"]

_lock = threading.Lock()
_at_work = 0
_usual = 0


@contextmanager
def no_full_collections() -> Iterator[None]:
    """Collect only young objects for as long, which frees what a run leaves behind.

    A run that is recorded makes so many objects that Python soon looks at all there are, which in a
    process with torch takes longer than looking at the model does.
    """
    global _at_work, _usual
    with _lock:
        young, older, full = gc.get_threshold()
        if not _at_work:
            _usual = full
        _at_work += 1
        gc.set_threshold(young, older, 1_000_000)
    try:
        yield
    finally:
        with _lock:
            _at_work -= 1
            if not _at_work:
                young, older, _ = gc.get_threshold()
                gc.set_threshold(young, older, _usual)
