"""What runs that are compared may differ by: dropout, put out of the way, and rounding."""

from collections.abc import Mapping
from typing import Any
from zlib import crc32

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .._torch import tree_leaves
from ..branch import Branch
from ..drop.draws import Draws

__all__ = ["ByName", "NoDropout", "Rounding"]


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


class Rounding(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the rounding of the coarsest dtype that something is computed in.

    Attributes:
        eps: of that dtype.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.eps = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.eps = max(self.eps, torch.finfo(x.dtype).eps)
        return out


class ByName(Draws):
    """Numbers that depend on a seed and on the branch alone, for its calls one after the other."""

    def __init__(self, seed: int, names: Mapping[Branch, str]) -> None:
        super().__init__(seed)
        self.names = names
        self.calls: dict[Branch, int] = {}

    def decide(self, branches: Any, block: nn.Module) -> list[Any]:
        decisions: list[Any] = []
        for branch in branches:
            n = self.calls[branch] = self.calls.get(branch, -1) + 1
            key = crc32(repr((self.seed, self.names[branch], n)).encode())
            decisions.append(branch.is_always if branch.is_certain else key)
        return decisions
