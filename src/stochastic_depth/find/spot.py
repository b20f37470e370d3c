"""Where in the source an expression is: the same for a tensor's operation and for a stand-in's."""

import os
import sys
from collections.abc import Callable
from functools import wraps
from itertools import islice
from types import CodeType, FrameType
from typing import TypeVar

import torch

from ..branch import Spot

__all__ = ["NOT_THE_USERS", "RESIDUAL", "by_instruction", "is_of_library", "is_ours", "spot"]

T = TypeVar("T")

_TORCH = os.path.dirname(torch.__file__)
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_PACKAGE = __name__.partition(".")[0] + "."
NOT_THE_USERS = ("torch.", _PACKAGE)  # what the names of such modules begin with
_BETWEEN = (
    _OURS,
    os.path.join(_TORCH, "overrides.py"),
    os.path.join(_TORCH, "_tensor.py"),
    os.path.join(_TORCH, "_ops.py"),
    os.path.join(_TORCH, "utils") + os.sep,
)
_GENERATED = "<eval_with_key>"
RESIDUAL = os.path.join(_OURS, "drop", "residual.py")  # whose sum is an expression of its own
_NOWHERE = Spot("", "", 0, 0, (0, 0))

_between: dict[str, bool] = {}  # by file


def by_instruction(look: Callable[[CodeType, int], T]) -> Callable[[FrameType], T]:
    """Have ``look`` look at each instruction once: a function of the frame that is at it.

    Code objects go by their identity, for which they are kept. Code of two files may be equal, and
    an expression of one has several instructions, so that a spot would be now of this file, now of
    that; and what torch.compile makes has no hash.
    """
    known: dict[tuple[int, int], tuple[CodeType, T]] = {}

    @wraps(look)
    def at(frame: FrameType) -> T:
        code = frame.f_code
        key = id(code), frame.f_lasti
        found = known.get(key)
        if found is None:
            found = known[key] = code, look(code, frame.f_lasti)
        return found[1]

    return at


def is_of_library(frame: FrameType) -> bool:
    """Whether this library's code runs in ``frame``."""
    return frame.f_code.co_filename.startswith(_OURS)


def is_ours(x: object) -> bool:
    """Whether it is an object of this library: a wrapper, which drops what is in it, or a slot."""
    return type(x).__module__.startswith(_PACKAGE)


def spot(depth: int = 1) -> Spot:
    """The innermost expression that is neither this library's nor torch's way to an operation.

    Args:
        depth: how many frames above this one to begin; 1 is the caller's.
    """
    frame = sys._getframe(depth)
    while True:
        code = frame.f_code
        file = code.co_filename
        between = _between.get(file)
        if between is None:
            between = _between[file] = file.startswith(_BETWEEN) and file != RESIDUAL
        if not between and code.co_name != "__torch_function__":  # of somebody's mode
            break
        if frame.f_back is None:
            return _NOWHERE
        frame = frame.f_back
    return _spot(frame)


@by_instruction
def _spot(code: CodeType, instruction: int) -> Spot:
    line, last, column, end = next(islice(code.co_positions(), instruction // 2, None))
    begin, file = instruction if column is None else column, code.co_filename
    if file.startswith(_GENERATED):  # by torch.fx, with a number that is another each time
        file = _GENERATED
    elif file != RESIDUAL:  # the folder is another where a pickled model is loaded, perhaps
        file = os.path.basename(file)
    return Spot(file, code.co_qualname, line or 0, begin, (last or 0, end or 0))
