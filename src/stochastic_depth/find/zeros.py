"""Parameters that are zero hide what comes before them; while a model is tried they are not."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["without", "zeros_in"]


def zeros_in(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are all zero, as those of gates and heads that start with nothing."""
    return [
        p
        for p in model.parameters()
        if type(p) is nn.Parameter
        and p.requires_grad
        and p.is_floating_point()
        and p.layout is torch.strided
        and not (p.is_meta or p.numel() == 0 or p.any())
    ]


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
