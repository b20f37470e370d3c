"""What several ranks do to a run that is recorded on one of them."""

import gc
import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .tensors import CALL

__all__ = ["Listening", "held", "is_between_ranks", "is_distributed", "is_sharded"]

_IS_AVAILABLE = distributed.is_available()
_FULLY_SHARD = os.path.join(os.path.dirname(torch.__file__), "distributed", "fsdp", "_fully_shard")
_FSDP = tuple(os.path.join(_FULLY_SHARD, f"_fsdp_{name}") for name in ("collectives", "param"))


def is_distributed() -> bool:
    """Whether there is a process group."""
    return _IS_AVAILABLE and distributed.is_initialized()


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 gathers the parameters of ``module`` when it is called."""
    # Slow to import, and not imported where it is not used.
    return isinstance(module, getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ()))


def is_between_ranks(frame: FrameType | None) -> bool:
    """Whether FSDP2 moves parameters here, which are no values: it wraps its collectives."""
    while frame is not None and frame.f_code is not CALL:
        if frame.f_code.co_filename.startswith(_FSDP):
            return True
        frame = frame.f_back
    return False


class Listening(TorchDispatchMode):
    """Tells ``note`` of every collective, written by hand or in a hook, that a model itself calls.

    Those of FSDP2 are its own affair, and DTensor's are told by the parameters.
    """

    def __init__(self, note: Callable[[], object]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.note = note

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch loads its compiler, and the model is run once more on ranks that had none."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in _TALK and not is_between_ranks(sys._getframe(1)):
            self.note()
        return func(*args, **(kwargs or {}))


# The namespaces of operations between ranks.
_TALK = {"c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "symm_mem"}


def held(tensors: list[Tensor]) -> list[Tensor]:
    """Of ``tensors``, those that Python holds; others are alive in a queue of C++'s."""
    asked = tuple(tensors)  # which from Python 3.13 on is a holder, too
    holders = [x for x in gc.get_referrers(*asked) if x is not tensors and x is not asked]
    known = {id(x) for x in gc.get_referents(*holders)}
    return [t for t in tensors if id(t) in known]
