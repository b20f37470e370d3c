"""Random numbers out of the way, where runs are compared that draw different ones."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["NoDropout", "NoNoise"]


class NoDropout(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Disables dropout, which would draw other numbers for fewer samples."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.bernoulli_.float:
            return args[0].fill_(1.0)
        if func is torch.ops.aten.native_dropout.default:
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        return func(*args, **(kwargs or {}))


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
