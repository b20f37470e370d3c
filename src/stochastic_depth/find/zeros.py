"""Parameters that are zero hide what comes before them; while a model is tried they are not."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["without", "zeros_in"]


def zeros_in(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are all zero, as those of gates and heads that start with nothing.

    A bias hides nothing, where its module has other parameters that do not.
    """
    found: dict[nn.Parameter, None] = {}
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        zero = {name: p for name, p in own.items() if _is_zero(p)}
        hiding = [name for name in zero if "bias" not in name or len(zero) == len(own)]
        found |= dict.fromkeys(zero[name] for name in hiding)
    return list(found)


def _is_zero(p: nn.Parameter) -> bool:
    if type(p) is not nn.Parameter or p.is_meta or p.is_inference():
        return False
    if p.layout is not torch.strided:
        return False
    return p.requires_grad and p.is_floating_point() and p.numel() > 0 and not p.any()


@contextmanager
def without(zeros: Sequence[nn.Parameter]) -> Iterator[None]:
    """Have other numbers in their place."""
    before = [p.data for p in zeros]
    for i, p in enumerate(zeros):
        numbers = torch.arange(p.numel(), dtype=torch.float32, device=p.device)
        p.data = numbers.add_(i).sin_().mul_(0.1).to(p.dtype).view(p.shape)
    try:
        yield
    finally:
        for p, data in zip(zeros, before, strict=True):
            p.data = data
