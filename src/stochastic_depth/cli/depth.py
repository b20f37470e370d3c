"""The calls of the library that the commands make, in one place."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import stochastic_depth as sd

from .errors import CommandError, first_line


def apply(name: str, model: nn.Module, images: torch.Tensor, **options: Any) -> list[sd.Branch]:
    """Put stochastic depth into ``model``, which takes ``images``."""
    try:
        sd.apply(model, example_inputs=images, **options)
    except ValueError as error:
        raise CommandError(f"--model {name}: {refusal(error)}") from error
    return sd.branches(model)


def refusal(error: ValueError) -> str:
    """What the library says of a model, without its Python arguments."""
    if "no residual branch" in str(error):
        return (
            "no residual branch was found in it, so there is nothing to drop; stochastic depth "
            "needs a network with residual connections, such as a ResNet or a vision transformer"
        )
    return f"stochastic depth cannot be applied to it: {first_line(error)}"


def random_state(model: nn.Module) -> Any:
    """What decides the next decisions, for a checkpoint."""
    return sd.state_dict(model)


def set_random_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Continue from what :func:`random_state` returned."""
    sd.load_state_dict(model, state)
