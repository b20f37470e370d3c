"""The calls of the library whose arguments differ between its versions, in one place."""

from typing import Any

from torch import nn

import stochastic_depth as sd
from stochastic_depth.integrations.transformers import StochasticDepthCallback


def apply(model: nn.Module, p: float, *, blocks: Any = None, **options: Any) -> nn.Module:
    """`sd.apply`; ``blocks`` are dropped as a whole."""
    if blocks is not None:
        options["whole"] = blocks
    return sd.apply(model, p=p, **options)


def callback(course: str | None, steps: int) -> StochasticDepthCallback:
    """Ours for transformers' Trainer: the rates stay, or follow ``course`` over all of training."""
    return StochasticDepthCallback(course, steps) if course else StochasticDepthCallback()
