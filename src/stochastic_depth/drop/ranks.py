"""The other ranks of the process group."""

import itertools
from datetime import timedelta

from torch import distributed

from .._torch import default_store
from ..find.ranks import is_distributed

__all__ = ["from_first_rank", "is_distributed", "rank", "world_size"]

_WAIT = timedelta(minutes=5)
_asked = itertools.count()  # the same on all ranks, which come to their models in the same order


def rank() -> int:
    """The number of this rank, 0 where it is alone."""
    return distributed.get_rank() if is_distributed() else 0


def world_size() -> int:
    """How many ranks there are."""
    return distributed.get_world_size() if is_distributed() else 1


def from_first_rank(number: int) -> int:
    """The ``number`` that rank 0 gives.

    It goes through the group's store and not through a collective: ranks that come to a first
    decision in different steps, or do other things in between, still agree.

    Raises:
        RuntimeError: rank 0 gives none.
    """
    store, key = default_store(), f"stochastic_depth/{next(_asked)}"
    if rank() == 0:
        store.set(key, str(number))
        return number
    try:
        store.wait([key], _WAIT)
    except Exception as error:  # of a type that depends on the store
        raise RuntimeError(
            "stochastic depth: rank 0 chooses the seed of the decisions, and it has not come to "
            "its first one; give all ranks the same seed= in apply()"
        ) from error
    return int(store.get(key))
