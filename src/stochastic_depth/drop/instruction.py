"""What code does with a stand-in at an instruction: ask for its class, apply a Function, unpack."""

import dis
from types import CodeType, FrameType
from typing import Any

from ..find.spot import NOT_THE_USERS, by_instruction

__all__ = ["is_applied", "is_asked", "unpacked"]


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
    asked = now.opname == "MATCH_CLASS" or _calls(known, now, "isinstance")
    if asked and any(i.argval in _OF_TORCH and _is_within(i, now) for i in known):
        raise TypeError(
            "stochastic depth: isinstance() with a type such as torch.FloatTensor reads a value of "
            "a branch as memory, which it may not be: ask for its dtype and device"
        )
    return asked


# Types with a code in C that looks into what is said to be a tensor.
_KINDS = "Float", "Double", "Half", "BFloat16", "Byte", "Char", "Short", "Int", "Long", "Bool"
_OF_TORCH = {f"{kind}Tensor" for kind in _KINDS}


def _is_within(inner: Any, outer: Any) -> bool:
    """Whether an instruction is of a part of the expression that another one is of."""
    a, b = inner.positions, outer.positions
    begin, end = (a.lineno, a.col_offset), (a.end_lineno, a.end_col_offset)
    return (b.lineno, b.col_offset) <= begin and end <= (b.end_lineno, b.end_col_offset)


@by_instruction
def is_applied(code: CodeType, at: int) -> bool:
    """Whether an instruction is ``x.apply(...)``, where x may be a custom autograd.Function.

    What asks for a class then is its code in C.
    """
    known = list(dis.get_instructions(code))
    return any(_calls(known, i, "apply") for i in known if i.offset == at)


def _calls(known: list[Any], now: Any, name: str) -> bool:
    """Whether what is called begins in the source where this name does."""
    return any(_begin(i) == _begin(now) for i in known if i.argval == name)


def _begin(instruction: Any) -> Any:
    return instruction.positions.lineno, instruction.positions.col_offset


@by_instruction
def unpacked(code: CodeType, at: int) -> int | None:
    """Into how many an instruction unpacks what it iterates over, if it does."""
    found = (i for i in dis.get_instructions(code) if i.offset == at)
    return next((i.argval for i in found if i.opname == "UNPACK_SEQUENCE"), None)
