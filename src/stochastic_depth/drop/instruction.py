"""What code of the user's does with a stand-in at an instruction: ask for its class, unpack it."""

import dis
from types import CodeType, FrameType
from typing import Any

from ..find.spot import NOT_THE_USERS, by_instruction

__all__ = ["is_asked", "unpacked"]


def is_asked(frame: FrameType) -> bool:
    """Whether what ``frame`` does now is to ask for a class, in code that knows of no parts."""
    name = frame.f_globals.get("__name__")
    if name is None or name.startswith(NOT_THE_USERS):  # None: a guard of torch.compile's
        return False
    return _is_question(frame)


@by_instruction
def _is_question(code: CodeType, at: int) -> bool:
    """Whether an instruction is ``isinstance(...)``, a pattern of a class, or ``x.__class__``."""
    known = list(dis.get_instructions(code))
    now = next((i for i in known if i.offset == at), None)
    if now is None:
        return False
    if now.argval == "__class__":  # else of a graph of torch.compile's, which makes a part again
        return now.positions is not None and now.positions.col_offset is not None
    if now.opname == "MATCH_CLASS":
        return True
    # A call begins in the source where the name of what is called does.
    names = [i for i in known if i.argval == "isinstance"]
    return any(_begin(i) == _begin(now) for i in names)


def _begin(instruction: Any) -> Any:
    return instruction.positions.lineno, instruction.positions.col_offset


@by_instruction
def unpacked(code: CodeType, at: int) -> int | None:
    """Into how many an instruction unpacks what it iterates over, if it does."""
    found = (i for i in dis.get_instructions(code) if i.offset == at)
    return next((i.argval for i in found if i.opname == "UNPACK_SEQUENCE"), None)
