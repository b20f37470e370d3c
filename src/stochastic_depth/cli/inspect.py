"""What stochastic depth finds in a model."""

from typing import Any

import torch

import stochastic_depth as sd

from .errors import CommandError
from .models import load


def inspect(*, model: str, image_size: int | None = None, **options: Any) -> None:
    """Print the summary of a model by name, its weights random."""
    network = load(model, weights="none")
    size = image_size or network.image_size
    images = torch.zeros(2, 3, size, size)
    try:
        sd.apply(network.model, example_inputs=images, **options)
    except ValueError as error:
        raise CommandError(str(error)) from error
    print(sd.summary(network.model, images))
