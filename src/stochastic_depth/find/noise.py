"""Random numbers, put out of the way where runs are compared that draw different ones."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["NoNoise"]


class NoNoise(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes random numbers one half; what else is drawn, as by dropout, does not depend on before.

    The generators go on from where they were.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        own = (kwargs or {}).get("generator")
        generators = [torch.default_generator, *torch.cuda.default_generators]
        generators += [] if own is None else [own]
        states = [generator.get_state() for generator in generators]
        for generator in generators:
            generator.manual_seed(0)
        try:
            out = func(*args, **(kwargs or {}))
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
        return out.fill_(0.5) if func.overloadpacket in _NOISE else out


_NOISE = {
    getattr(torch.ops.aten, name)
    for name in ["rand", "randn", "rand_like", "randn_like", "uniform_", "normal_", "exponential_"]
}
