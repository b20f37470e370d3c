"""The programs of one block, by the form of the calls they serve."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from .examples import Detail, describe
from .program import Program

__all__ = ["Programs"]

_MOST = 64  # programs of a block; beyond, the one unused for longest is made again when needed


class Programs:
    """A block's programs; None stands for a form of call that has none.

    Attributes:
        latest: by the key of a call, the program of the latest such call. What a compiled graph
            uses, which checks for itself that nothing has changed.
    """

    def __init__(self) -> None:
        self.latest: dict[Hashable, Program | None] = {}
        self._details: dict[Hashable, Detail] = {}
        self._programs: OrderedDict[Hashable, Program | None] = OrderedDict()

    def get(
        self,
        key: Hashable,
        state: Hashable,
        values: Sequence[Any],
        make: Callable[[], tuple[Program | None, Detail]],
    ) -> Program | None:
        """The program for a call, made where there is none yet.

        Args:
            key: what is known of the call without looking at its tensors.
            state: what else the block's forward may depend on.
            values: the call's values.
            make: makes the program, or None, and says what of the values this depends on.
        """
        detail = self._details.get(key, Detail.NOTHING)
        form = key, state, describe(values, detail)
        if form not in self._programs:
            program, needed = make()
            if needed > detail:
                self._details[key] = needed
                form = key, state, describe(values, needed)
            self._programs[form] = program
            if len(self._programs) > _MOST:
                self._programs.popitem(last=False)
        self._programs.move_to_end(form)
        self.latest[key] = self._programs[form]
        return self.latest[key]

    def copy(self) -> "Programs":
        """Another collection of the same programs."""
        copied = Programs()
        copied.latest, copied._details = dict(self.latest), dict(self._details)
        copied._programs = self._programs.copy()
        return copied
