"""The classes of images, by a model that a run left."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .batches import Images
from .data import problem
from .errors import CommandError
from .saving import find

SHOWN = 3


def predict(*, run: Path, images: list[Path]) -> None:
    """Print the most likely classes of each image."""
    for path in images:
        if not path.is_file():
            reason = "is a folder" if path.is_dir() else "no such file"
            raise CommandError(f"IMAGE {path}: {reason}; give image files")
        if bad := problem(path):
            raise CommandError(f"IMAGE {bad}: cannot be read as an image")
    saved = find(run)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if saved.path != run:
        console.print(f"Using {saved.path}, the model with the lowest validation error.")
    model = saved.network().model
    mean, std = (255 * torch.tensor(saved.info[key]).view(-1, 1, 1) for key in ("mean", "std"))
    prepared = Images(Files(images), saved.info["image_size"])
    for index, path in enumerate(images):
        pixels = (prepared[index][0] - mean) / std
        with torch.inference_mode():
            output = model(pixels[None])
        chances = getattr(output, "logits", output).softmax(1)[0]
        top = chances.topk(min(SHOWN, len(chances)))
        named = ", ".join(
            f"{saved.info['classes'][place]} {100 * chance:.1f} %"
            for chance, place in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        )
        console.print(f"{path}: {named}")


class Files(torch.utils.data.Dataset[Any]):
    """Image files, without labels."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        with Image.open(self.paths[index]) as image:
            image.load()
            return image, 0
