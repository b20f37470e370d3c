"""What stochastic depth finds in a model."""

from pathlib import Path
from typing import Any

import torch

import stochastic_depth as sd

from . import depth
from .errors import CommandError
from .models import load
from .task import try_out


def inspect(
    *, model: str, image_size: int | None = None, png: Path | None = None, **options: Any
) -> None:
    """Print the summary of a model by name, its weights random, and draw it into ``png``."""
    if png is not None and not png.parent.is_dir():
        raise CommandError(f"--png {png}: there is no folder {png.parent}")
    network = load(model, weights="none", advise_weights=False)
    size = image_size or network.image_size
    images = torch.zeros(2, 3, size, size)
    if image_size:
        try_out(model, network.model, image_size)
    for branch in depth.apply(model, network.model, images, **{"p": 0.2, **options}):
        if branch.mode == "subset":
            branch.mode = "row"  # of so few images, a whole number would say nothing of p
    summary = sd.summary(network.model, images)
    print(summary)
    if png is not None:
        try:
            summary.plot().savefig(png, format="png")
        except OSError as error:
            raise CommandError(f"--png {png}: cannot be written: {error.strerror}") from error
