"""Random numbers, put out of the way where runs are compared that draw different ones."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["NoNoise"]


class NoNoise(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes random numbers one half, where runs that draw different ones are compared."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        return out.fill_(0.5) if func.overloadpacket in _NOISE else out


_NOISE = {
    getattr(torch.ops.aten, name)
    for name in ["rand", "randn", "rand_like", "randn_like", "uniform_", "normal_", "exponential_"]
}
