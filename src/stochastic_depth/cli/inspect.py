"""What stochastic depth finds in a model."""

from typing import Any

import torch

import stochastic_depth as sd

from . import depth
from .models import load
from .task import try_out


def inspect(*, model: str, image_size: int | None = None, **options: Any) -> None:
    """Print the summary of a model by name, its weights random."""
    network = load(model, weights="none", advise_weights=False)
    size = image_size or network.image_size
    images = torch.zeros(2, 3, size, size)
    if image_size:
        try_out(model, network.model, image_size)
    depth.apply(model, network.model, images, **{"p": 0.2, **options})
    print(sd.summary(network.model, images))
